"""Runs single stages on small artifacts of a store in a folder, in this process or in one of their own."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_api.layout import artifact_prefix
from rlhf_api.names import STAGE_CONFIG_FILE, STAGE_RESULT_FILE
from rlhf_api.stage import ArtifactKind, ArtifactRef, Program, StageConfig, StageSettings, StoreConfig, stage_digest
from rlhf_pipeline.__main__ import run_stage
from rlhf_pipeline.stage_process import Stage
from rlhf_store.artifacts import Manifest, open_artifacts

OUTPUTS: dict[str, ArtifactKind] = {"sft": "sft-adapter", "reward": "reward-model", "ppo": "policy"}


class StageRuns:
    """A store below `root`, the artifacts put into it, and stages run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = StoreConfig(url=f"file://{root}/store")
        self.artifacts = open_artifacts(self.store)
        self._count = 0

    def put(self, kind: ArtifactKind, folder: Path) -> ArtifactRef:
        """Commit a folder as an artifact. The folder stays."""
        ref = ArtifactRef(kind=kind, digest=hashlib.sha256(str(folder).encode()).hexdigest())
        writer = self.artifacts.writer(ref, "1")
        writer.add_folder(folder)
        writer.commit({})
        return ref

    def put_tables(
        self, kind: ArtifactKind, train: dict[str, list[str]], held_out: dict[str, list[str]]
    ) -> ArtifactRef:
        """Commit train.parquet and heldout.parquet as an artifact."""
        folder = self.root / f"{kind}-{self._next()}"
        folder.mkdir(parents=True)
        for name, table in (("train", train), ("heldout", held_out)):
            pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / f"{name}.parquet")
        return self.put(kind, folder)

    def config(self, program: Program, inputs: dict[str, ArtifactRef], **settings: Any) -> StageConfig:
        """The document of a stage that runs on the CPU."""
        parsed = StageSettings(**settings)
        output = ArtifactRef(kind=OUTPUTS[program], digest=stage_digest(program, parsed, inputs))
        return StageConfig.model_validate(
            {
                "run": {"name": "test"},
                "stage": program,
                "program": program,
                "settings": parsed,
                "inputs": inputs,
                "output": output,
                "store": self.store,
                "gpu": {"count": 0},
            }
        )

    def stage(self, config: StageConfig) -> Stage:
        """A stage with a new working folder."""
        work = self.root / f"work-{self._next()}"
        work.mkdir(parents=True)
        return Stage(config, self.artifacts, work)

    def run(self, config: StageConfig) -> Manifest:
        """Run a stage to its commit, in this process."""
        stage = self.stage(config)
        try:
            return run_stage(stage)
        finally:
            stage.close()

    def start(self, config: StageConfig, work: Path | None = None) -> subprocess.Popen[bytes]:
        """Run a stage in a process of its own, in a new working folder unless one is given."""
        work = work or self.root / f"work-{self._next()}"
        work.mkdir(parents=True, exist_ok=True)
        (work / STAGE_CONFIG_FILE).write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        files = ["--config", work / STAGE_CONFIG_FILE, "--work", work, "--result", work / STAGE_RESULT_FILE]
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
        with (work / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "rlhf_pipeline", *map(str, files)], env=environment, stdout=log, stderr=log
            )

    def kill_after_checkpoint(self, config: StageConfig, seconds: float = 120.0) -> None:
        """Start a stage and kill -9 it once its first checkpoint is whole."""
        process = self.start(config)
        try:
            deadline = time.monotonic() + seconds
            while not self.checkpoints(config):
                assert process.poll() is None, "the stage ended before its first checkpoint"
                assert time.monotonic() < deadline, "no checkpoint in time"
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        assert self.artifacts.find(config.output) is None, "the stage ended before it could be killed"

    def checkpoints(self, config: StageConfig) -> list[Path]:
        """Manifests of the stage's whole checkpoints."""
        folder = self.root / "store" / artifact_prefix(config.output.kind, config.output.digest)
        return sorted(folder.glob("*/checkpoints/*/manifest.json"))

    def fetch(self, manifest: Manifest) -> Path:
        """The files of an artifact in a new folder."""
        return self.artifacts.fetch(manifest.ref, self.root / f"fetched-{self._next()}")

    def _next(self) -> int:
        self._count += 1
        return self._count
