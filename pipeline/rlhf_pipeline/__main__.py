"""The stage process: `python -m rlhf_pipeline --config stage.json --work DIR --result FILE`.

In a pod the config is `env:RLHF_STAGE_CONFIG`, the result /dev/termination-log.
"""

import argparse
import importlib
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from rlhf_api.errors import RLHFError, UserError
from rlhf_api.names import ENV_METRICS_PORT, ENV_RANKS, EXIT_CODES, EXIT_INTERRUPTED, EXIT_OK
from rlhf_api.stage import Program, StageConfig, StageFailure, StageResult
from rlhf_pipeline.checkpoints import RESTORED
from rlhf_pipeline.failures import classify
from rlhf_pipeline.rank_processes import COMMAND, RankProcesses, tie_to_parent, trace_of
from rlhf_pipeline.ranks import ALONE, Ranks
from rlhf_pipeline.result_file import write_result
from rlhf_pipeline.stage_process import Interrupted, Stage, surroundings
from rlhf_store.artifacts import STAGE_PATIENCE, Manifest, open_artifacts

# Imported when run: each brings its own heavy libraries.
PROGRAMS: dict[Program, str] = {
    "import-model": "rlhf_pipeline.importing:import_model",
    "import-data": "rlhf_pipeline.data:import_table",  # without torch, which takes longer than most tables
    "sft": "rlhf_pipeline.sft:run",
    "merge": "rlhf_pipeline.merge:run",
    "reward": "rlhf_pipeline.reward:run",
    "ppo": "rlhf_pipeline.ppo:run",
    "evaluate": "rlhf_pipeline.evaluate:run",
}
TRAINING: tuple[Program, ...] = ("sft", "reward", "ppo")  # what several GPUs share

# A stage's log is for what went wrong and for a line now and then of how far it is, not for bars of libraries.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
# What a GPU's memory is budgeted by: without it, blocks that are too small for the next batch stay reserved.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
# Nothing here is compiled by torch, but bitsandbytes asks for it when imported: its compiler takes 2 s to load.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = COMMAND) -> int:
    """Run one stage and write its result. Returns the exit code.

    command: what starts the ranks, where there are several.
    """
    parser = argparse.ArgumentParser(prog="python -m rlhf_pipeline", description=__doc__)
    parser.add_argument(
        "--config", required=True, help="StageConfig as JSON: a file, or env:NAME, an environment variable"
    )
    parser.add_argument("--work", type=Path, required=True, help="working folder; a restarted stage may reuse it")
    parser.add_argument("--result", type=Path, required=True, help="where the StageResult goes")
    parser.add_argument("--rank", type=int, help="given by a stage process on several GPUs to those it starts")
    parser.add_argument("--parent", type=int, help="that process's id")
    options = parser.parse_args(arguments)
    if options.rank is not None:
        tie_to_parent(options.parent)
    for name, value in (QUIET | ALLOCATOR | EAGER).items():
        os.environ.setdefault(name, value)
    began = time.monotonic()
    result, code = _outcome(options, command)
    write_result(options.result, result.model_copy(update={"seconds": round(time.monotonic() - began, 3)}))
    return code


def _outcome(options: argparse.Namespace, command: Sequence[str]) -> tuple[StageResult, int]:
    config_from, work, rank = str(options.config), Path(options.work), options.rank
    name, stage = "", None
    try:
        # Before anything slow: the first process of a container ignores a signal that it does not handle.
        signal.signal(signal.SIGTERM, _stop_at_once)
        config = _read_config(config_from, os.environ)
        name = config.stage
        artifacts = open_artifacts(config.store, STAGE_PATIENCE)
        manifest = artifacts.find(config.output)
        if manifest is None:
            work.mkdir(parents=True, exist_ok=True)
            size = _rank_count(config, os.environ)
            ranks = ALONE if rank is None else Ranks(rank, size)
            stage = Stage(config, artifacts, work, ranks)
            stage.handle_signals()
            if rank is None and size > 1:
                for each in config.inputs:  # once, for all ranks
                    stage.input(each)
                return RankProcesses(config, size, config_from, work, command).outcome()
            if rank is not None:
                ranks.join(config.gpu.count > 0)
            if not ranks.first:
                _program(config.program)(stage)
                return StageResult(stage=name), EXIT_OK
            if ENV_METRICS_PORT in os.environ:
                from rlhf_pipeline.metrics_server import serve_metrics

                serve_metrics(stage, os.environ)
            manifest = run_stage(stage)
        metrics = manifest.metadata.get("metrics", {})
        return StageResult(stage=name, artifact=manifest.ref, metrics=metrics), EXIT_OK
    except Exception as error:  # noqa: BLE001 - the process boundary: every failure gets a class and a result
        checkpoint = stage.checkpoints.newest if stage else None
        interrupted = isinstance(error, Interrupted) or (
            stage is not None and stage.stop_requested and not isinstance(error, RLHFError)
        )
        if interrupted:
            message = f"{str(error) or 'asked to stop'}; run again to continue"
            failure, code = (
                StageFailure(failure="infrastructure", message=message, checkpoint=checkpoint),
                EXIT_INTERRUPTED,
            )
        else:
            kind, message = classify(error, work)
            failure, code = StageFailure(failure=kind, message=message, checkpoint=checkpoint), EXIT_CODES[kind]
        trace = traceback.format_exc() if code == EXIT_CODES["bug"] else ""
        if rank is None:
            print(f"{trace}{name or config_from}: {failure.message}", file=sys.stderr)
        else:
            trace_of(options.result).write_text(trace)
        return StageResult(stage=name, failure=failure), code


def _rank_count(config: StageConfig, environment: Mapping[str, str]) -> int:
    if config.program not in TRAINING:
        return 1
    return config.gpu.count or int(environment.get(ENV_RANKS) or 1)


def run_stage(stage: Stage) -> Manifest:
    """Run the stage's program, upload its output and commit it; returns the manifest that counts."""
    began = time.monotonic()
    stage.progress.update(phase="loading")  # the program's libraries, which take seconds
    metrics = _checked(_program(stage.config.program)(stage), stage.config.stage)
    stage.progress.update(phase="committing")
    stage.close()
    stage.writer.add_folder(stage.output, settled=True)
    manifest = stage.writer.commit(
        {
            "metrics": metrics,
            "seconds": round(time.monotonic() - began, 3),
            "config": stage.config.model_dump(mode="json", by_alias=True, exclude_none=True),
            "inputs": {name: str(ref) for name, ref in stage.config.inputs.items()},
            **surroundings(),
        }
    )
    stage.artifacts.tidy(manifest)
    for folder in ("inputs", "output", RESTORED):
        shutil.rmtree(stage.work / folder, ignore_errors=True)
    return manifest


def _stop_at_once(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name} before it began")


def _read_config(config_from: str, environment: Mapping[str, str]) -> StageConfig:
    scheme, _, name = config_from.partition(":")
    try:
        document = environment[name] if scheme == "env" else Path(config_from).read_bytes()
        return StageConfig.model_validate_json(document)
    except KeyError:
        raise UserError(f"--config {config_from}: the environment has no variable {name!r}; set it to JSON") from None
    except OSError as error:
        raise UserError(f"--config {config_from}: cannot be read ({error.strerror}); correct the path") from error
    except ValidationError as error:
        first: Any = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{config_from}: {field}: {first['msg']}; it is written by the operator of the same version"
        ) from error


def _program(name: Program) -> Callable[[Stage], dict[str, float]]:
    module, function = PROGRAMS[name].split(":")
    program: Callable[[Stage], dict[str, float]] = getattr(importlib.import_module(module), function)
    return program


def _checked(metrics: dict[str, float], stage: str) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RLHFError(f"{stage}: its metric {name} is {value}; leave out what cannot be computed")
    return {name: float(value) for name, value in metrics.items()}


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # the result is written: taking torch apart takes a second and can only go wrong
