"""Makes the users of the bundled MinIO, each of which reaches one prefix of a bucket: `python -m rlhf_store.users`.

The chart runs it after each install and upgrade, with the root's keys, which no other pod but MinIO's has.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import urllib3
from minio import MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException
from urllib3.exceptions import HTTPError

from rlhf_api.errors import RLHFError, StoreError, UserError
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, EXIT_CODES, EXIT_OK
from rlhf_store.bucket import until_it_answers

SOURCES: Final = "sources"  # below it every user may read what runs are to learn from
OURS: Final = "rlhf."  # how our policies' names begin: users of others are left alone
SECONDS: Final = 15.0  # that an answer may take


class User(NamedTuple):
    """Who may do what a run does, below one prefix."""

    name: str
    prefix: str
    access_key: str
    secret_key: str


def policy(bucket: str, prefix: str, readable: Sequence[str] = ()) -> dict[str, Any]:
    """What the keys of runs must allow below `prefix`, with the folders `readable` to read from, in the words of S3."""
    within, from_here = _below(prefix), [_below(folder) for folder in readable]
    read = [{"Action": ["s3:GetObject"], "Resource": [_arn(bucket, each) for each in from_here]}] if from_here else []
    statements: list[dict[str, Any]] = [
        {
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
            "Resource": [_arn(bucket, within)],
        },
        *read,
        {
            "Action": ["s3:ListBucket"],
            "Resource": [_arn(bucket)],
            "Condition": {"StringLike": {"s3:prefix": sorted({within, *from_here})}},
        },
        {"Action": ["s3:GetBucketLocation"], "Resource": [_arn(bucket)]},  # asked where no region is set
    ]
    return {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **each} for each in statements]}


def make_users(admin: MinioAdmin, bucket: str, users: Sequence[User]) -> None:
    """Let `users` be there, with these keys and prefixes, and nobody else that was made here before."""
    for user in users:
        admin.policy_add(OURS + user.name, policy=policy(bucket, user.prefix, [SOURCES]))
        admin.user_add(user.access_key, user.secret_key)
        admin.policy_set(OURS + user.name, user=user.access_key)
    for access_key, found in json.loads(admin.user_list()).items():
        if found.get("policyName", "").startswith(OURS) and access_key not in {user.access_key for user in users}:
            admin.user_remove(access_key)
    for name in json.loads(admin.policy_list()):
        if name.startswith(OURS) and name not in {OURS + user.name for user in users}:
            admin.policy_remove(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say and print one line about it. Returns the exit code of the error's class."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_store.users", description=__doc__)
    parser.add_argument("--endpoint", required=True, help="MinIO's URL")
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a store that does not answer")
    parser.add_argument(
        "users", nargs="+", metavar="FOLDER=PREFIX", help=f"files {ENV_ACCESS_KEY} and {ENV_SECRET_KEY}; where to"
    )
    options = parser.parse_args(arguments)
    try:
        users = [_user(each) for each in options.users]
        admin = _admin(options.endpoint, os.environ)

        def work() -> str:
            try:
                make_users(admin, options.bucket, users)
            except (MinioAdminException, HTTPError) as error:
                raise StoreError(f"users of {options.endpoint}: {error}") from error
            return "; ".join(f"{user.name}: s3://{options.bucket}/{user.prefix}" for user in users)

        print(until_it_answers(work, options.wait))
    except RLHFError as error:
        print(error, file=sys.stderr)
        return EXIT_CODES[error.failure]
    return EXIT_OK


def _below(prefix: str) -> str:
    return f"{prefix}/*" if prefix else "*"


def _arn(bucket: str, keys: str = "") -> str:
    return f"arn:aws:s3:::{bucket}" + (f"/{keys}" if keys else "")


def _user(text: str) -> User:
    folder, separator, prefix = text.partition("=")
    if not separator:
        raise UserError(f"{text}: no prefix; give FOLDER=PREFIX")
    try:
        keys = [(Path(folder) / file).read_text() for file in (ENV_ACCESS_KEY, ENV_SECRET_KEY)]
    except OSError as error:
        raise UserError(f"{text}: {error.filename}: {error.strerror}") from error
    return User(Path(folder).name, prefix.strip("/"), *keys)


def _admin(endpoint: str, environment: Mapping[str, str]) -> MinioAdmin:
    access, secret = environment.get(ENV_ACCESS_KEY), environment.get(ENV_SECRET_KEY)
    if not access or not secret:
        raise UserError(f"no keys of MinIO's root; set {ENV_ACCESS_KEY} and {ENV_SECRET_KEY}")
    server = urlsplit(endpoint)
    http = urllib3.PoolManager(timeout=SECONDS, retries=False)
    provider = StaticProvider(access, secret)
    return MinioAdmin(endpoint=server.netloc, credentials=provider, secure=server.scheme == "https", http_client=http)


if __name__ == "__main__":
    sys.exit(main())
