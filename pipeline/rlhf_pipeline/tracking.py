"""Metrics over steps: logs/metrics.jsonl and TensorBoard always, Weights & Biases and MLflow when asked for."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rlhf_api.errors import UserError
from rlhf_api.stage import StageConfig

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
OUTPUT_TAG = "rlhf.output"


class _Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Tracking:
    """Every tracker of one stage. Opened at the first metric: a resumed stage restores its logs before that."""

    def __init__(self, config: StageConfig, logs: Path) -> None:
        self._config, self._logs = config, logs
        self._sinks: list[_Sink] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record. Raises UserError if a tracker that the run asks for is not installed."""
        if self._sinks is None:
            self._sinks = self._open()
        for sink in self._sinks:
            sink.log(step, metrics)

    def flush(self) -> None:
        """Bring everything logged so far into the files below logs/."""
        for sink in self._sinks or []:
            sink.flush()

    def close(self) -> None:
        """Flush everything to its file or server. A later log() opens the files again and appends."""
        for sink in self._sinks or []:
            sink.close()
        self._sinks = None

    def _open(self) -> list[_Sink]:
        self._logs.mkdir(parents=True, exist_ok=True)
        sinks: list[_Sink] = [_Lines(self._logs / METRICS_FILE), _TensorBoard(self._logs / TENSORBOARD)]
        try:
            if self._config.tracking.wandb_project:
                sinks.append(_WandB(self._config, self._logs))
            if self._config.tracking.mlflow_uri:
                sinks.append(_MLflow(self._config))
        except UserError:
            for sink in sinks:
                sink.close()
            raise
        return sinks


class _Lines:
    """{"step": …, "time": Unix seconds, metric: number or null where it is not finite} a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()  # the report of a running stage reads it

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        # tensorboard's own writer: torch's would import torch into stages that do without it.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: StageConfig, logs: Path) -> None:
        wandb = _import("wandb", "tracking.wandbProject")
        try:
            self._run = wandb.init(
                project=config.tracking.wandb_project,
                name=f"{config.run.name}/{config.stage}",
                group=config.run.name,
                id=f"{config.stage}-{config.output.digest[:24]}",  # a restarted stage continues its curve
                resume="allow",
                dir=logs.parent.parent,
                config=config.settings.model_dump(mode="json", by_alias=True, exclude_none=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking.wandbProject: Weights & Biases refused ({error}); set WANDB_API_KEY, or remove the field"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Its own thread sends."""

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A tracking server that goes away during training costs its curve, not the training."""

    def __init__(self, config: StageConfig) -> None:
        self._mlflow = _import("mlflow", "tracking.mlflowUri")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its default waits for minutes
        self._mlflow.set_tracking_uri(config.tracking.mlflow_uri)
        try:
            self._mlflow.set_experiment(config.run.name)
            # A restarted stage continues its curve.
            started = self._mlflow.search_runs(
                experiment_names=[config.run.name],
                filter_string=f"tags.`{OUTPUT_TAG}` = '{config.output.digest}'",
                max_results=1,
                output_format="list",
            )
            if started:
                self._mlflow.start_run(run_id=started[0].info.run_id)
            else:
                self._mlflow.start_run(run_name=config.stage, tags={OUTPUT_TAG: config.output.digest})
        except self._mlflow.exceptions.MlflowException as error:
            raise UserError(
                f"tracking.mlflowUri: no MLflow at {config.tracking.mlflow_uri} ({str(error).splitlines()[0][:200]}); "
                "correct the field or remove it"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._mlflow.log_metrics(dict(metrics), step=step)
        except self._mlflow.exceptions.MlflowException as error:
            print(f"warning: MLflow took no metrics at step {step}: {error}", file=sys.stderr)

    def flush(self) -> None:
        """Every call sends."""

    def close(self) -> None:
        try:
            self._mlflow.end_run()
        except self._mlflow.exceptions.MlflowException as error:
            print(f"warning: MLflow did not end its run: {error}", file=sys.stderr)


def _import(module: str, field: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{field}: the package {module} is not installed here; install rlhf-operator[tracking] or remove the field"
        ) from error
