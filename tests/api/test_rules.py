"""The rules that join fields: Python and the CRD's CEL say the same, by Google's implementation of CEL."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from any_spec import specs
from cel_expr_python import cel
from cel_expr_python.ext import ext_strings
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_api.budget import ModelShape
from rlhf_api.crd import transition_rules
from rlhf_api.rules import RULES, Rule, divisors, misfits, problems
from rlhf_api.run import RLHFRun, RunSpec

Change = Callable[[dict[str, Any]], dict[str, Any]]
CEL = cel.NewEnv(
    variables={"self": cel.Type.DYN, "oldSelf": cel.Type.DYN},
    extensions=[ext_strings.ExtStrings()],
)
PROGRAMS = {rule.cel: CEL.compile(rule.cel) for rule in RULES}
SHAPE = ModelShape(
    hidden=64, layers=4, heads=4, kv_heads=4, head_size=16, intermediate=128, mlp_matrices=3, vocabulary=100,
    positions=1024, tied=False,
)  # fmt: skip


def test_python_and_cel_agree_and_each_rule_is_kept_and_broken() -> None:
    seen: set[tuple[str, bool]] = set()

    @given(document=specs())
    @settings(max_examples=300, derandomize=True)
    def agree(document: dict[str, Any]) -> None:
        spec = RunSpec.model_validate(document)
        for rule in RULES:
            assert rule.holds(spec) == cel_holds(rule, spec), rule.path
            seen.add((rule.cel, rule.holds(spec)))

    agree()
    assert seen == {(rule.cel, held) for rule in RULES for held in (True, False)}


@given(document=specs())
@settings(max_examples=100)
def test_a_problem_names_its_field_and_says_more_than_the_rule(document: dict[str, Any]) -> None:
    spec = RunSpec.model_validate(document)
    lines = [str(problem) for problem in problems(spec)]
    assert len(lines) == len(set(lines))
    assert bool(lines) == (not all(rule.holds(spec) for rule in RULES))
    for line in lines:
        assert re.match(r"spec\.(\w+\.)*\w+: \S", line)
        assert "None" not in line


def test_every_path_is_a_field_of_the_spec() -> None:
    properties = RunSpec.model_json_schema(by_alias=True)
    for rule in RULES:
        node = properties
        for part in rule.path.split("."):
            node = _resolved(node, properties)["properties"][part]


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ({}, {"suspend": True}, True),
        ({"suspend": True}, {}, True),
        ({}, {"ppo.epochs": 5}, False),
        ({"suspend": True}, {"suspend": True, "ppo.epochs": 5}, False),
        ({}, {"seed": 1}, False),
        ({}, {"data.sft": ...}, False),
        ({}, {"evaluate.samples": 8}, False),
        ({}, {"placement.nodeSelector": {"gpu": "a"}}, False),
        ({"suspend": True}, {"placement.nodeSelector": {"gpu": "a"}}, True),
        ({"suspend": True}, {"suspend": True, "gpu.memory": "40Gi"}, True),
    ],
    ids=str,
)
def test_what_an_update_may_change(changed: Change, old: dict[str, Any], new: dict[str, Any], allowed: bool) -> None:
    before, after = (RLHFRun.model_validate(changed(changes)).spec for changes in (old, new))
    values = [
        CEL.compile(rule["rule"]).eval(data={"self": _document(after), "oldSelf": _document(before)}).plain_value()
        for rule in transition_rules()
    ]
    assert set(values) <= {True, False}
    assert all(values) == allowed


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"lora.layers": "top:4"}, []),
        ({"lora.layers": "top:5"}, ["spec.lora.layers: top:5 is too many: the model has 4 layers; use all, or fewer"]),
        (
            {"sft.sequenceLength": 2048},
            ["spec.sft.sequenceLength: 2048 is too many: the model has 1024 positions; use at most those"],
        ),
        ({"sft.sequenceLength": 2048, "data.sft": ...}, []),
        ({"reward.sequenceLength": 2048, "reward.function": "m:f"}, []),
        ({"ppo.promptTokens": 896}, []),
        (
            {"ppo.promptTokens": 897},
            [
                "spec.ppo.responseTokens: 128 with promptTokens 897 makes 1025 tokens; "
                "the model has 1024 positions: lower either"
            ],
        ),
    ],
    ids=str,
)
def test_what_the_model_cannot_do(changed: Change, changes: dict[str, Any], lines: list[str]) -> None:
    spec = RLHFRun.model_validate(changed(changes)).spec
    assert [str(problem) for problem in misfits(spec, SHAPE)] == lines


@pytest.mark.parametrize(
    ("number", "choice"),
    [(1, "1"), (7, "1 or 7"), (64, "1, 2, 4, 8, 16, 32 or 64"), (2**31 - 1, "1 or 2147483647")],
)
def test_divisors_are_offered_as_choices(number: int, choice: str) -> None:
    assert divisors(number) == choice


@given(number=st.integers(1, 10**6))
def test_every_choice_divides(number: int) -> None:
    assert all(number % int(choice) == 0 for choice in re.findall(r"\d+", divisors(number)))


@pytest.mark.parametrize(
    ("batch", "mini", "micro", "effective"),
    [(64, None, 8, 16), (64, None, 32, 64), (6, None, 2, 6), (64, 32, 8, 32), (4, None, 1, 1), (48, None, 8, 48)],
)
def test_the_mini_batch_is_a_quarter_where_that_is_whole(batch: int, mini: int, micro: int, effective: int) -> None:
    ppo = RunSpec.model_fields["ppo"].annotation.model_validate(  # type: ignore[union-attr]
        {"batchSize": batch, "miniBatchSize": mini, "microBatchSize": micro}
    )
    assert ppo.effective_mini_batch_size == effective


def cel_holds(rule: Rule, spec: RunSpec) -> bool:
    """The value of the rule's CEL, as the API server gets it: defaults filled in, keywords escaped."""
    value = PROGRAMS[rule.cel].eval(data={"self": _document(spec)}).plain_value()
    assert value in (True, False), f"{rule.cel}: {value}"
    return bool(value)


def _document(spec: RunSpec) -> Any:
    return _escaped(spec.model_dump(mode="json", by_alias=True, exclude_none=True))


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {"__function__" if key == "function" else key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def _resolved(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    for branch in [node, *node.get("anyOf", [])]:
        if "$ref" in branch:
            definition: dict[str, Any] = root["$defs"][branch["$ref"].rsplit("/", 1)[-1]]
            return definition
    return node


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"gpu.count": 8}, []),
        ({"gpu.count": 4}, []),
        ({"gpu.count": 2}, []),
        ({"gpu.count": 16}, ["spec.gpu.count: 16 is more than one pod's stage can use; use 8 at most"]),
        (
            {"gpu.count": 3, "data.sft": ..., "reward.function": "m:f"},
            [
                "spec.gpu.count: 3 does not divide the 16 episodes of an optimiser step; set ppo.miniBatchSize to a "
                "multiple of 3, or use 1, 2, 4 or 8"
            ],
        ),
        (
            {"gpu.count": 4, "sft.microBatchSize": 8, "reward.microBatchSize": 8, "reward.batchSize": 48},
            [
                "spec.sft.batchSize: 16 cannot be shared by 4 GPUs with microBatchSize 8; use a multiple of 32, or "
                "another gpu.count",
                "spec.reward.batchSize: 48 cannot be shared by 4 GPUs with microBatchSize 8; use a multiple of 32, or "
                "another gpu.count",
            ],
        ),
        (
            {"gpu.count": 4, "ppo.rolloutBatchSize": 32},
            [
                "spec.ppo.rolloutBatchSize: 32 does not divide the share of each of 4 GPUs in batchSize 64; "
                "use 1, 2, 4, 8 or 16"
            ],
        ),
    ],
    ids=str,
)
def test_what_several_gpus_can_share(changed: Change, changes: dict[str, Any], lines: list[str]) -> None:
    assert [str(problem) for problem in problems(RLHFRun.model_validate(changed(changes)).spec)] == lines
