"""Where a command works: the folder .rlhf, and the store that its options, or the run, name."""

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from rlhf_api.errors import UserError
from rlhf_api.run import RLHFRun
from rlhf_api.stage import StoreConfig
from rlhf_operator.local import Home

HOME = Path(".rlhf")


def home() -> Home:
    """The folder .rlhf of the working folder."""
    return Home(HOME.absolute())


def chosen_store(url: str | None, endpoint: str | None, run: RLHFRun | None = None) -> StoreConfig:
    """The store of the options, else of the run's spec.objectStore, else the one in .rlhf.

    Raises UserError if they name no store.
    """
    spec = run.spec.object_store if run else None
    if url is None and spec and spec.bucket:
        url = f"s3://{spec.bucket}" + (f"/{spec.prefix.strip('/')}" if spec.prefix else "")
        endpoint = endpoint or spec.endpoint
    if url is None:
        if endpoint:
            raise UserError(f"--endpoint {endpoint}: there is no bucket to look for; add --store s3://bucket/prefix")
        return home().default_store()
    if urlsplit(url).scheme not in ("file", "s3"):
        url = Path(url).absolute().as_uri()
    try:
        return StoreConfig(url=url, endpoint=endpoint)
    except ValidationError as error:
        raise UserError(f"--store {url}: no store; use file:///folder or s3://bucket/prefix") from error
