"""The images hold what the locks pin, run as no root, and name one version of everything."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERFILES = sorted(ROOT.glob("images/*/Containerfile"))
LOCKS = sorted(ROOT.glob("requirements-*.lock"))
OF_THE_GPU = ("torch", "transformers", "peft", "trl", "triton")


def pinned(lock: Path) -> dict[str, str]:
    """Package -> version; every one with a hash."""
    entries = re.split(r"\n(?=\S)", "\n" + lock.read_text())
    found = {}
    for entry in entries:
        if match := re.match(r"([a-z0-9][a-z0-9._-]*)==([^\s;]+)", entry):
            assert "--hash=sha256:" in entry, f"{lock.name}: {match[1]} has no hash"
            found[match[1]] = match[2]
    return found


def argument(containerfile: Path, name: str) -> set[str]:
    return set(re.findall(rf"^ARG {name}=(\S+)$", containerfile.read_text(), re.MULTILINE))


def test_every_image_is_here() -> None:
    assert [path.parent.name for path in CONTAINERFILES] == ["minio", "operator", "pipeline"]


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if "build" not in lock.name and "demo" not in lock.name],
                         ids=lambda lock: lock.stem)  # fmt: skip
def test_an_image_installs_what_was_tested(lock: Path) -> None:
    whole = pinned(ROOT / "requirements.lock")
    part = pinned(lock)
    assert len(part) > 20
    assert {name: version for name, version in part.items() if whole.get(name) != version} == {}


def test_the_operators_image_has_no_torch_and_the_pipelines_has() -> None:
    operator = pinned(ROOT / "requirements-operator.lock")
    assert not [name for name in operator if name in OF_THE_GPU or name.startswith("nvidia-")]
    assert {"kopf", "kubernetes", "prometheus-client", "minio"} <= set(operator)
    for variant in ("cuda", "cpu"):
        assert {"torch", "transformers", "prometheus-client"} <= set(
            pinned(ROOT / f"requirements-pipeline-{variant}.lock")
        )
    assert "triton" not in pinned(ROOT / "requirements-pipeline-cpu.lock")


def test_the_build_tools_are_those_of_the_project() -> None:
    tools = pinned(ROOT / "requirements-build.lock")
    assert f"hatchling=={tools['hatchling']}" in (ROOT / "pyproject.toml").read_text()
    assert f"uv_version={tools['uv']}" in (ROOT / "hack/install.sh").read_text()


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.parent.name)
def test_an_image_runs_as_a_number_that_is_not_root(path: Path) -> None:
    last_stage = path.read_text().rsplit("\nFROM ", 1)[1]
    assert re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE) == ["65532:65532"]
    assert "org.opencontainers.image.revision=" in last_stage


def test_one_minio_is_tested_and_shipped() -> None:
    [version] = argument(ROOT / "images/minio/Containerfile", "MINIO")
    assert f"version={version}\n" in (ROOT / "hack/minio.sh").read_text()
