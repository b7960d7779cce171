"""Readies a store, or tries it out: `python -m rlhf_store.bucket --store s3://bucket/prefix --endpoint URL [--check]`.

The chart runs the first after each install and upgrade, the second as its test.
"""

import argparse
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from rlhf_api.errors import RLHFError, StoreError, UserError
from rlhf_api.names import EXIT_CODES, EXIT_OK
from rlhf_api.stage import StoreConfig
from rlhf_store.objects import Objects
from rlhf_store.s3_objects import S3Objects

PAUSE_SECONDS = 1.0  # between tries at a store that does not answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say and print one line about it. Returns the exit code of the error's class."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_store.bucket", description=__doc__)
    parser.add_argument("--store", required=True, help="s3://bucket/prefix")
    parser.add_argument("--endpoint", help="S3 endpoint URL; AWS if left out")
    parser.add_argument("--region")
    parser.add_argument("--check", action="store_true", help="write, read and delete an object; make nothing")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a store that does not answer")
    options = parser.parse_args(arguments)
    try:
        objects = _open(options.store, options.endpoint, options.region)
        work = _check if options.check else _make
        print(until_it_answers(lambda: work(objects), options.wait))
    except RLHFError as error:
        print(error, file=sys.stderr)
        return EXIT_CODES[error.failure]
    return EXIT_OK


def _open(url: str, endpoint: str | None, region: str | None) -> S3Objects:
    if not url.startswith("s3://"):
        raise UserError(f"--store {url}: no bucket; give s3://bucket/prefix")
    try:
        return S3Objects.from_environment(StoreConfig(url=url, endpoint=endpoint, region=region), os.environ)
    except ValidationError as error:
        raise UserError(f"--store {url}: {error.errors()[0]['msg']}") from error


def _make(objects: S3Objects) -> str:
    return f"{objects.url}: the bucket {'was made' if objects.make_bucket() else 'is there'}"


def _check(objects: Objects) -> str:
    """What a run needs of a store: objects written, read, deleted, and only one winner of two conditional writes."""
    key, data = f"probe/{uuid.uuid4().hex}", b"rlhf"
    try:
        if not objects.put(key, data, if_none_match=True) or objects.put(key, b"other", if_none_match=True):
            raise StoreError(f"store {objects.url}: two conditional writes of {key} had the wrong winner; use another")
        if objects.get(key) != data:
            raise StoreError(f"store {objects.url}: {key} read back differs from what was written; use another store")
    finally:
        objects.delete([key])
    return f"{objects.url}: written, read and deleted; conditional writes work"


def until_it_answers(work: Callable[[], str], seconds: float) -> str:
    """What `work` returns, tried again and again. Raises its StoreError when that many seconds are over."""
    deadline, said = time.monotonic() + seconds, ""
    while True:
        try:
            return work()
        except StoreError as error:
            if time.monotonic() >= deadline:
                raise
            if str(error) != said:
                said = str(error)
                print(f"waiting: {said}", file=sys.stderr)
            time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
