"""Weights & Biases and MLflow get a stage's curve, and what they refuse or lose is said.

Both are an optional extra that the locked environment leaves out, so what the stage asks of them is recorded by small
modules with the same functions and parameters. Where a package is installed, its own offline mode is tested too.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from stage_runs import StageRuns

from rlhf_api.errors import UserError
from rlhf_api.run import Reward
from rlhf_api.run import Tracking as Wanted
from rlhf_api.stage import StageConfig
from rlhf_pipeline.tracking import METRICS_FILE, Tracking

WANDB = """
calls, refusal = [], None
class errors:
    class Error(Exception): pass
    class UsageError(Error): pass
class Run:
    def log(self, data, step=None): calls.append(("log", step, data))
    def finish(self): calls.append(("finish",))
def init(*, project, name, group, id, resume, dir, config):
    if refusal: raise errors.UsageError(refusal)
    calls.append(("init", locals()))
    return Run()
"""
MLFLOW = """
calls, refusals = [], {}
class exceptions:
    class MlflowException(Exception): pass
def _record(name, *values):
    if name in refusals: raise exceptions.MlflowException(refusals[name])
    calls.append((name, *values))
def set_tracking_uri(uri): _record("set_tracking_uri", uri)
def set_experiment(name): _record("set_experiment", name)
class Started:
    def __init__(self, run_id, tags): self.info, self.tags, self.run_id = self, tags, run_id
runs = []
def search_runs(*, experiment_names, filter_string, max_results, output_format):
    assert output_format == "list"
    return [run for run in runs if all(f"`{k}` = '{v}'" in filter_string for k, v in run.tags.items())][:max_results]
def start_run(*, run_id=None, run_name=None, tags=None):
    _record("start_run", run_id or run_name)
    if run_id is None: runs.append(Started(f"id-{len(runs)}", tags))
def log_metrics(metrics, step=None): _record("log_metrics", step, metrics)
def end_run(): _record("end_run")
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> Iterator[ModuleType]:
    folder.mkdir()
    (folder / f"{name}.py").write_text(source)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module(name)
    sys.modules.pop(name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    yield from stand_in(monkeypatch, tmp_path / "modules", "wandb", WANDB)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the tracker sets it for the process otherwise
    yield from stand_in(monkeypatch, tmp_path / "modules", "mlflow", MLFLOW)


def config(root: Path, **tracking: str) -> StageConfig:
    plain = StageRuns(root).config("reward", {}, reward=Reward(function="a:b"), seed=7)
    return plain.model_copy(update={"tracking": Wanted(**tracking)})


def logs(root: Path) -> Path:
    return root / "work" / "artifact" / "logs"


def lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (logs(root) / METRICS_FILE).read_text().splitlines()]


def track(config: StageConfig, root: Path, *steps: int) -> None:
    tracking = Tracking(config, logs(root))
    for step in steps:
        tracking.log(step, {"loss": 1 / step})
    tracking.close()


def test_weights_and_biases_gets_the_curve_under_the_names_of_run_and_stage(wandb: ModuleType, tmp_path: Path) -> None:
    wanted = config(tmp_path, wandb_project="films")
    track(wanted, tmp_path, 1, 2)
    (_, opened), *rest = wandb.calls
    assert (opened["project"], opened["group"], opened["name"]) == ("films", "test", "test/reward")
    assert opened["config"]["reward"]["function"] == "a:b"
    assert opened["config"]["seed"] == 7
    assert Path(opened["dir"]) == tmp_path / "work"
    assert rest == [("log", 1, {"loss": 1.0}), ("log", 2, {"loss": 0.5}), ("finish",)]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def another(config: StageConfig) -> StageConfig:
    """The same stage with another output."""
    return config.model_copy(update={"output": config.output.model_copy(update={"digest": "f" * 64})})


def test_a_restarted_stage_continues_its_curve(wandb: ModuleType, tmp_path: Path) -> None:
    wanted = config(tmp_path, wandb_project="films")
    track(wanted, tmp_path, 1)
    track(wanted, tmp_path, 2)
    track(another(wanted), tmp_path, 1)
    first, second, third = (call[1] for call in wandb.calls if call[0] == "init")
    assert first["id"] == second["id"] != third["id"]
    assert first["resume"] == "allow"


def test_weights_and_biases_that_refuses_is_an_error(wandb: ModuleType, tmp_path: Path) -> None:
    wandb.refusal = "no API key configured"
    with pytest.raises(UserError, match=r"tracking\.wandbProject: .*no API key configured.*WANDB_API_KEY, or remove"):
        track(config(tmp_path, wandb_project="films"), tmp_path, 1)


def test_mlflow_gets_the_curve_in_an_experiment_of_the_run(mlflow: ModuleType, tmp_path: Path) -> None:
    track(config(tmp_path, mlflow_uri="http://mlflow:5000"), tmp_path, 1, 2)
    assert mlflow.calls == [
        ("set_tracking_uri", "http://mlflow:5000"),
        ("set_experiment", "test"),
        ("start_run", "reward"),
        ("log_metrics", 1, {"loss": 1.0}),
        ("log_metrics", 2, {"loss": 0.5}),
        ("end_run",),
    ]


def test_a_restarted_stage_continues_its_mlflow_run(mlflow: ModuleType, tmp_path: Path) -> None:
    wanted = config(tmp_path, mlflow_uri="http://mlflow:5000")
    track(wanted, tmp_path, 1)
    track(wanted, tmp_path, 2)
    track(another(wanted), tmp_path, 1)
    assert [call[1] for call in mlflow.calls if call[0] == "start_run"] == ["reward", "id-0", "reward"]


@pytest.mark.parametrize("call", ["set_experiment", "start_run"])
def test_mlflow_that_is_not_there_at_the_start_is_an_error(mlflow: ModuleType, tmp_path: Path, call: str) -> None:
    mlflow.refusals[call] = "connection refused\nand a long trace"
    with pytest.raises(
        UserError, match=r"tracking\.mlflowUri: no MLflow at http://x:1 \(connection refused\); correct"
    ):
        track(config(tmp_path, mlflow_uri="http://x:1"), tmp_path, 1)


def test_mlflow_that_goes_away_costs_its_curve_alone(
    mlflow: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = Tracking(config(tmp_path, mlflow_uri="http://x:1"), logs(tmp_path))
    tracking.log(1, {"loss": 1.0})
    mlflow.refusals |= {"log_metrics": "connection refused", "end_run": "connection refused"}
    tracking.log(2, {"loss": 0.5})
    tracking.close()
    assert "MLflow took no metrics at step 2: connection refused" in capsys.readouterr().err
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 0.5]


@pytest.mark.parametrize("module", ["wandb", "mlflow"])
def test_a_stage_that_asks_for_no_tracker_imports_none(
    request: pytest.FixtureRequest, tmp_path: Path, module: str
) -> None:
    calls = request.getfixturevalue(module).calls
    track(config(tmp_path), tmp_path, 1)
    assert calls == []


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_weights_and_biases_offline_keeps_the_curve_in_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "work").mkdir()
    track(config(tmp_path, wandb_project="films"), tmp_path, 1, 2)
    (record,) = (tmp_path / "work" / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss" in record.read_bytes()


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
def test_mlflow_in_a_folder_keeps_one_curve_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    wanted = config(tmp_path, mlflow_uri=f"file://{tmp_path}/mlruns")
    track(wanted, tmp_path, 1)
    track(wanted, tmp_path, 2)
    (curve,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    assert [line.split()[1:] for line in curve.read_text().splitlines()] == [["1.0", "1"], ["0.5", "2"]]
