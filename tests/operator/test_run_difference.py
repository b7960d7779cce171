"""In which fields a file's run differs from the one in the cluster."""

from typing import Any

import pytest

from rlhf_api.parse import parse_run
from rlhf_api.run import RLHFRun
from rlhf_operator.run_difference import differences

SHORT = {
    "model": {"source": "hf://owner/model"},
    "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
    "reward": {"function": "module:callable"},
}


def run(labels: dict[str, str] | None = None, **spec: Any) -> RLHFRun:
    metadata = {"name": "tiny", **({"labels": labels} if labels else {})}
    return parse_run({"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": metadata, "spec": SHORT | spec})


def test_a_default_that_is_written_out_is_no_difference() -> None:
    assert differences(run(seed=0, ppo={}), run()) == {}


def test_suspend_is_no_difference() -> None:
    assert differences(run(suspend=True), run()) == {}


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [
        ({"seed": 7}, {}, {"spec.seed": ("7", "0")}),
        ({}, {"activeDeadlineSeconds": 60}, {"spec.activeDeadlineSeconds": ("not set", "60")}),
        (
            {"placement": {"nodeSelector": {"disk": "fast"}}},
            {"placement": {"nodeSelector": {"zone": "a"}}},
            {
                "spec.placement.nodeSelector.disk": ("fast", "not set"),
                "spec.placement.nodeSelector.zone": ("not set", "a"),
            },
        ),
        (
            {"placement": {"tolerations": [{"operator": "Exists"}]}},
            {},
            {"spec.placement.tolerations": ('[{"operator": "Exists"}]', "[]")},
        ),
    ],
    ids=["value", "removed", "mapping", "list"],
)
def test_a_field_that_differs_is_told_with_both_values(asked: Any, there: Any, found: Any) -> None:
    assert differences(run(**asked), run(**there)) == found


def test_of_labels_those_asked_for_count() -> None:
    queue = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert differences(run(), run(labels=queue)) == {}
    assert differences(run(labels=queue), run()) == {"metadata.labels.kueue.x-k8s.io/queue-name": ("gpus", "not set")}
