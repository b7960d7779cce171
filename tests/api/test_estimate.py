"""The time estimate against measured seconds, and how it moves with the settings and the card."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_budget import SHAPE, spec  # type: ignore[import-not-found]

from rlhf_api.budget import ModelShape
from rlhf_api.cards import CARDS, Card, card_named
from rlhf_api.estimate import PEFT, PhaseTime, Speed, estimate
from rlhf_api.run import RunSpec

FACTOR = 1.3  # how far any part may be from what was measured
MEASURED = [json.loads(line) for line in Path(__file__).with_name("measured_seconds.jsonl").read_text().splitlines()]


def card(name: str) -> Card:
    found = card_named(name)
    assert found
    return found


H200 = card("NVIDIA H200")


def seconds(stage: str, times: list[PhaseTime]) -> dict[str, float]:
    """Phase -> seconds."""
    return {each.name: each.seconds for each in times if each.stage == stage}


def estimated(part: str, setting: dict[str, Any]) -> dict[str, float]:
    """What the estimate says of one measured setting."""
    shape: ModelShape = SHAPE
    layers, rows = setting.get("layers", "all"), setting["rows"]
    if part == "update":
        ppo = {"episodes": rows, "batchSize": rows, "rolloutBatchSize": rows, "microBatchSize": rows}
        ppo |= {"promptTokens": setting["prompt"], "responseTokens": setting["response"], "epochs": setting["epochs"]}
        found = seconds("ppo", estimate(shape, spec(lora={"layers": layers}, ppo=ppo), H200, setting["kept"]))
        return found | {"all": sum(found.values())}
    if part == "step":
        if not setting["fused"]:
            shape = ModelShape(**vars(shape) | {"fused_decode": False})
        speed = Speed(shape, spec(lora={"layers": layers}), H200)
        return {part: speed.step(rows, setting["prompt"] + setting["response"] / 2)}
    speed = Speed(shape, spec(lora={"layers": layers}), H200)
    if part == "sft micro-batch":
        return {part: PEFT * speed.layers(shape.layers, rows, setting["tokens"], 3)}
    again = 1 - setting["kept"] / speed.adapted
    forward_and_gradient = speed.layers(speed.adapted, rows, setting["tokens"], 2 + again)
    return {part: forward_and_gradient + speed.logits(rows * setting["tokens"] // 2, 2)}


@pytest.mark.parametrize("measured", MEASURED, ids=lambda each: f"{each['part']}-{each['setting']}")
def test_the_estimate_is_within_a_factor_of_what_was_measured(measured: dict[str, Any]) -> None:
    took = measured["seconds"]
    found = estimated(measured["part"], measured["setting"])
    for name, value in (took if isinstance(took, dict) else {measured["part"]: took}).items():
        print(f"{measured['part']} {measured['setting']} {name}: {found[name]:.4f} {value:.4f} {found[name] / value - 1:+.1%}")
        assert 1 / FACTOR < found[name] / value < FACTOR
