"""The dashboard for Grafana draws metrics that there are, and every one of the operator's."""

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

from rlhf_api import names
from rlhf_operator.operator_metrics import OperatorMetrics

FILE: Final = Path(__file__).parents[2] / "charts/rlhf-operator/dashboards/rlhf.json"
DASHBOARD: Final[dict[str, Any]] = json.loads(FILE.read_text())
SUFFIXES: Final = {"counter": ("_total",), "histogram": ("_bucket",), "gauge": ("",)}
STAGES: Final = {value for name, value in vars(names).items() if name.startswith("METRIC_")}
OPERATORS: Final = {
    family.name + suffix for family in OperatorMetrics().registry.collect() for suffix in SUFFIXES[family.type]
}


def expressions() -> list[str]:
    variables = [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    return variables + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\brlhf_(?:operator|stage)_\w+", expression))


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_drawn_exists(expression: str) -> None:
    assert metrics(expression)
    assert metrics(expression) <= STAGES | OPERATORS


def test_every_metric_of_the_operator_is_drawn() -> None:
    assert {name for expression in expressions() for name in metrics(expression)} >= OPERATORS


def test_panels_lie_beside_one_another() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    covered = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(ids)) == len(ids)
    assert len(set(covered)) == len(covered)
    assert max(x for x, _ in covered) < 24
