"""A first estimate of time: bytes read and operations done, over what a card reads and does in a second.

The shares of a card's peaks that are reached, and the milliseconds that do not depend on the card, are fitted to
GPT-NeoX-20B in NF4 on one H200: tests/api/measured_seconds.jsonl. No other card has been measured. Every text and
response counts as long as the settings allow. Not counted: loading, import, merge, figures on held-out rows,
checkpoints, and what a reward function or classifier takes. A stage under way goes by its own pace instead.
"""

import math
from dataclasses import dataclass
from typing import Final

from rlhf_api.budget import DOUBLE_QUANT, FORWARD_SHARE, GIB, ModelShape, adapted_layers, adapter_weights, budget
from rlhf_api.cards import Card
from rlhf_api.run import RunSpec

# Shares of the peaks in the vendor's data sheet, of one H200.
PRODUCTS: Final = 0.61  # operations of passes over whole sequences
WEIGHTS: Final = 0.69  # bandwidth while their weights are dequantised, or read
DECODE_BYTES: Final = 0.48  # bandwidth of a fused decode step
DECODE_PRODUCTS: Final = 0.215  # operations of a fused decode step
# Seconds a layer, whatever the card.
LAUNCH: Final = 2e-3  # from Python, a pass's products of one kind
FUSED_LAYER: Final = 12e-6  # kernels of a fused decode step too short for bandwidth to count
OWN_LAYER: Final = 90e-6  # the same of a step by the model's own forward, in a CUDA graph
OPTIMIZER: Final = 1e-3  # one step of the optimiser
PEFT: Final = 1.11  # PEFT's layers, which sft and reward train on, against those of PPO
WEIGHT_TRAFFIC: Final = {"nf4": 0.52 + 2 + 2, "int8": 1.0, "none": 2.0}  # bytes a weight: nf4 is written out in 16 bits
FUSED_ROWS: Final = 64  # that are decoded together at most by a fused step
VALUE_BYTES: Final = 2.0  # of activations
SPARE_BYTES: Final = GIB  # that activations which PPO keeps leave free


@dataclass(frozen=True)
class PhaseTime:
    """One phase of a stage and the seconds that it takes in all."""

    stage: str
    name: str
    seconds: float


def estimate(shape: ModelShape, spec: RunSpec, card: Card, kept_layers: int | None = None) -> list[PhaseTime]:
    """Seconds of each phase of each stage that trains or samples on the GPU. Stages that the run skips are absent.

    Empty where computeDtype is float32: what a card does of those in a second is not in the table.
    kept_layers: whose activations PPO keeps; as many as `gpu.memory` holds, if left out. Several GPUs divide the time,
    which is the ideal.
    """
    if spec.quantization.compute_dtype == "float32":
        return []
    speed = Speed(shape, spec, card)
    ppo, times = spec.ppo, []
    tokens = ppo.prompt_tokens + ppo.response_tokens
    trunk = shape.layers - speed.adapted
    roles = 4 if spec.reward.is_adapter else 3
    kept = _kept(shape, spec) if kept_layers is None else kept_layers

    if spec.data.sft is not None:
        sft = spec.sft
        micro = PEFT * speed.layers(shape.layers, sft.micro_batch_size, sft.sequence_length, 3)
        micro += speed.logits(sft.micro_batch_size * sft.sequence_length, 3)
        step = sft.batch_size / sft.micro_batch_size * micro + shape.layers * OPTIMIZER
        times.append(PhaseTime("sft", "train", sft.steps * step))

    if spec.reward.is_adapter:
        reward = spec.reward
        rows = 2 * reward.micro_batch_size
        micro = speed.layers(trunk, rows, reward.sequence_length, 1)
        micro = PEFT * (micro + speed.layers(speed.adapted, rows, reward.sequence_length, 3))
        step = reward.batch_size / reward.micro_batch_size * micro + speed.adapted * OPTIMIZER
        times.append(PhaseTime("reward", "train", reward.steps * step))

    micro_batches = ppo.batch_size / ppo.micro_batch_size
    rows = ppo.effective_rollout_batch_size(spec.gpu.count)
    score = speed.layers(speed.adapted, roles * ppo.micro_batch_size, tokens, 1)
    score += speed.logits(2 * ppo.micro_batch_size * ppo.response_tokens, 1)
    if not speed.fused(rows):  # a fused step leaves the trunk behind
        score += speed.layers(trunk, ppo.micro_batch_size, tokens, 1)
    again = 1 - min(kept, speed.adapted) / speed.adapted  # share of the layers that are computed again
    train = 2 * speed.layers(speed.adapted, ppo.micro_batch_size, tokens, 2 + again)  # policy, critic
    train += speed.logits(ppo.micro_batch_size * ppo.response_tokens, 2)
    steps = ppo.batch_size / ppo.effective_mini_batch_size
    update = ppo.epochs * (micro_batches * train + steps * 2 * speed.adapted * OPTIMIZER)
    times += [
        PhaseTime("ppo", "rollout", ppo.rollouts * ppo.batch_size / rows * speed.rollout(rows)),
        PhaseTime("ppo", "score", ppo.rollouts * micro_batches * score),
        PhaseTime("ppo", "train", ppo.rollouts * update),
    ]

    evaluate = spec.evaluate
    rows = min(evaluate.batch_size, evaluate.samples)
    judged = 2 * speed.layers(trunk, rows, tokens, 1)
    judged += (2 * (roles - 3) + 2) * speed.layers(speed.adapted, rows, tokens, 1)  # reward of both, KL of one
    both = evaluate.samples / rows * (2 * speed.rollout(rows) + judged)
    times.append(PhaseTime("evaluate", "rollout", both))
    return [PhaseTime(each.stage, each.name, each.seconds / max(1, spec.gpu.count)) for each in times]


class Speed:
    """Seconds that one card takes for the parts that the phases are made of."""

    def __init__(self, shape: ModelShape, spec: RunSpec, card: Card) -> None:
        self.shape, self.spec, self.card = shape, spec, card
        self.adapted = adapted_layers(shape, spec)

    def fused(self, rows: int) -> bool:
        """Whether so many rows are decoded by the fused kernels, which read 4-bit weights in place."""
        kind = self.spec.quantization
        packed = kind.type == "nf4" and kind.double_quant and kind.compute_dtype in ("auto", "bfloat16")
        return packed and self.shape.fused_decode and self.card.bfloat16 and rows <= FUSED_ROWS

    def layers(self, count: int, rows: int, length: int, products: float) -> float:
        """A pass over whole sequences through `count` layers.

        products: how often each weight is multiplied by: 1 forward, 2 with the gradient, 3 with checkpointing.
        """
        return max(self._layers(count, rows, length, products), count * products * LAUNCH)

    def logits(self, tokens: int, products: float) -> float:
        """The output layer over so many tokens."""
        return products * 2 * tokens * self.shape.hidden * self.shape.vocabulary / (PRODUCTS * self.card.flops)

    def step(self, rows: int, context: float) -> float:
        """One token of each row, with `context` tokens before it."""
        shape = self.shape
        weights, output = shape.layers * shape.layer_weights, shape.hidden * shape.vocabulary
        adapters = self.adapted * adapter_weights(shape, self.spec)
        rate = DECODE_BYTES * self.card.bandwidth
        others = VALUE_BYTES * (output + adapters) / rate
        cache = VALUE_BYTES * rows * context * shape.cached_values / rate
        if self.fused(rows):
            read = DOUBLE_QUANT * weights / rate + others
            multiplied = 2 * rows * (weights + output) / (DECODE_PRODUCTS * self.card.flops)
            # Of reading and multiplying the same weights most runs at the same time.
            return math.hypot(read, multiplied) + cache + shape.layers * FUSED_LAYER
        own = self._layers(shape.layers, rows, 1, 1) + others + cache + shape.layers * OWN_LAYER
        return max(own, self._launched) if self.spec.quantization.type == "int8" else own  # which no graph can hold

    def rollout(self, rows: int) -> float:
        """So many responses decoded together: the prompts, the decode step's capture, and each token but the first."""
        ppo = self.spec.ppo
        prompts = self.layers(self.shape.layers, rows, ppo.prompt_tokens, 1)
        steps = ppo.response_tokens - 1
        return prompts + self._launched + steps * self.step(rows, ppo.prompt_tokens + ppo.response_tokens / 2)

    @property
    def _launched(self) -> float:
        return self.shape.layers * LAUNCH

    def _layers(self, count: int, rows: int, length: int, products: float) -> float:
        shape = self.shape
        attention = 4 * length * shape.heads * shape.head_size
        operations = count * products * rows * length * (2 * shape.layer_weights + attention)
        traffic = count * products * shape.layer_weights * WEIGHT_TRAFFIC[self.spec.quantization.type]
        return operations / (PRODUCTS * self.card.flops) + traffic / (WEIGHTS * self.card.bandwidth)


def _kept(shape: ModelShape, spec: RunSpec) -> int:
    """The layers whose activations PPO's updates keep, for all that memory holds beside them."""
    memory = budget(shape, spec)
    train = next(phase for phase in memory.phases if (phase.stage, phase.name) == ("ppo", "train"))
    ppo = spec.ppo
    layer = ppo.micro_batch_size * (ppo.prompt_tokens + ppo.response_tokens) * shape.working_values * VALUE_BYTES
    return max(0, int((memory.available - SPARE_BYTES - train.total) / (FORWARD_SHARE * layer)))
