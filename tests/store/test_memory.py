"""A file of 1 GiB passes through in bounded memory: measured as the peak of a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_api.stage import StoreConfig

SIZE = 1 << 30
BOUND = 200 << 20  # bytes over what the process takes before the transfer

TRANSFER = """
import resource, sys
from pathlib import Path
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import open_artifacts
artifacts = open_artifacts(StoreConfig.model_validate_json(sys.argv[1]))
ref, folder = ArtifactRef(kind="model", digest="a" * 64), Path(sys.argv[2])
artifacts.find(ref)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[3] == "up":
    writer = artifacts.writer(ref, "1")
    writer.add_file("weights", folder / "weights")
    writer.commit({})
else:
    assert artifacts.fetch(ref, folder / "out").joinpath("weights").stat().st_size == 1 << 30
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_large_file_passes_in_bounded_memory(store: StoreConfig, tmp_path: Path) -> None:
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(SIZE)  # a hole: the disk is not what is measured
    for way in ("up", "down"):
        ran = subprocess.run(
            [sys.executable, "-c", TRANSFER, store.model_dump_json(), tmp_path, way],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert int(ran.stdout) < BOUND, f"{way}: {int(ran.stdout) >> 20} MiB over the baseline"
    shutil.rmtree(tmp_path)  # gigabytes: not to be kept until the next run
