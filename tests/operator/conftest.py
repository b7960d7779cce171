"""A small run on real files, and a runner whose stages are tiny."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.run import RLHFRun, RunStatus
from rlhf_operator.local import Home, LocalRunner

TINY_STAGES = Path(__file__).with_name("tiny_stages.py")


def document(folder: Path, **spec: Any) -> dict[str, Any]:
    """An RLHFRun whose sources are files in `folder`; keyword arguments replace parts of its spec."""
    source = (folder / "reviews.csv").as_uri()
    data = {
        "sft": {"source": source},
        "preferences": {"source": source, "textColumn": "text", "labelColumn": "label", "chosenLabel": 1},
        "prompts": {"source": source, "promptColumn": "text"},
        "evaluation": {"source": source},
    }
    return {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "RLHFRun",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"source": (folder / "model").as_uri()}, "data": data, **spec},
    }


class Bench:
    """One working folder with its sources, the tiny stages' script, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / ".rlhf")
        self.script = folder / "script.json"
        self.script.write_text("{}")
        (folder / "reviews.csv").write_text("text,label\nfine,1\nbad,0\n")
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(TINY_STAGES), "--script", str(self.script)]

    def document(self, **spec: Any) -> dict[str, Any]:
        return document(self.folder, **spec)

    def resource(self, **spec: Any) -> RLHFRun:
        return RLHFRun.model_validate(self.document(**spec))

    def misbehave(self, **words: list[str]) -> None:
        """Script the attempts to come, stage by stage (import_model for import-model)."""
        self.script.write_text(json.dumps({stage.replace("_", "-"): word for stage, word in words.items()}))
        self.script.with_suffix(".log").unlink(missing_ok=True)

    def began(self) -> list[str]:
        """The stages that were started since misbehave(), oldest first."""
        log = self.script.with_suffix(".log")
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def forget(self) -> None:
        """Empty the record that began() reads."""
        self.script.with_suffix(".log").unlink(missing_ok=True)

    def runner(self, clock: Callable[[], float] = time.time, **spec: Any) -> LocalRunner:
        return LocalRunner(self.resource(**spec), self.home.default_store(), self.home, self.command, clock)

    def run(self, clock: Callable[[], float] = time.time, **spec: Any) -> RunStatus:
        return self.runner(clock, **spec).run(lambda *_: None)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def states(status: RunStatus) -> dict[str, str]:
    """Stage -> state."""
    return {stage.name: stage.state for stage in status.stages}


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return once `true()`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
