"""Where everything lives in the object store. Keys are relative to the store's prefix.

artifacts/{kind}/{digest}/manifest.json          the commit: written last, never overwritten
artifacts/{kind}/{digest}/{attempt}/{path}       the files it lists
artifacts/{kind}/{digest}/{attempt}/checkpoints/{step}/...   and manifest.json, a checkpoint's own commit
runs/{name}/...                                  what `rlhf status` and `rlhf report` read of a local run
"""

from typing import Final

MANIFEST: Final = "manifest.json"
ARTIFACTS: Final = "artifacts/"
CHECKPOINTS: Final = "checkpoints"
LOGS: Final = "logs/"  # paths under it hold times and rates: they do not count towards an artifact's content digest


def artifact_prefix(kind: str, digest: str) -> str:
    """The folder of one artifact, with its trailing slash."""
    return f"{ARTIFACTS}{kind}/{digest}/"


def manifest_key(kind: str, digest: str) -> str:
    """The object whose existence means that the artifact is whole."""
    return f"{artifact_prefix(kind, digest)}{MANIFEST}"


def attempt_prefix(kind: str, digest: str, attempt: str) -> str:
    """The folder one writer of the artifact writes to, with its trailing slash."""
    return f"{artifact_prefix(kind, digest)}{attempt}/"


def checkpoint_prefix(kind: str, digest: str, attempt: str, step: int) -> str:
    """The folder of one checkpoint of one writer, with its trailing slash. Steps sort as text."""
    return f"{attempt_prefix(kind, digest, attempt)}{CHECKPOINTS}/{step:08d}/"
