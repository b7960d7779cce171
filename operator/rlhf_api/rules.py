"""The rules that join fields: each one once, as a Python check and as the CEL expression that the CRD carries.

A rule holds or it does not. Python then says which value breaks it and which would not; the CRD says a fixed message.
In CEL, `self` is the spec with its defaults filled in, and a field named as a CEL keyword is written `__function__`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from rlhf_api.budget import ModelShape
from rlhf_api.names import STAGE_NAMES
from rlhf_api.run import SFT, Data, PreferenceData, Reward, RunSpec

NO_BUCKET: Final = "([0-9]+([.][0-9]+){3}|.*-s3alias|.*--ol-s3)"  # of the right form, and yet none for S3


@dataclass(frozen=True)
class Rule:
    """One rule about the fields of a spec."""

    path: str  # of the field that a person would change, below spec
    message: str  # for the CRD
    holds: Callable[[RunSpec], bool]
    cel: str
    explain: Callable[[RunSpec], str]  # the value that breaks the rule, and the remedy


@dataclass(frozen=True)
class Problem:
    """A rule that a spec breaks."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}"


def problems(spec: RunSpec) -> list[Problem]:
    """Every rule that `spec` breaks, in the order of the list."""
    return [Problem(rule.path, rule.explain(spec)) for rule in RULES if not rule.holds(spec)]


def misfits(spec: RunSpec, shape: ModelShape) -> list[Problem]:
    """What of `spec` the imported model cannot do."""
    found = []
    if spec.lora.layers != "all" and int(spec.lora.layers.removeprefix("top:")) > shape.layers:
        layers = spec.lora.layers
        found.append(
            Problem("lora.layers", f"{layers} is too many: the model has {shape.layers} layers; use all, or fewer")
        )
    lengths = {
        "sft.sequenceLength": spec.sft.sequence_length if spec.data.sft else 0,
        "reward.sequenceLength": spec.reward.sequence_length if reward_is_trained(spec) else 0,
    }
    for path, tokens in lengths.items():
        if tokens > shape.positions:
            found.append(
                Problem(path, f"{tokens} is too many: the model has {shape.positions} positions; use at most those")
            )
    prompt, response = spec.ppo.prompt_tokens, spec.ppo.response_tokens
    if prompt + response > shape.positions:
        what = f"{response} with promptTokens {prompt} makes {prompt + response} tokens"
        found.append(Problem("ppo.responseTokens", f"{what}; the model has {shape.positions} positions: lower either"))
    return found


def reward_is_trained(spec: RunSpec) -> bool:
    """Whether the reward is an adapter that this run trains, and not another run's, a classifier or a function."""
    if spec.fork_from is not None and spec.fork_from.stage in ("reward", "ppo"):
        return False
    return spec.reward.is_adapter


# ---- numbers that must divide one another ---------------------------------------------------------------------------


def _divides(section: str, part: str, whole: str) -> Rule:
    def values(spec: RunSpec) -> tuple[int | None, int]:
        fields = getattr(spec, section).model_dump(by_alias=True)
        return fields[part], fields[whole]

    def holds(spec: RunSpec) -> bool:
        small, large = values(spec)
        return small is None or large % small == 0

    def explain(spec: RunSpec) -> str:
        small, large = values(spec)
        return f"{small} does not divide {whole} {large}; use {divisors(large)}"

    return Rule(
        f"{section}.{part}",
        f"must divide {section}.{whole}",
        holds,
        f"!has(self.{section}.{part}) || self.{section}.{whole} % self.{section}.{part} == 0",
        explain,
    )


def divisors(number: int) -> str:
    """The divisors of `number` as a list to choose from: `1, 2, 4 or 8`; the largest eight where there are more."""
    small = [part for part in range(1, int(number**0.5) + 1) if number % part == 0]
    every = sorted({*small, *(number // part for part in small)})[-8:]
    return _listed(every)


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


MAX_GPUS: Final = 8
UNTRAINED: Final = (  # the reward, in CEL
    "has(self.reward.classifier) || has(self.reward.__function__)"
    " || (has(self.forkFrom) && self.forkFrom.stage in ['reward', 'ppo'])"
)
MINI_BATCH: Final = (  # PPO.effective_mini_batch_size, in CEL
    "(has(self.ppo.miniBatchSize) ? self.ppo.miniBatchSize : self.ppo.batchSize % (4 * self.ppo.microBatchSize) == 0"
    " ? self.ppo.batchSize / 4 : self.ppo.batchSize)"
)


NOT_SHARED: Final = f"self.gpu.count < 2 || self.gpu.count > {MAX_GPUS}"


def _shared(spec: RunSpec) -> bool:
    return 2 <= spec.gpu.count <= MAX_GPUS


def _counts(spec: RunSpec) -> str:
    whole = spec.ppo.effective_mini_batch_size
    return _listed([count for count in range(1, MAX_GPUS + 1) if whole % count == 0])


def _share_is_whole_rollouts(spec: RunSpec) -> bool:
    batch, rollout = spec.ppo.batch_size, spec.ppo.rollout_batch_size
    return not _shared(spec) or rollout is None or batch % rollout != 0 or batch % (rollout * spec.gpu.count) == 0


def _choice(whole: int, gpus: int) -> str:
    """What could divide each GPU's share of `whole`."""
    return divisors(whole // gpus) if whole % gpus == 0 else f"a batch that {gpus} divides"


def _shared_by_gpus(section: str, trained: Callable[[RunSpec], bool], trained_cel: str) -> Rule:
    """Of a stage that TRL trains: in a step each GPU passes over equally many micro-batches."""

    def holds(spec: RunSpec) -> bool:
        part: SFT | Reward = getattr(spec, section)
        batch, micro = part.batch_size, part.micro_batch_size
        return not (_shared(spec) and trained(spec)) or batch % micro != 0 or batch % (micro * spec.gpu.count) == 0

    def explain(spec: RunSpec) -> str:
        part: SFT | Reward = getattr(spec, section)
        unit = part.micro_batch_size * spec.gpu.count
        what = f"{spec.gpu.count} GPUs with microBatchSize {part.micro_batch_size}"
        return f"{part.batch_size} cannot be shared by {what}; use a multiple of {unit}, or another gpu.count"

    return Rule(
        f"{section}.batchSize",
        f"must be a multiple of gpu.count times {section}.microBatchSize",
        holds,
        f"{NOT_SHARED} || !({trained_cel}) || self.{section}.batchSize % self.{section}.microBatchSize != 0"
        f" || self.{section}.batchSize % (self.{section}.microBatchSize * self.gpu.count) == 0",
        explain,
    )


def _micro_batch(spec: RunSpec) -> str:
    ppo = spec.ppo
    name = "batchSize" if ppo.mini_batch_size is None else "miniBatchSize"
    whole = ppo.mini_batch_size or ppo.batch_size
    return f"{ppo.micro_batch_size} does not divide {name} {whole}; use {divisors(whole)}"


# ---- the tables of data ---------------------------------------------------------------------------------------------

TABLES: Final = ("sft", "preferences", "prompts", "evaluation")


def _table(spec: RunSpec, name: str) -> Data | None:
    tables: dict[str, Data | None] = {field: getattr(spec.data, field) for field in TABLES}
    return tables[name]


def _about_table(
    name: str, field: str, message: str, holds: Callable[[Data], bool], cel: str, explain: Callable[[Data], str]
) -> Rule:
    """A rule about one table, for the case that it is there. In `cel`, {table} stands for it."""

    def holds_if_given(spec: RunSpec) -> bool:
        table = _table(spec, name)
        return table is None or holds(table)

    def explain_it(spec: RunSpec) -> str:
        table = _table(spec, name)
        return explain(table) if table else ""

    expression = cel.replace("{table}", f"self.data.{name}")
    required = name == "prompts"
    return Rule(
        f"data.{name}.{field}",
        message,
        holds_if_given,
        expression if required else f"!has(self.data.{name}) || ({expression})",
        explain_it,
    )


def _row_range(data: Data) -> tuple[int, int]:
    first, last = (data.rows or "0%:100%").replace("%", "").split(":")
    return int(first), int(last)


def _in_order(bounds: tuple[int, int]) -> bool:
    return bounds[0] < bounds[1] <= 100


def _rows(name: str) -> Rule:
    first, last = "int({table}.rows.split('%')[0])", "int({table}.rows.split(':')[1].split('%')[0])"
    return _about_table(
        name,
        "rows",
        "must begin before it ends and end at 100% at most, such as 0%:70%",
        lambda data: _in_order(_row_range(data)),
        f"!has({{table}}.rows) || ({first} < {last} && {last} <= 100)",
        lambda data: f"{data.rows} is an empty or impossible range; begin before the end, and end at 100% at most",
    )


def _held_out(name: str, purpose: str) -> Rule:
    return _about_table(
        name,
        "heldOut",
        f"must be above 0 and below 1: {purpose}",
        lambda data: 0 < data.held_out < 1,
        "{table}.heldOut > 0.0 && {table}.heldOut < 1.0",
        lambda data: f"{data.held_out:g} leaves one part empty; use a fraction above 0 and below 1: {purpose}",
    )


def _table_source(name: str) -> Rule:
    return _about_table(
        name,
        "source",
        "a hub data set is written hf://datasets/owner/name",
        lambda data: not data.source.startswith("hf://") or data.source.startswith("hf://datasets/"),
        "!{table}.source.startsWith('hf://') || {table}.source.startsWith('hf://datasets/')",
        lambda data: f"{data.source} is no data set; write hf://datasets/{data.source.removeprefix('hf://')}",
    )


def _table_revision(name: str) -> Rule:
    return _about_table(
        name,
        "revision",
        "is for hub data sets alone",
        lambda data: data.revision is None or data.source.startswith("hf://"),
        "!has({table}.revision) || {table}.source.startsWith('hf://')",
        lambda data: f"{data.revision} is of no use with {data.source}; remove it, or read from hf://datasets/",
    )


def _table_split(name: str) -> Rule:
    return _about_table(
        name,
        "split",
        "is for hub data sets alone",
        lambda data: data.split == "train" or data.source.startswith("hf://"),
        "{table}.split == 'train' || {table}.source.startsWith('hf://')",
        lambda data: f"{data.split} is of no use with {data.source}; name the split's file as the source",
    )


PAIR = ("chosenColumn", "rejectedColumn")
LABELLED = ("textColumn", "labelColumn", "chosenLabel")


def _given(preferences: PreferenceData | None) -> list[str]:
    fields = preferences.model_dump(by_alias=True, exclude_none=True) if preferences else {}
    return [name for name in PAIR + LABELLED if name in fields]


def _preference_form(spec: RunSpec) -> bool:
    return spec.data.preferences is None or tuple(_given(spec.data.preferences)) in (PAIR, LABELLED)


def _explain_preferences(spec: RunSpec) -> str:
    given = " and ".join(_given(spec.data.preferences)) or "no column"
    return f"has {given}; give {' and '.join(PAIR)}, or {LABELLED[0]}, {LABELLED[1]} and {LABELLED[2]}"


def _all_given(names: tuple[str, ...], others: tuple[str, ...]) -> str:
    present = [f"has(self.data.preferences.{name})" for name in names]
    absent = [f"!has(self.data.preferences.{name})" for name in others]
    return " && ".join(present + absent)


# ---- scorers --------------------------------------------------------------------------------------------------------


def _explain_scorers(spec: RunSpec) -> str:
    lines = [
        f"{scorer.name} has {'both' if scorer.fitted else 'neither'}"
        for scorer in spec.evaluate.scorers
        if (scorer.function is None) != scorer.fitted
    ]
    return f"{', '.join(lines)}; give each either function or fitted: true"


def _explain_names(spec: RunSpec) -> str:
    names = [scorer.name for scorer in spec.evaluate.scorers]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"{' and '.join(twice)} names more than one; give each another name"


def _below(path: str, limit: str, value: Callable[[RunSpec], Any], most: Callable[[RunSpec], Any], given: str) -> Rule:
    """`value`, where it is set, must be less than `most`. `given`: CEL that is true where it is set."""
    name = limit.rpartition(".")[2]
    test = f"self.{path} < self.{limit}"
    return Rule(
        path,
        f"must be below {limit}",
        lambda spec: (number := value(spec)) is None or number < most(spec),
        f"!{given} || {test}" if given else test,
        lambda spec: f"{value(spec):g} is not below {name} {most(spec):g}; lower it, or raise {name}",
    )


def _unknown_stages(spec: RunSpec) -> list[str]:
    return sorted(set(spec.placement.stage_pod_templates) - set(STAGE_NAMES))


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "placement.stagePodTemplates",
        f"names a stage that there is not; use {', '.join(STAGE_NAMES)}",
        lambda spec: not _unknown_stages(spec),
        f"self.placement.stagePodTemplates.all(name, name in {list(STAGE_NAMES)})",
        lambda spec: f"there is no stage {_unknown_stages(spec)[0]}; use {', '.join(STAGE_NAMES)}",
    ),
    _divides("sft", "microBatchSize", "batchSize"),
    _divides("reward", "microBatchSize", "batchSize"),
    _divides("ppo", "miniBatchSize", "batchSize"),
    Rule(
        "ppo.microBatchSize",
        "must divide ppo.miniBatchSize, or ppo.batchSize where that is not set",
        lambda spec: (spec.ppo.mini_batch_size or spec.ppo.batch_size) % spec.ppo.micro_batch_size == 0,
        "(has(self.ppo.miniBatchSize) ? self.ppo.miniBatchSize : self.ppo.batchSize) % self.ppo.microBatchSize == 0",
        _micro_batch,
    ),
    _divides("ppo", "rolloutBatchSize", "batchSize"),
    _below("sft.warmupSteps", "sft.steps", lambda spec: spec.sft.warmup_steps, lambda spec: spec.sft.steps, ""),
    _below(
        "ppo.maxKl",
        "ppo.abortKl",
        lambda spec: spec.ppo.max_kl,
        lambda spec: spec.ppo.abort_kl,
        "has(self.ppo.maxKl)",
    ),
    _below(
        "ppo.adaptiveKl.target",
        "ppo.abortKl",
        lambda spec: spec.ppo.adaptive_kl and spec.ppo.adaptive_kl.target,
        lambda spec: spec.ppo.abort_kl,
        "has(self.ppo.adaptiveKl)",
    ),
    Rule(
        "ppo.klCoefficient",
        "must be above 0 with ppo.adaptiveKl, which multiplies it",
        lambda spec: spec.ppo.adaptive_kl is None or spec.ppo.kl_coefficient > 0,
        "!has(self.ppo.adaptiveKl) || self.ppo.klCoefficient > 0.0",
        lambda spec: f"{spec.ppo.kl_coefficient:g} stays 0 under adaptiveKl, which multiplies it; start above 0",
    ),
    Rule(
        "reward",
        "classifier and function exclude each other",
        lambda spec: spec.reward.classifier is None or spec.reward.function is None,
        "!(has(self.reward.classifier) && has(self.reward.__function__))",
        lambda _: "has both classifier and function; keep one",
    ),
    Rule(
        "reward.classifier.revision",
        "is for hub models alone",
        lambda spec: (
            (classifier := spec.reward.classifier) is None
            or classifier.revision is None
            or classifier.source.startswith("hf://")
        ),
        "!has(self.reward.classifier) || !has(self.reward.classifier.revision)"
        " || self.reward.classifier.source.startsWith('hf://')",
        lambda spec: (
            f"{spec.reward.classifier.revision} is of no use with {spec.reward.classifier.source}; remove it"
            if spec.reward.classifier
            else ""
        ),
    ),
    Rule(
        "data.preferences",
        "is needed to train the reward; add it, or set reward.classifier or reward.function",
        lambda spec: spec.data.preferences is not None or not reward_is_trained(spec),
        f"has(self.data.preferences) || {UNTRAINED}",
        lambda _: "is missing and the reward is trained on it; add it, or set reward.classifier or reward.function",
    ),
    Rule(
        "data.preferences",
        "needs either chosenColumn and rejectedColumn, or textColumn, labelColumn and chosenLabel",
        _preference_form,
        f"!has(self.data.preferences) || ({_all_given(PAIR, LABELLED)}) || ({_all_given(LABELLED, PAIR)})",
        _explain_preferences,
    ),
    Rule(
        "evaluate.scorers",
        "each needs either function or fitted: true",
        lambda spec: all((scorer.function is None) == scorer.fitted for scorer in spec.evaluate.scorers),
        "self.evaluate.scorers.all(s, has(s.__function__) != s.fitted)",
        _explain_scorers,
    ),
    Rule(
        "evaluate.scorers",
        "their names must differ",
        lambda spec: len({scorer.name for scorer in spec.evaluate.scorers}) == len(spec.evaluate.scorers),
        "self.evaluate.scorers.all(s, self.evaluate.scorers.exists_one(t, t.name == s.name))",
        _explain_names,
    ),
    Rule(
        "data.evaluation",
        "is needed by a scorer with fitted: true",
        lambda spec: spec.data.evaluation is not None or not any(scorer.fitted for scorer in spec.evaluate.scorers),
        "has(self.data.evaluation) || !self.evaluate.scorers.exists(s, s.fitted)",
        lambda spec: (
            f"is missing and the scorer {next(scorer.name for scorer in spec.evaluate.scorers if scorer.fitted)} "
            "is fitted on it; add it, or remove the scorer"
        ),
    ),
    Rule(
        "model.source",
        "a hub model is written hf://owner/name",
        lambda spec: not spec.model.source.startswith("hf://datasets/"),
        "!self.model.source.startsWith('hf://datasets/')",
        lambda spec: f"{spec.model.source} is a data set; a hub model is written hf://owner/name",
    ),
    Rule(
        "model.revision",
        "is for hub models alone",
        lambda spec: spec.model.revision is None or spec.model.source.startswith("hf://"),
        "!has(self.model.revision) || self.model.source.startsWith('hf://')",
        lambda spec: f"{spec.model.revision} is of no use with {spec.model.source}; remove it",
    ),
    Rule(
        "gpu.count",
        f"must be {MAX_GPUS} at most, those of one pod",
        lambda spec: spec.gpu.count <= MAX_GPUS,
        f"self.gpu.count <= {MAX_GPUS}",
        lambda spec: f"{spec.gpu.count} is more than one pod's stage can use; use {MAX_GPUS} at most",
    ),
    _shared_by_gpus("sft", lambda spec: spec.data.sft is not None, "has(self.data.sft)"),
    _shared_by_gpus("reward", reward_is_trained, f"!({UNTRAINED})"),
    Rule(
        "gpu.count",
        "must divide ppo.miniBatchSize, which is a quarter of ppo.batchSize where it is not set and "
        "ppo.microBatchSize divides that, else ppo.batchSize",
        lambda spec: not _shared(spec) or spec.ppo.effective_mini_batch_size % spec.gpu.count == 0,
        f"{NOT_SHARED} || {MINI_BATCH} % self.gpu.count == 0",
        lambda spec: (
            f"{spec.gpu.count} does not divide the {spec.ppo.effective_mini_batch_size} episodes of an optimiser step; "
            f"set ppo.miniBatchSize to a multiple of {spec.gpu.count}, or use {_counts(spec)}"
        ),
    ),
    Rule(
        "ppo.rolloutBatchSize",
        "must divide ppo.batchSize / gpu.count",
        _share_is_whole_rollouts,
        f"{NOT_SHARED} || !has(self.ppo.rolloutBatchSize) || self.ppo.batchSize % self.ppo.rolloutBatchSize != 0"
        " || self.ppo.batchSize % (self.ppo.rolloutBatchSize * self.gpu.count) == 0",
        lambda spec: (
            f"{spec.ppo.rollout_batch_size} does not divide the share of each of {spec.gpu.count} GPUs in batchSize "
            f"{spec.ppo.batch_size}; use {_choice(spec.ppo.batch_size, spec.gpu.count)}"
        ),
    ),
    Rule(
        "objectStore.bucket",
        "must be no IP address, nor end in -s3alias or --ol-s3",
        lambda spec: re.fullmatch(NO_BUCKET, spec.object_store.bucket or "") is None,
        f"!has(self.objectStore.bucket) || !self.objectStore.bucket.matches('^{NO_BUCKET}$')",
        lambda spec: (
            f"{spec.object_store.bucket} is an IP address, or ends in -s3alias or --ol-s3, which S3 keeps for itself; "
            "use another bucket"
        ),
    ),
    *(make(name) for make in (_table_source, _table_revision, _table_split, _rows) for name in TABLES),
    _about_table(
        "sft",
        "heldOut",
        "must be below 1: the rest is trained on",
        lambda data: data.held_out < 1,
        "{table}.heldOut < 1.0",
        lambda data: f"{data.held_out:g} leaves no row to train on; use a fraction below 1",
    ),
    _held_out("preferences", "the reward's accuracy is measured there"),
    _held_out("prompts", "the policies are compared there"),
    _held_out("evaluation", "the fitted scorer's accuracy is measured there"),
)
