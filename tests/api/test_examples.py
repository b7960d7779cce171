"""The examples that people copy are valid, and are what they say."""

from pathlib import Path

import pytest
import yaml

from rlhf_api.budget import budget, shape_of
from rlhf_api.names import LABEL_QUEUE
from rlhf_api.run import RLHFRun, RunStatus, StageStatus
from rlhf_operator.forks import forked
from rlhf_operator.load import load_run
from rlhf_operator.stages import chain

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests/examples").glob("*.yaml"))
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32768, "max_position_embeddings": 32768,
}  # fmt: skip


def example(name: str) -> RLHFRun:
    return load_run(next(path for path in EXAMPLES if path.stem == name))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_named_after_its_file(path: Path) -> None:
    run = load_run(path)
    assert run.metadata.name == path.stem
    assert RLHFRun.model_validate_json(run.model_dump_json(by_alias=True)) == run


def test_the_demo_runs_on_a_cpu_from_packages_and_is_judged_by_what_training_never_saw() -> None:
    spec = example("positive-reviews").spec
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


def test_the_fork_runs_ppo_and_evaluate_alone() -> None:
    made = chain(example("positive-reviews"), {})
    done = [StageStatus(name=link.name, state="Succeeded", artifact=str(link.output)) for link in made]
    fork, hold = forked(example("fork"), RunStatus(stages=done))
    assert hold is None
    links = zip(made, chain(fork, {}), strict=True)
    assert [ours.name for ours, theirs in links if ours.output != theirs.output] == ["ppo", "evaluate"]


def test_the_kueue_example_names_the_queue_that_is_beside_it() -> None:
    metadata = example("kueue").metadata
    queues = (Path(__file__).parents[2] / "manifests/kueue/queue.yaml").read_text()
    [queue] = [each for each in yaml.safe_load_all(queues) if each["kind"] == "LocalQueue"]
    assert metadata.model_extra is not None
    assert metadata.model_extra["labels"][LABEL_QUEUE] == queue["metadata"]["name"]


def test_the_7b_example_fits_a_24_gb_card() -> None:
    shape = shape_of(MISTRAL_7B)
    assert shape is not None
    found = budget(shape, example("7b").spec)
    assert 0.4 < found.peak.total / found.available < 0.9
