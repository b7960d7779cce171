"""The examples that people copy are valid, and are what they say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_api.budget import budget, shape_of
from rlhf_api.names import LABEL_QUEUE, STAGE_CONTAINER
from rlhf_api.quantity import bytes_of
from rlhf_api.run import RLHFRun, RunStatus, StageStatus
from rlhf_operator.forks import forked
from rlhf_operator.jobs import stage_job
from rlhf_operator.load import load_run
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.stages import chain

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests/examples").glob("*.yaml"))
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32768, "max_position_embeddings": 32768,
}  # fmt: skip
GPT_NEOX_20B = {
    "model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "vocab_size": 50432, "max_position_embeddings": 2048,
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


@pytest.mark.parametrize(("name", "config"), [("7b", MISTRAL_7B), ("gpt-neox-20b", GPT_NEOX_20B)])
def test_every_stage_of_a_large_example_asks_for_the_disk_that_its_weights_take(
    name: str, config: dict[str, Any]
) -> None:
    shape, run = shape_of(config), example(name)
    assert shape
    weights = 2 * (shape.layers * shape.layer_weights + shape.embedding_weights)
    for link in chain(run, {}):
        pod = stage_job(run, link, 1, OperatorSettings(image="pipeline:1"), asked_at=0)["spec"]["template"]["spec"]
        [requests] = [each["resources"]["requests"] for each in pod["containers"] if each["name"] == STAGE_CONTAINER]
        models = 2 if link.name == "merge" else 1
        assert 1 < bytes_of(requests["ephemeral-storage"]) / (models * weights) < 1.6, link.name


def test_the_7b_example_fits_a_24_gb_card() -> None:
    shape = shape_of(MISTRAL_7B)
    assert shape is not None
    found = budget(shape, example("7b").spec)
    assert 0.4 < found.peak.total / found.available < 0.9
