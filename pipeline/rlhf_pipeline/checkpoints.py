"""Checkpoints of a stage: in the store beside its artifact, each with a manifest of its own, written last."""

import shutil
import sys
import time
from pathlib import Path

from pydantic import Field, ValidationError

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import IntegrityError
from rlhf_api.layout import CHECKPOINTS, MANIFEST, artifact_prefix, attempt_prefix, checkpoint_prefix
from rlhf_api.run import Natural, Section
from rlhf_api.stage import ArtifactRef
from rlhf_pipeline.ranks import ALONE, Ranks
from rlhf_pipeline.tracking import Tracking
from rlhf_store.artifacts import Artifacts
from rlhf_store.manifest import ArtifactPath, FileEntry
from rlhf_store.transfer import download

KEPT = 2  # of one attempt: the newest, and one more should its bytes be damaged
STATE, OUTPUT = "state", "output"
RESTORED = "restored"  # in the working folder: the checkpoint a stage resumed from


class CheckpointManifest(Section):
    """What a whole checkpoint holds: state/ is the program's, output/ is the artifact so far."""

    step: Natural
    created_at: float = Field(description="Unix time.")
    files: dict[ArtifactPath, FileEntry]


class Checkpoints:
    """Saves and finds the checkpoints of one artifact, those of earlier attempts included.

    With several ranks the first one does it, and all of them must ask.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        ref: ArtifactRef,
        attempt: str,
        work: Path,
        output: Path,
        tracking: Tracking,
        ranks: Ranks = ALONE,
    ) -> None:
        self._objects = artifacts.objects
        self._ref, self._attempt = ref, attempt
        self._work, self._output = work, output
        self._tracking, self._ranks = tracking, ranks
        self.newest: str | None = None  # URL of the newest whole one that this process saved or resumed from

    def save(self, step: int, folder: Path) -> None:
        """Commit a folder, and the output so far, as the checkpoint of `step`; then drop all but the last two.

        Log a step's metrics before its checkpoint: a resumed stage starts from the log as it was saved.
        """
        if self._ranks.first:
            self._save(step, folder)
        self.newest = self._ranks.from_first(self.newest)

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint, with the output as it was then; None if there is none.

        A checkpoint with damaged bytes is passed over with a warning.
        """
        found = self._latest() if self._ranks.first else None
        found, self.newest = self._ranks.from_first((found, self.newest))
        return found

    def _save(self, step: int, folder: Path) -> None:
        self._tracking.flush()
        prefix = checkpoint_prefix(self._ref.kind, self._ref.digest, self._attempt, step)
        files = {}
        for name, root in ((STATE, folder), (OUTPUT, self._output)):
            for file in sorted(path for path in root.rglob("*") if path.is_file()):
                path = f"{name}/{file.relative_to(root).as_posix()}"
                digest = self._objects.put_file(prefix + path, file)
                files[path] = FileEntry(size=digest.size, sha256=digest.sha256)
        manifest = CheckpointManifest(step=step, created_at=time.time(), files=files)
        self._objects.put(prefix + MANIFEST, canonical_json(manifest.model_dump(mode="json", by_alias=True)))
        self.newest = f"{self._objects.url.rstrip('/')}/{prefix}"
        self._prune()

    def _latest(self) -> tuple[int, Path] | None:
        self._tracking.close()
        for manifest, prefix in sorted(self._whole(), key=lambda item: (item[0].step, item[0].created_at))[::-1]:
            folder = self._work / RESTORED
            shutil.rmtree(folder, ignore_errors=True)
            try:
                download(self._objects, prefix, manifest.files, folder, f"checkpoint {prefix}")
            except IntegrityError as error:
                print(f"warning: {error}; trying an older checkpoint", file=sys.stderr)
                continue
            self._restore_output(folder / OUTPUT)
            (folder / STATE).mkdir(parents=True, exist_ok=True)
            self.newest = f"{self._objects.url.rstrip('/')}/{prefix}"
            return manifest.step, folder / STATE
        return None

    def _whole(self) -> list[tuple[CheckpointManifest, str]]:
        found = []
        artifact = artifact_prefix(self._ref.kind, self._ref.digest)
        for attempt in self._objects.folders(artifact):
            checkpoints = f"{artifact}{attempt}/{CHECKPOINTS}/"
            for step in self._objects.folders(checkpoints):
                prefix = f"{checkpoints}{step}/"
                try:
                    found.append((CheckpointManifest.model_validate_json(self._objects.get(prefix + MANIFEST)), prefix))
                except KeyError:  # its writer died
                    continue
                except ValidationError as error:
                    print(f"warning: checkpoint {prefix} has a damaged manifest: {error}", file=sys.stderr)
        return found

    def _restore_output(self, saved: Path) -> None:
        shutil.rmtree(self._output, ignore_errors=True)
        self._output.mkdir(parents=True)
        if saved.is_dir():  # copies: large files of the checkpoint may be the store's own
            shutil.copytree(saved, self._output, dirs_exist_ok=True, copy_function=shutil.copyfile)

    def _prune(self) -> None:
        own = f"{attempt_prefix(self._ref.kind, self._ref.digest, self._attempt)}{CHECKPOINTS}/"
        for step in self._objects.folders(own)[:-KEPT]:
            prefix = f"{own}{step}/"
            self._objects.delete([prefix + MANIFEST])  # first, so that it is never half of a whole one
            self._objects.delete([info.key for info in self._objects.walk(prefix)])
