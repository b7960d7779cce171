"""A small run on real files, and a runner whose stages are tiny."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.run import RLHFRun, RunStatus
from rlhf_operator.fingerprints import fingerprints
from rlhf_operator.local import Home, LocalRunner
from rlhf_operator.stages import chain
from rlhf_store.artifacts import open_artifacts

TINY_STAGES = Path(__file__).with_name("tiny_stages.py")
DRIVE = Path(__file__).with_name("drive.py")


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

    @property
    def sources(self) -> dict[str, Any]:
        """spec.data of a run that has every stage."""
        source = (self.folder / "reviews.csv").as_uri()
        return {
            "sft": {"source": source},
            "preferences": {"source": source, "textColumn": "text", "labelColumn": "label", "chosenLabel": 1},
            "prompts": {"source": source, "promptColumn": "text"},
            "evaluation": {"source": source},
        }

    def document(self, **spec: Any) -> dict[str, Any]:
        """An RLHFRun with five stages, none of them sft or merge; keyword arguments replace parts of its spec."""
        short = {
            "model": {"source": (self.folder / "model").as_uri()},
            "data": {"prompts": self.sources["prompts"]},
            "reward": {"function": "module:callable"},
        }
        return {
            "apiVersion": "rlhf.dev/v1alpha1",
            "kind": "RLHFRun",
            "metadata": {"name": "tiny"},
            "spec": {**short, **spec},
        }

    def write(self, **spec: Any) -> Path:
        """The run as a file."""
        path = self.folder / "run.json"
        path.write_text(json.dumps(self.document(**spec)))
        return path

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

    def have(self, *stages: str, report: Any = None, **spec: Any) -> None:
        """Commit these stages' artifacts, as an earlier run would have, with `report` as their report.json."""
        run = self.resource(**spec)
        artifacts = open_artifacts(self.home.default_store())
        for link in chain(run, fingerprints(run, self.home.fingerprint_cache)):
            if link.name in stages:
                writer = artifacts.writer(link.output, "earlier-1")
                writer.add_bytes("report.json", json.dumps(report or {}).encode())
                writer.add_bytes("logs/report.html", b"<title>tiny report</title>")
                writer.commit({"metrics": {"loss": 0.25}, "seconds": 0.5})

    def drive(self, **spec: Any) -> "subprocess.Popen[str]":
        """`rlhf run` in a process of its own."""
        drive = [sys.executable, str(DRIVE), str(self.write(**spec)), *self.command]
        return subprocess.Popen(
            drive, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def wait_for_step(self, stage: str, step: int) -> None:
        """Return once the stage has counted beyond `step`."""
        work = self.home.run_folder("tiny").work(stage) / "step"
        self.wait_for(lambda: work.exists() and int(work.read_text() or 0) > step)

    @staticmethod
    def wait_for(true: Callable[[], bool], seconds: float = 30.0) -> None:
        """Return once `true()`; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)

    @staticmethod
    def states(status: RunStatus) -> dict[str, str]:
        """Stage -> state."""
        return {stage.name: stage.state for stage in status.stages}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
