"""What a stage that ran out of memory is tried with next: the ladder of its settings, one step for each such failure.

A step halves one size. Micro-batches and the number of rows decoded together change what memory holds and not what is
learnt: gradients are the same to rounding, and samples are other draws of one distribution. So the artifact keeps the
address that the spec gives it. Lengths do change what is learnt: they are halved last, only where the run allows it,
and the artifact's address is that of the shorter length. No I/O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic.alias_generators import to_camel

from rlhf_api.run import Section
from rlhf_api.stage import StageSettings

MAX_STEPS: Final = 8  # enough for the defaults of every stage to reach 1
# Stage -> the sizes that its memory grows with, in the order in which they are halved.
SIZES: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "sft": (("sft", "micro_batch_size"),),
    "reward": (("reward", "micro_batch_size"),),
    "ppo": (("ppo", "micro_batch_size"), ("ppo", "rollout_batch_size")),
    "evaluate": (("evaluate", "batch_size"), ("ppo", "micro_batch_size")),
}
# Stage -> the length that is halved after them, where the run allows it.
LENGTHS: Final[Mapping[str, tuple[str, str]]] = {
    "sft": ("sft", "sequence_length"),
    "reward": ("reward", "sequence_length"),
    "ppo": ("ppo", "response_tokens"),
}
SHORTEST: Final = 64  # tokens: below that little is left to learn
MORE: Final = "give it more memory"
# What else a person can change, when no step is left.
REMEDIES: Final[Mapping[str, str]] = {
    "sft": f"lower sft.sequenceLength or lora.rank, use quantization.type nf4, or {MORE}",
    "reward": f"lower reward.sequenceLength or lora.rank, set lora.layers to top:k, or {MORE}",
    "ppo": f"lower ppo.responseTokens, ppo.promptTokens or lora.rank, set lora.layers to top:k, or {MORE}",
    "evaluate": f"lower ppo.responseTokens or ppo.promptTokens, or {MORE}",
}


@dataclass(frozen=True)
class Step:
    """One size halved, and the settings with it and every step before."""

    size: str
    before: int
    after: int
    settings: StageSettings
    shortens: bool = False
    """Whether it changes what is learnt, and with it the address."""


def ladder(stage: str, settings: StageSettings, shorten: bool, gpus: int = 1) -> tuple[Step, ...]:
    """Every step down from `settings`, at most MAX_STEPS; none for a stage that has no such size, or only ones of 1.

    `shorten`: whether lengths may be halved after the sizes. `gpus`: how many share a batch of it.
    """
    steps: list[Step] = []
    for section, field in SIZES.get(stage, ()):
        while len(steps) < MAX_STEPS and (step := _halved(settings, section, field, gpus)) is not None:
            steps.append(step)
            settings = step.settings
    if shorten and stage in LENGTHS and _counts(settings, LENGTHS[stage][0]):
        while len(steps) < MAX_STEPS and (step := _shortened(settings, *LENGTHS[stage])) is not None:
            steps.append(step)
            settings = step.settings
    return tuple(steps)


def stepped_down(steps: Sequence[Step], settings: StageSettings, count: int) -> StageSettings:
    """`settings` after the first `count` steps, or after the last one if there are fewer."""
    return steps[:count][-1].settings if steps[:count] else settings


def told(steps: Sequence[Step], count: int) -> str | None:
    """What the first `count` steps changed, such as `microBatchSize 1 instead of 8`; None if nothing."""
    sizes: dict[str, tuple[int, int]] = {}
    for step in steps[:count]:
        sizes[step.size] = (sizes.get(step.size, (step.before, 0))[0], step.after)
    return " and ".join(f"{size} {now} instead of {first}" for size, (first, now) in sizes.items()) or None


def remedy(stage: str, settings: StageSettings) -> str:
    """What a person can change where no step is left."""
    return REMEDIES.get(stage, MORE) if _counts(settings, stage) else MORE


def _halved(settings: StageSettings, section: str, field: str, gpus: int) -> Step | None:
    sizes: Section | None = getattr(settings, section)
    if sizes is None or not _counts(settings, section):
        return None
    changed: dict[str, int] = {}
    now: int = getattr(sizes, field)
    if settings.ppo is not None and section == "ppo":
        # Its default depends on microBatchSize, and it is no matter of memory: it stays what it was.
        changed["mini_batch_size"] = settings.ppo.effective_mini_batch_size
        if field == "rollout_batch_size":
            now = settings.ppo.effective_rollout_batch_size(gpus)
        else:  # no micro-batch is larger than a GPU's share of a mini-batch
            now = min(now, changed["mini_batch_size"] // max(1, gpus))
    if now <= 1:  # 0: of a spec that breaks the rules
        return None
    # A divisor of what it is divides whatever that divides.
    changed[field] = next(size for size in range(now // 2, 0, -1) if now % size == 0)
    after = settings.model_copy(update={section: sizes.model_copy(update=changed)})
    return Step(to_camel(field), now, changed[field], after)


def _shortened(settings: StageSettings, section: str, field: str) -> Step | None:
    part: Section | None = getattr(settings, section)
    now: int = getattr(part, field) if part else 0
    if part is None or now // 2 < SHORTEST:
        return None
    after = settings.model_copy(update={section: part.model_copy(update={field: now // 2})})
    return Step(to_camel(field), now, now // 2, after, shortens=True)


def _counts(settings: StageSettings, section: str) -> bool:
    """Whether the section's sizes are read: a reward that is not trained has no batches."""
    reward = settings.reward
    return section != "reward" or (reward is not None and reward.is_adapter)
