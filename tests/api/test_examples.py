"""The examples that people copy are valid, and are what they say."""

from pathlib import Path

import pytest

from rlhf_api.run import RLHFRun
from rlhf_operator.load import load_run

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests/examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_named_after_its_file(path: Path) -> None:
    run = load_run(path)
    assert run.metadata.name == path.stem
    assert RLHFRun.model_validate_json(run.model_dump_json(by_alias=True)) == run


def test_the_demo_runs_on_a_cpu_from_packages_and_is_judged_by_what_training_never_saw() -> None:
    spec = load_run(next(path for path in EXAMPLES if path.stem == "positive-reviews")).spec
    assert (spec.gpu.count, spec.quantization.type) == (0, "none")
    data = spec.data
    assert data.sft
    assert data.preferences
    assert data.evaluation
    tables = [data.sft, data.preferences, data.prompts, data.evaluation]
    assert all(source.startswith("package://") for source in [spec.model.source, *(table.source for table in tables)])
    last = max(int(str(table.rows).split(":")[1].rstrip("%")) for table in tables[:3])
    assert int(str(data.evaluation.rows).split("%")[0]) >= last
    assert {(scorer.name, scorer.fitted) for scorer in spec.evaluate.scorers} == {
        ("vader", False),
        ("classifier", True),
    }
