"""The time estimate against measured seconds, and how it moves with the settings and the card."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_budget import SHAPE, SMOL, spec  # type: ignore[import-not-found]

from rlhf_api.budget import shape_of
from rlhf_api.cards import CARDS, Card, card_named
from rlhf_api.estimate import PEFT, PhaseTime, Speed, estimate

SHAPES = {"gpt-neox-20b": SHAPE, "smollm2-135m": shape_of(SMOL)}
# How far any part may be from what was measured: a small model is bound by launches, of which little is modelled.
FACTORS = {"gpt-neox-20b": 1.2, "smollm2-135m": 2.0}
MEASURED = [json.loads(line) for line in Path(__file__).with_name("measured_seconds.jsonl").read_text().splitlines()]


def card(name: str) -> Card:
    return next(each for each in CARDS if each.name == name)


def seconds(stage: str, times: list[PhaseTime]) -> dict[str, float]:
    """Phase -> seconds."""
    return {each.name: each.seconds for each in times if each.stage == stage}


def estimated(model: str, part: str, setting: dict[str, Any]) -> dict[str, float]:
    """What the estimate says of one measured setting on an H200."""
    shape, rows, lora = SHAPES[model], setting["rows"], {"layers": setting.get("layers", "all")}
    assert shape
    if part == "update":
        ppo = {"episodes": rows, "batchSize": rows, "rolloutBatchSize": setting.get("decoded", rows)}
        ppo |= {"microBatchSize": setting.get("micro", rows), "miniBatchSize": setting.get("mini", rows)}
        ppo |= {"promptTokens": setting["prompt"], "responseTokens": setting["response"], "epochs": setting["epochs"]}
        found = seconds("ppo", estimate(shape, spec(lora=lora, ppo=ppo), card("H200"), setting["kept"]))
        return found | {"all": sum(found.values())}
    kind = {"doubleQuant": setting.get("fused", True)}  # without it the model's own forward decodes
    speed = Speed(shape, spec(lora=lora, quantization=kind), card("H200"))
    if part == "step":
        return {part: speed.step(rows, setting["prompt"] + setting["response"] / 2)}
    if part == "sft micro-batch":
        return {part: PEFT * speed.layers(shape.layers, rows, setting["tokens"], 3)}
    again = 1 - setting["kept"] / speed.adapted
    layers = speed.layers(speed.adapted, rows, setting["tokens"], 2 + again)
    return {part: layers + speed.logits(rows * setting["tokens"] // 2, 2)}


@pytest.mark.parametrize("measured", MEASURED, ids=lambda each: f"{each['model']}-{each['part']}-{each['setting']}")
def test_the_estimate_is_within_a_factor_of_what_was_measured(measured: dict[str, Any]) -> None:
    took, factor = measured["seconds"], FACTORS[measured["model"]]
    found = estimated(measured["model"], measured["part"], measured["setting"])
    for name, value in (took if isinstance(took, dict) else {measured["part"]: took}).items():
        assert 1 / factor < found[name] / value < factor, f"{name}: estimated {found[name]:.4f} s, measured {value} s"


def test_what_memory_holds_is_kept_and_not_computed_again() -> None:
    run = spec(ppo={"batchSize": 16, "microBatchSize": 16, "promptTokens": 128, "responseTokens": 128})
    roomy = run.model_copy(update={"gpu": run.gpu.model_copy(update={"memory": "80Gi"})})
    tight, kept, every = (
        seconds("ppo", estimate(SHAPE, each, card("A100 80 GB"), layers))["train"]
        for each, layers in ((run, 0), (roomy, None), (run, 44))
    )
    assert kept == every < tight


def test_stages_that_do_not_run_take_no_time() -> None:
    run = spec(reward={"function": "m:f"}, data={"prompts": {"source": "file:///a.csv"}})
    assert {each.stage for each in estimate(SHAPE, run, card("L4"))} == {"ppo", "evaluate"}


def test_float32_is_not_estimated() -> None:
    assert estimate(SHAPE, spec(quantization={"computeDtype": "float32"}), card("L4")) == []


def test_several_gpus_divide_the_time() -> None:
    one = spec()
    two = one.model_copy(update={"gpu": one.gpu.model_copy(update={"count": 2})})
    for alone, shared in zip(estimate(SHAPE, one, card("L4")), estimate(SHAPE, two, card("L4")), strict=True):
        assert shared.seconds == pytest.approx(alone.seconds / 2)


def test_rows_beyond_what_the_fused_step_takes_are_decoded_by_the_model() -> None:
    speed = Speed(SHAPE, spec(), card("H200"))
    assert speed.step(65, 128) > 1.5 * speed.step(64, 128)


@given(
    size=st.sampled_from([1, 4, 8, 16]),
    tokens=st.integers(2, 1024),
    layers=st.sampled_from(["all", "top:1", "top:11"]),
    kind=st.sampled_from(["nf4", "int8", "none"]),
    slow=st.sampled_from(CARDS),
)
def test_a_faster_card_or_less_to_do_never_takes_longer(
    size: int, tokens: int, layers: str, kind: str, slow: Card
) -> None:
    def total(which: Card, **changes: int) -> float:
        ppo = {"batchSize": 16, "microBatchSize": size, "rolloutBatchSize": size, "responseTokens": tokens} | changes
        run = spec(ppo=ppo, lora={"layers": layers}, quantization={"type": kind})
        return sum(each.seconds for each in estimate(SHAPE, run, which, 0))

    fast = Card("faster", slow.memory, 2 * slow.bandwidth, 2 * slow.flops, "nobody", slow.bfloat16)
    assert 0 < total(fast) <= total(slow)
    assert total(slow, responseTokens=tokens // 2, epochs=1) <= total(slow)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("x86_64", None),
    ],
)
def test_a_card_is_found_by_what_pytorch_calls_it(device: str, name: str | None) -> None:
    found = card_named(device)
    assert (found.name if found else None) == name
