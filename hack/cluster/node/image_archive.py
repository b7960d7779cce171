"""Writes a folder as a container image of one layer, in the archive format that Docker, podman and containerd load.

usage: image_archive.py OUT.tar REFERENCE FOLDER [ENTRYPOINT ...]
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

CREATED = "2026-01-01T00:00:00Z"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def write_image(archive: Path, reference: str, folder: Path, entrypoint: list[str]) -> None:
    """Write the image `reference` of the files in `folder`, owned by root, to `archive`."""
    layer = archive.with_suffix(".layer")
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as tar:
        for child in sorted(folder.iterdir()):
            tar.add(child, arcname=child.name, filter=_owned_by_root)
    with layer.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": CREATED,
            "config": {"Env": [PATH], **({"Entrypoint": entrypoint} if entrypoint else {})},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "history": [{"created": CREATED, "created_by": "image_archive.py"}],
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [reference], "Layers": [f"{digest}.tar"]}]
    with tarfile.open(archive, "w") as tar:
        _add(tar, config_name, config)
        tar.add(layer, arcname=f"{digest}.tar")
        _add(tar, "manifest.json", json.dumps(manifest).encode())
    layer.unlink()


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    write_image(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
