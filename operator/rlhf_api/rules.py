"""The rules that join fields: each one once, as a Python check and as the CEL expression that the CRD carries.

A rule holds or it does not; its message names the field, the value and what would be right. Fields are those of the
spec; in CEL, `self` is the spec with its defaults filled in.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_api.budget import ModelShape
from rlhf_api.run import Data, PreferenceData, RunSpec


@dataclass(frozen=True)
class Rule:
    """One rule. `message` is fixed text for the CRD; `detail` adds the values where Python can."""

    path: str  # of the field that a person would change, below spec
    message: str
    holds: Callable[[RunSpec], bool]
    cel: str
    value: Callable[[RunSpec], object]


@dataclass(frozen=True)
class Problem:
    """A rule that a spec breaks."""

    path: str
    value: object
    message: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.value!r}: {self.message}"


def problems(spec: RunSpec) -> list[Problem]:
    """Every rule that `spec` breaks, in the order of the list."""
    return [Problem(rule.path, rule.value(spec), rule.message) for rule in RULES if not rule.holds(spec)]


def misfits(spec: RunSpec, shape: ModelShape) -> list[Problem]:
    """What of `spec` the imported model cannot do."""
    found = []
    if spec.lora.layers != "all" and int(spec.lora.layers.removeprefix("top:")) > shape.layers:
        found.append(
            Problem("lora.layers", spec.lora.layers, f"the model has {shape.layers} layers; use at most those")
        )
    lengths = {
        "sft.sequenceLength": spec.sft.sequence_length,
        "reward.sequenceLength": spec.reward.sequence_length,
        "ppo.responseTokens": spec.ppo.prompt_tokens + spec.ppo.response_tokens,
    }
    for path, tokens in lengths.items():
        if tokens > shape.positions:
            what = "with ppo.promptTokens it makes " if path.startswith("ppo") else ""
            found.append(
                Problem(path, tokens, f"{what}more tokens than the model's {shape.positions} positions; lower it")
            )
    return found


def _divides(section: str, part: str, whole: str) -> Rule:
    def values(spec: RunSpec) -> tuple[int | None, int]:
        fields = getattr(spec, section)
        by_alias = {field.alias: name for name, field in type(fields).model_fields.items()}
        return getattr(fields, by_alias[part]), getattr(fields, by_alias[whole])

    def holds(spec: RunSpec) -> bool:
        small, large = values(spec)
        return small is None or large % small == 0

    return Rule(
        f"{section}.{part}",
        f"must divide {section}.{whole}",
        holds,
        f"!has(self.{section}.{part}) || self.{section}.{whole} % self.{section}.{part} == 0",
        lambda spec: values(spec)[0],
    )


def _data_sets(spec: RunSpec) -> dict[str, Data | None]:
    data = spec.data
    return {
        "sft": data.sft,
        "preferences": data.preferences,
        "prompts": data.prompts,
        "evaluation": data.evaluation,
    }


def _row_range(data: Data | None) -> tuple[int, int] | None:
    if data is None or data.rows is None:
        return None
    first, last = data.rows.split(":")
    return int(first.rstrip("%")), int(last.rstrip("%"))


def _rows(name: str) -> Rule:
    def holds(spec: RunSpec) -> bool:
        bounds = _row_range(_data_sets(spec)[name])
        return bounds is None or bounds[0] < bounds[1] <= 100

    rows = f"self.data.{name}.rows"
    absent = f"!has({rows})" if name == "prompts" else f"!has(self.data.{name}) || !has({rows})"
    first, last = f"int({rows}.split('%')[0])", f"int({rows}.split(':')[1].split('%')[0])"
    return Rule(
        f"data.{name}.rows",
        "must begin before it ends, and end at 100% at most",
        holds,
        f"{absent} || ({first} < {last} && {last} <= 100)",
        lambda spec: getattr(_data_sets(spec)[name], "rows", None),
    )


def _held_out(name: str, purpose: str) -> Rule:
    field = f"self.data.{name}.heldOut"
    return Rule(
        f"data.{name}.heldOut",
        f"must be above 0 and below 1: {purpose}",
        lambda spec: (data := _data_sets(spec)[name]) is None or 0 < data.held_out < 1,
        f"({field} > 0.0 && {field} < 1.0)"
        if name == "prompts"
        else f"!has(self.data.{name}) || ({field} > 0.0 && {field} < 1.0)",
        lambda spec: getattr(_data_sets(spec)[name], "held_out", None),
    )


def _table_source(name: str) -> Rule:
    source = f"self.data.{name}.source"
    right = f"(!{source}.startsWith('hf://') || {source}.startsWith('hf://datasets/'))"
    return Rule(
        f"data.{name}.source",
        "a hub data set is written hf://datasets/owner/name",
        lambda spec: (
            (data := _data_sets(spec)[name]) is None
            or not data.source.startswith("hf://")
            or data.source.startswith("hf://datasets/")
        ),
        right if name == "prompts" else f"!has(self.data.{name}) || {right}",
        lambda spec: getattr(_data_sets(spec)[name], "source", None),
    )


def _preference_form(preferences: PreferenceData | None) -> bool:
    if preferences is None:
        return True
    pairs = [preferences.chosen_column, preferences.rejected_column]
    labelled = [preferences.text_column, preferences.label_column, preferences.chosen_label]
    if any(part is not None for part in pairs):
        return all(part is not None for part in pairs) and not any(part is not None for part in labelled)
    return all(part is not None for part in labelled)


def _columns(preferences: PreferenceData | None) -> object:
    if preferences is None:
        return None
    names = ("chosenColumn", "rejectedColumn", "textColumn", "labelColumn", "chosenLabel")
    given = preferences.model_dump(by_alias=True, exclude_none=True)
    return [name for name in names if name in given]


_P = "self.data.preferences"

RULES: tuple[Rule, ...] = (
    _divides("sft", "microBatchSize", "batchSize"),
    _divides("reward", "microBatchSize", "batchSize"),
    _divides("ppo", "miniBatchSize", "batchSize"),
    _divides("ppo", "rolloutBatchSize", "batchSize"),
    Rule(
        "ppo.microBatchSize",
        "must divide ppo.miniBatchSize, or ppo.batchSize where that is not set",
        lambda spec: (spec.ppo.mini_batch_size or spec.ppo.batch_size) % spec.ppo.micro_batch_size == 0,
        "(has(self.ppo.miniBatchSize) ? self.ppo.miniBatchSize : self.ppo.batchSize) % self.ppo.microBatchSize == 0",
        lambda spec: spec.ppo.micro_batch_size,
    ),
    Rule(
        "ppo.maxKl",
        "must be below ppo.abortKl",
        lambda spec: spec.ppo.max_kl is None or spec.ppo.max_kl < spec.ppo.abort_kl,
        "!has(self.ppo.maxKl) || self.ppo.maxKl < self.ppo.abortKl",
        lambda spec: spec.ppo.max_kl,
    ),
    Rule(
        "sft.warmupSteps",
        "must be below sft.steps",
        lambda spec: spec.sft.warmup_steps < spec.sft.steps,
        "self.sft.warmupSteps < self.sft.steps",
        lambda spec: spec.sft.warmup_steps,
    ),
    Rule(
        "reward",
        "classifier and function exclude each other; remove one",
        lambda spec: spec.reward.classifier is None or spec.reward.function is None,
        "!(has(self.reward.classifier) && has(self.reward.function))",
        lambda _: ["classifier", "function"],
    ),
    Rule(
        "data.preferences",
        "is needed to train the reward; add it, or set reward.classifier or reward.function",
        lambda spec: bool(spec.data.preferences or spec.reward.classifier or spec.reward.function),
        f"has({_P}) || has(self.reward.classifier) || has(self.reward.function)",
        lambda _: None,
    ),
    Rule(
        "data.preferences",
        "needs either chosenColumn and rejectedColumn, or textColumn, labelColumn and chosenLabel",
        lambda spec: _preference_form(spec.data.preferences),
        f"!has({_P}) || ((has({_P}.chosenColumn) || has({_P}.rejectedColumn))"
        f" ? (has({_P}.chosenColumn) && has({_P}.rejectedColumn) && !has({_P}.textColumn)"
        f" && !has({_P}.labelColumn) && !has({_P}.chosenLabel))"
        f" : (has({_P}.textColumn) && has({_P}.labelColumn) && has({_P}.chosenLabel)))",
        lambda spec: _columns(spec.data.preferences),
    ),
    Rule(
        "evaluate.scorers",
        "each needs either function or fitted: true",
        lambda spec: all((scorer.function is None) == scorer.fitted for scorer in spec.evaluate.scorers),
        "self.evaluate.scorers.all(s, has(s.function) != s.fitted)",
        lambda spec: [scorer.name for scorer in spec.evaluate.scorers],
    ),
    Rule(
        "evaluate.scorers",
        "their names must differ",
        lambda spec: len({scorer.name for scorer in spec.evaluate.scorers}) == len(spec.evaluate.scorers),
        "self.evaluate.scorers.all(s, self.evaluate.scorers.exists_one(t, t.name == s.name))",
        lambda spec: [scorer.name for scorer in spec.evaluate.scorers],
    ),
    Rule(
        "data.evaluation",
        "is needed by a scorer with fitted: true",
        lambda spec: spec.data.evaluation is not None or not any(scorer.fitted for scorer in spec.evaluate.scorers),
        "has(self.data.evaluation) || !self.evaluate.scorers.exists(s, s.fitted)",
        lambda _: None,
    ),
    Rule(
        "model.source",
        "is a data set; a hub model is written hf://owner/name",
        lambda spec: not spec.model.source.startswith("hf://datasets/"),
        "!self.model.source.startsWith('hf://datasets/')",
        lambda spec: spec.model.source,
    ),
    Rule(
        "gpu.count",
        "this release trains on one GPU; use 1, or 0 for the CPU",
        lambda spec: spec.gpu.count <= 1,
        "self.gpu.count <= 1",
        lambda spec: spec.gpu.count,
    ),
    *(_table_source(name) for name in ("sft", "preferences", "prompts", "evaluation")),
    *(_rows(name) for name in ("sft", "preferences", "prompts", "evaluation")),
    _held_out("sft", "the held-out loss is measured there"),
    _held_out("preferences", "the reward's accuracy is measured there"),
    _held_out("prompts", "the policies are compared there"),
    _held_out("evaluation", "the fitted scorer's accuracy is measured there"),
)
