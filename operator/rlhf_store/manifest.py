"""The manifest: the one object whose existence makes an artifact whole."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from rlhf_api.canonical import canonical_json, sha256_of
from rlhf_api.layout import CHECKPOINTS, LOGS
from rlhf_api.run import Section
from rlhf_api.stage import ArtifactKind, ArtifactRef, Digest


def checked_path(path: str) -> str:
    """`path` itself if it is a plain relative path that stays inside its folder; raises ValueError otherwise."""
    parts = path.split("/")
    if not path or "\\" in path or any(ord(c) < 32 for c in path) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a relative path inside the artifact")
    if parts[0] == CHECKPOINTS:
        raise ValueError(f"{path!r}: {CHECKPOINTS}/ is kept for a stage's checkpoints")
    return path


ArtifactPath = Annotated[str, AfterValidator(checked_path)]


class FileEntry(Section):
    """One file: bytes and hex SHA-256."""

    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class Manifest(Section):
    """What an artifact holds, where its bytes lie, and how it came to be."""

    kind: ArtifactKind
    digest: Digest
    attempt: str = Field(description="The folder its files lie in: whose writer won.")
    created_at: float = Field(description="Unix time of the commit.")
    files: dict[ArtifactPath, FileEntry]
    content: Digest = Field(description="Digest over the files outside logs/: equal for equal results.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Metrics, seconds, versions, settings, inputs.")

    @model_validator(mode="after")
    def _content_matches(self) -> Self:
        if self.content != content_digest(self.files):
            raise ValueError("content is not the digest of files")
        return self

    @property
    def ref(self) -> ArtifactRef:
        """The artifact's address."""
        return ArtifactRef(kind=self.kind, digest=self.digest)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON. Raises ValueError if the metadata hold NaN or an infinity."""
        return canonical_json(self.model_dump(by_alias=True))  # mode="json" would turn NaN into null


def content_digest(files: dict[str, FileEntry]) -> str:
    """Hex SHA-256 over path, size and SHA-256 of every file outside logs/."""
    return sha256_of({path: [entry.size, entry.sha256] for path, entry in files.items() if not path.startswith(LOGS)})
