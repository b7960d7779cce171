"""Where models and tables come from: a folder, an installed package, an object store or the hub, as files by name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from rlhf_api.errors import StoreError, UserError
from rlhf_api.package_source import package_path
from rlhf_api.stage import StoreConfig

WEIGHTS = ".safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
BLOCK = 16 * 2**20


class Files(Protocol):
    """The files of one source. Names are relative to it, with slashes."""

    sizes: dict[str, int]
    """Bytes of each file."""
    version: str | None
    """The commit, where the source has one."""

    def fetch(self, name: str, into: Path) -> Path:
        """A local copy of one file: the original where it is local, otherwise written below `into`."""


class RangedFiles(Files, Protocol):
    """Files of which a part can be read without the rest."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """The bytes [start, start + length) of one file."""


def open_files(source: str, revision: str | None, store: StoreConfig | None = None) -> Files:
    """The files under `source`, a folder. `store` tells the endpoint and region of an s3:// source.

    Raises UserError if there is no such place, StoreError if it could not be reached.
    """
    scheme, _, path = source.partition("://")
    match scheme:
        case "file":
            return LocalFiles(_local_folder(source, Path(unquote(path))))
        case "package":
            return LocalFiles(_local_folder(source, package_path("source", source)))
        case "s3":
            return BucketFiles(source, store)
        case "hf":
            return HubFiles(source, path, revision)
    raise UserError(f"source: {source} has an unknown scheme; use hf://, s3://, file:// or package://")


def fetch_file(source: str, revision: str | None, into: Path, store: StoreConfig | None = None) -> Path:
    """A local copy of the one file that `source` names. Raises UserError, with its neighbours, if there is none."""
    folder, _, name = source.rpartition("/")
    files = open_files(folder, revision, store)
    if name not in files.sizes:
        beside = ", ".join(sorted(files.sizes, key=lambda n: (n.count("/"), n))[:20]) or "nothing"
        raise UserError(f"source: {source} does not exist; {folder} has {beside}")
    return files.fetch(name, into)


def fetch_model(
    source: str, revision: str | None, into: Path, store: StoreConfig | None = None, field: str = "model.source"
) -> Path:
    """A local folder with a model's config, tokenizer and safetensors weights: the original where it is local.

    field: where the source stands in the run, for errors. Raises UserError if the weights are only there as pickles,
    which could run code.
    """
    files = open_files(source, revision, store)
    weights = weight_files(source, files, into, field)
    if isinstance(files, LocalFiles):
        return files.root
    for name in [*side_files(files), *weights]:
        files.fetch(name, into)
    return into


def weight_files(source: str, files: Files, work: Path, field: str = "model.source") -> list[str]:
    """Names of the safetensors files that make up the model, in the order of its index.

    Raises UserError if there are none, or if a file that the index lists is missing.
    """
    if INDEX in files.sizes:
        import json

        shards = sorted(set(json.loads(files.fetch(INDEX, work).read_text())["weight_map"].values()))
        if missing := [name for name in shards if name not in files.sizes]:
            raise UserError(f"{field}: {source} lacks {missing[0]}, which {INDEX} lists; copy the model again")
        return shards
    found = sorted(name for name in files.sizes if name.endswith(WEIGHTS) and "/" not in name)
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1:
        return found
    if found:
        raise UserError(f"{field}: {source} has {', '.join(found[:4])} but no {INDEX}; save the model again")
    pickles = sorted(name for name in files.sizes if name.endswith(PICKLES))
    if pickles:
        raise UserError(
            f"{field}: {source} has its weights only as {pickles[0]}, a format that can run code when it is read; "
            "load it once where you trust it and save it with save_pretrained(folder), which writes safetensors"
        )
    gguf = sorted(name for name in files.sizes if name.endswith(".gguf"))
    if gguf:
        raise UserError(f"{field}: {source} holds GGUF files; name one of them: {source}/{gguf[0]}")
    raise UserError(f"{field}: {source} has no *.safetensors file; it has {', '.join(sorted(files.sizes)[:10])}")


def side_files(files: Files) -> list[str]:
    """Names of a model's small files: config, tokenizer, generation settings, chat templates."""
    endings = (".json", ".jinja", ".model", ".txt", ".tiktoken")
    names = [name for name in files.sizes if name.endswith(endings) and ("/" not in name or name.endswith(".jinja"))]
    # the report is ours: a merged or imported model may be imported again
    return sorted(name for name in names if not name.endswith(".index.json") and name != "report.json")


class LocalFiles:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.version: str | None = None
        self.sizes = {
            path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()
        }

    def fetch(self, name: str, into: Path) -> Path:  # noqa: ARG002  (the original is used)
        """The file itself."""
        return self.root / name

    def read(self, name: str, start: int, length: int) -> bytes:
        """The bytes [start, start + length) of one file."""
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(length)


class BucketFiles:
    """Objects under a prefix of an S3 bucket."""

    def __init__(self, source: str, store: StoreConfig | None) -> None:
        from rlhf_store.artifacts import STAGE_PATIENCE, open_artifacts

        endpoint, region = (store.endpoint, store.region) if store else (None, None)
        where = StoreConfig(url=source, endpoint=endpoint, region=region)
        self.objects = open_artifacts(where, STAGE_PATIENCE).objects
        self.version: str | None = None
        self.sizes = {info.key: info.size for info in self.objects.walk("")}
        if not self.sizes:
            raise UserError(f"source: {source} holds no objects; check the bucket, the prefix and the endpoint")

    def fetch(self, name: str, into: Path) -> Path:
        """Read the object block by block; continues what an earlier call left."""
        target = into / name
        if target.exists():
            return target
        partial = target.with_name(target.name + ".part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as out:
            while (start := out.tell()) < self.sizes[name]:
                out.write(self.objects.get(name, start, min(BLOCK, self.sizes[name] - start)))
        partial.rename(target)
        return target


class HubFiles:
    """Files of a hub repository at one commit: hf://owner/name, or hf://datasets/owner/name."""

    def __init__(self, source: str, path: str, revision: str | None) -> None:
        self.source = source
        self.kind = "dataset" if path.startswith("datasets/") else "model"
        owner, _, rest = path.removeprefix("datasets/").partition("/")
        name, _, self.inner = rest.partition("/")
        if not owner or not name:
            form = "hf://datasets/owner/name" if self.kind == "dataset" else "hf://owner/name"
            raise UserError(f"source: {source} names no repository; write {form}")
        self.repo = f"{owner}/{name}"
        with hub_errors(source, revision):
            from huggingface_hub import HfApi

            info: Any = HfApi().repo_info(self.repo, repo_type=self.kind, revision=revision, files_metadata=True)
        self.version: str | None = info.sha
        prefix = f"{self.inner}/" if self.inner else ""
        self.sizes = {
            file.rfilename.removeprefix(prefix): file.size or 0
            for file in info.siblings or []
            if file.rfilename.startswith(prefix)
        }

    def fetch(self, name: str, into: Path) -> Path:
        """Download one file of the commit; continues what an earlier call left."""
        target = into / name
        if target.exists():
            return target
        from huggingface_hub import hf_hub_download

        inner = f"{self.inner}/{name}" if self.inner else name
        with hub_errors(self.source, self.version):
            downloads = into / ".hub"
            got = hf_hub_download(
                self.repo, inner, repo_type=self.kind, revision=self.version, local_dir=downloads, cache_dir=downloads
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(got, target)
        return target


@contextmanager
def hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into errors that say what to do."""
    from huggingface_hub import errors

    # The client's HTTP library, whose name differs between versions.
    transport: type[Exception] = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

    mirror = "or mirror it and use its s3:// or file:// address"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"source: {source} is gated; accept its licence on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"revision: {revision!r} is no commit, tag or branch of {source}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"source: {source} is not on the hub, or it is private; check it, or set HF_TOKEN") from error
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"source: {source} lacks a file at revision {revision}: {error}") from error
        raise StoreError(f"source: {source}: the hub could not be reached; try again, {mirror}") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"source: {source} needs the hub and HF_HUB_OFFLINE is set; unset it, {mirror}") from error
    except (transport, ConnectionError, TimeoutError) as error:
        where, why = os.environ.get("HF_ENDPOINT", "the hub"), str(error).partition("\n")[0]
        answer = getattr(getattr(error, "response", None), "status_code", 0)
        if answer in (401, 403, 404):  # another try would get the same
            raise UserError(f"source: {source}: {where} refused it ({why}); check it and HF_TOKEN, {mirror}") from error
        raise StoreError(f"source: {source}: {where} could not be reached ({why}); try again, {mirror}") from error


def _local_folder(source: str, folder: Path) -> Path:
    if not folder.is_absolute():
        raise UserError(f"source: {source} is not absolute; write file:///folder with three slashes")
    if not folder.is_dir():
        raise UserError(f"source: {source} is no folder of this machine")
    return folder
