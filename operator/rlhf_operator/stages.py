"""The table of the chain: each stage's program, inputs, output, and the parts of the spec that it reads.

Everything that depends on the order or the content of the chain reads this table; nothing else lists the stages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from rlhf_api.rules import reward_is_trained
from rlhf_api.run import Lora, RLHFRun, RunSpec
from rlhf_api.stage import (
    ArtifactKind,
    ArtifactRef,
    Program,
    RunIdentity,
    StageConfig,
    StageSettings,
    StoreConfig,
    stage_digest,
)

Fingerprints = Mapping[str, str]
"""Stage name -> what the bytes of the stage's source looked like; absent where the source names its own version."""


@dataclass(frozen=True)
class Stage:
    """One row of the table. `inputs` maps an input's name to the kind of artifact; each kind has one stage."""

    name: str
    program: Program
    inputs: dict[str, ArtifactKind]
    output: ArtifactKind
    gpu: bool
    settings: Callable[[RunSpec, str | None], StageSettings]
    skipped: Callable[[RunSpec], str | None] = field(default=lambda _: None)
    """Why the stage does not run, or None."""
    shared: Callable[[RunSpec], bool] = field(default=lambda _: False)
    """Whether several GPUs share its work."""


@dataclass(frozen=True)
class Link:
    """One stage of one run's chain, with its address known before anything has run."""

    stage: Stage
    settings: StageSettings
    inputs: dict[str, ArtifactRef]
    output: ArtifactRef
    skipped: str | None = None
    taken: bool = False
    """Its artifact is another run's, and never made here."""

    @property
    def name(self) -> str:
        return self.stage.name

    def gpus(self, spec: RunSpec) -> int:
        """How many GPUs it works on, if it works on any."""
        return spec.gpu.count if self.stage.shared(spec) else min(spec.gpu.count, 1)

    def config(self, run: RLHFRun, store: StoreConfig, attempt: str) -> StageConfig:
        """The document that the stage's process reads."""
        return StageConfig(
            run=RunIdentity(
                name=run.metadata.name, namespace=run.metadata.namespace or "default", uid=run.metadata.uid or ""
            ),
            stage=self.name,
            program=self.stage.program,
            settings=self.settings,
            inputs=self.inputs,
            output=self.output,
            attempt=attempt,
            store=store,
            gpu=run.spec.gpu.model_copy(update={"count": self.gpus(run.spec)}),
            tracking=run.spec.tracking,
        )


def chain(run: RLHFRun, fingerprints: Fingerprints) -> list[Link]:
    """Every stage of the run in the order of the table, skipped ones included, with each artifact's address.

    Where sft is skipped, `model` stands for `merged-model`; an input that a skipped stage would have made is absent.
    What the run's status says was taken over from another run stands in place of what the spec would make.
    """
    taken = run.status.taken if run.status else {}
    links: list[Link] = []
    made: dict[ArtifactKind, ArtifactRef] = {}
    for stage in STAGES:
        inputs = {name: made[kind] for name, kind in stage.inputs.items() if kind in made}
        if "model" in stage.inputs:
            inputs.setdefault("model", made["model"])
        settings = stage.settings(run.spec, fingerprints.get(stage.name))
        output = ArtifactRef(kind=stage.output, digest=stage_digest(stage.program, settings, inputs))
        skipped = stage.skipped(run.spec)
        if (over := taken.get(stage.name)) is not None:
            skipped = None if over else f"the run {run.spec.fork_from.run if run.spec.fork_from else ''} has none"
            output = ArtifactRef.parse(over) if over else output
        links.append(Link(stage, settings, inputs, output, skipped, bool(over)))
        if skipped is None:
            made[stage.output] = output
    return links


def _no_sft(spec: RunSpec) -> str | None:
    return "no data.sft" if spec.data.sft is None else None


def _no_preferences(spec: RunSpec) -> str | None:
    if spec.reward.classifier:
        return "reward.classifier needs no preferences"
    if spec.reward.function:
        return "reward.function needs no preferences"
    return "no data.preferences" if spec.data.preferences is None else None


def _no_evaluation(spec: RunSpec) -> str | None:
    return "no data.evaluation" if spec.data.evaluation is None else None


def _import_model(spec: RunSpec, fingerprint: str | None) -> StageSettings:
    return StageSettings(model=spec.model, fingerprint=fingerprint)


def _import_sft(spec: RunSpec, fingerprint: str | None) -> StageSettings:
    return StageSettings(sft_data=spec.data.sft, fingerprint=fingerprint)


def _import_preferences(spec: RunSpec, fingerprint: str | None) -> StageSettings:
    return StageSettings(preference_data=spec.data.preferences, fingerprint=fingerprint)


def _import_prompts(spec: RunSpec, fingerprint: str | None) -> StageSettings:
    return StageSettings(prompt_data=spec.data.prompts, prompt_tokens=spec.ppo.prompt_tokens, fingerprint=fingerprint)


def _import_evaluation(spec: RunSpec, fingerprint: str | None) -> StageSettings:
    return StageSettings(evaluation_data=spec.data.evaluation, fingerprint=fingerprint)


def _sft(spec: RunSpec, _: str | None) -> StageSettings:
    # sft adapts every layer: a change of lora.layers leaves its artifact valid.
    lora = spec.lora.model_copy(update={"layers": "all"})
    return StageSettings(quantization=spec.quantization, lora=lora, sft=spec.sft, seed=spec.seed)


def _merge(spec: RunSpec, _: str | None) -> StageSettings:
    # sft tells it how to measure the held-out loss; its adapter's digest depends on sft already.
    lora = spec.lora.model_copy(update={"layers": "all"})
    return StageSettings(quantization=spec.quantization, lora=lora, sft=spec.sft, merge=spec.merge, seed=spec.seed)


def _reward(spec: RunSpec, fingerprint: str | None) -> StageSettings:
    return StageSettings(
        quantization=spec.quantization,
        lora=_rl_lora(spec),
        reward=spec.reward,
        seed=spec.seed,
        fingerprint=fingerprint,
    )


def _ppo(spec: RunSpec, _: str | None) -> StageSettings:
    return StageSettings(quantization=spec.quantization, lora=_rl_lora(spec), ppo=spec.ppo, seed=spec.seed)


def _evaluate(spec: RunSpec, _: str | None) -> StageSettings:
    return StageSettings(
        quantization=spec.quantization, lora=_rl_lora(spec), ppo=spec.ppo, evaluate=spec.evaluate, seed=spec.seed
    )


def _rl_lora(spec: RunSpec) -> Lora:
    # Dropout and DoRA are sft's alone: a change of them reaches the later stages through the merged model.
    return spec.lora.model_copy(update={"dropout": 0.0, "use_dora": False})


STAGES: Final[tuple[Stage, ...]] = (
    Stage("import-model", "import-model", {}, "model", False, _import_model),
    Stage("import-sft", "import-data", {"model": "model"}, "sft-data", False, _import_sft, _no_sft),
    Stage(
        "import-preferences",
        "import-data",
        {"model": "model"},
        "preference-data",
        False,
        _import_preferences,
        _no_preferences,
    ),
    Stage("import-prompts", "import-data", {"model": "model"}, "prompt-data", False, _import_prompts),
    Stage(
        "import-evaluation",
        "import-data",
        {"model": "model"},
        "evaluation-data",
        False,
        _import_evaluation,
        _no_evaluation,
    ),
    Stage(
        "sft",
        "sft",
        {"model": "model", "data": "sft-data"},
        "sft-adapter",
        True,
        _sft,
        _no_sft,
        shared=lambda _: True,
    ),
    Stage(
        "merge",
        "merge",
        {"model": "model", "adapter": "sft-adapter", "data": "sft-data"},
        "merged-model",
        True,
        _merge,
        _no_sft,
    ),
    Stage(
        "reward",
        "reward",
        {"model": "merged-model", "data": "preference-data", "sft-data": "sft-data"},
        "reward-model",
        True,
        _reward,
        shared=reward_is_trained,
    ),
    Stage(
        "ppo",
        "ppo",
        {"model": "merged-model", "reward": "reward-model", "prompts": "prompt-data"},
        "policy",
        True,
        _ppo,
        shared=lambda _: True,
    ),
    Stage(
        "evaluate",
        "evaluate",
        {
            "model": "merged-model",
            "reward": "reward-model",
            "policy": "policy",
            "prompts": "prompt-data",
            "data": "evaluation-data",
            "sft": "sft-adapter",
            "merge": "merged-model",
        },
        "evaluation",
        True,
        _evaluate,
    ),
)
