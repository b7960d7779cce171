"""Documents that are wrong in one way each, and the line that each of them gets."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf_api.errors import UserError
from rlhf_api.parse import parse_run
from rlhf_api.run import RLHFRun

Change = Callable[[dict[str, Any]], dict[str, Any]]

WRONG = yaml.safe_load(Path(__file__).with_name("wrong.yaml").read_text())


@pytest.mark.parametrize("case", WRONG, ids=[", ".join(case["change"]) for case in WRONG])
def test_a_wrong_document_gets_this_line(changed: Change, case: dict[str, Any]) -> None:
    changes = {path: ... if value == "..." else value for path, value in case["change"].items()}
    assert complaint(changed(changes)) == case["error"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model.source": "hf://" + "m" * 1030},
            f"spec.model.source: 'hf://{'m' * 54}… (1037 characters) should be at most 1024 characters",
        ),
        (
            {"/metadata.name": "r" * 53},
            f"metadata.name: '{'r' * 53}' has not the right form: Lower-case letters, digits and hyphens, 52 at most",
        ),
        (
            {"evaluate.scorers": [{"name": f"s{n}", "function": "m:f"} for n in range(9)]},
            "spec.evaluate.scorers: is a list; should be a list of at most 8",
        ),
    ],
    ids=["source", "name", "scorers"],
)
def test_what_is_too_long_is_told_shortly(changed: Change, changes: dict[str, Any], line: str) -> None:
    assert complaint(changed(changes)) == line


def test_the_document_that_is_changed_is_right(changed: Change) -> None:
    assert parse_run(changed({})).metadata.name == "reviews"


def test_every_problem_is_told_at_once(changed: Change) -> None:
    document = changed(
        {
            "model.source": ...,
            "sft.step": 3,
            "reward.steps": "many",
            "ppo.microBatchSize": 3,
            "gpu.count": 9,
            "reward.microBatchSize": 5,
        }
    )
    assert [line.split(": ")[0] for line in complaint(document).splitlines()] == [
        "spec.model.source",
        "spec.sft.step",
        "spec.reward.steps",
        # and, of rules that need none of the above:
        "spec.reward.microBatchSize",
        "spec.ppo.microBatchSize",
        "spec.gpu.count",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"data.preferences.chosenColum": "good", "data.preferences.chosenColumn": ...},
        {"data.preference": {"source": "file:///a.csv"}, "data.preferences": ...},
        {"ppo.batchSize": "64", "ppo.miniBatchSize": 5, "ppo.microBatchSize": 5},
        {"evaluate.scorers": [{"name": "A", "fitted": True}]},
    ],
    ids=str,
)
def test_a_wrong_field_is_not_blamed_twice(changed: Change, changes: dict[str, Any]) -> None:
    assert len(complaint(changed(changes)).splitlines()) == 1


@pytest.mark.parametrize("document", [None, 3, "text", ["spec"]])
def test_something_else_than_a_mapping_is_named(document: Any) -> None:
    with pytest.raises(UserError, match="write a mapping with apiVersion, kind, metadata and spec"):
        parse_run(document)


def test_a_run_survives_the_round_trip(changed: Change) -> None:
    run = parse_run(
        changed({"ppo.missingEosPenalty": None, "ppo.lambda": 0.9, "placement.tolerations": [{"key": "a"}]})
    )
    document = run.model_dump(mode="json", by_alias=True)
    assert RLHFRun.model_validate(document) == run
    assert run.spec.ppo.missing_eos_penalty is None
    assert run.spec.ppo.gae_lambda == 0.9


keys = st.text(max_size=8) | st.integers() | st.none() | st.booleans()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=4,
)
# fmt: off
PATHS = [
    "model", "model.source", "data", "data.sft", "data.sft.where", "data.prompts.rows", "data.preferences.chosenLabel",
    "lora.targetModules", "lora.layers", "ppo", "ppo.miniBatchSize", "ppo.adaptiveKl", "evaluate.scorers",
    "reward.classifier", "gpu.memory", "seed", "placement.tolerations", "/metadata", "/metadata.name", "/status",
    "/spec",
]
# fmt: on


@given(path=st.sampled_from(PATHS), value=json_values)
def test_whatever_stands_in_a_field_is_parsed_or_refused_with_its_path(changed: Change, path: str, value: Any) -> None:
    document = changed({path: value})
    before = copy.deepcopy(document)
    try:
        parse_run(document)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith(("spec", "metadata", "status", "apiVersion", "kind")) for line in lines)
    assert repr(document) == repr(before)


def complaint(document: dict[str, Any]) -> str:
    """What parse_run says of a document that is wrong."""
    with pytest.raises(UserError) as caught:
        parse_run(document)
    return str(caught.value)
