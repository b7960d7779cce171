"""The users of the bundled MinIO, made as the chart does: on a real one."""

import io
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException, S3Error
from minio_server import PASSWORD, USER, MinioServer

from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY, EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_USER
from rlhf_store.users import main

pytestmark = pytest.mark.s3

KEYS = ("runs/a", "runs/b/c", "team/a", "runs-2/a", "sources/model/a", "elsewhere")


class Bundled:
    """A MinIO with a bucket that holds KEYS, another bucket, and folders of keys as a Secret's volume has them."""

    def __init__(self, server: MinioServer, folder: Path) -> None:
        self.server, self._folder = server, folder
        self.bucket = f"users-{uuid.uuid4().hex[:12]}"
        for name in (self.bucket, f"{self.bucket}-other"):
            server.client().make_bucket(name)
            for key in KEYS:
                self._put(server.client(), name, key)

    def folder(self, name: str, access_key: str, secret_key: str) -> str:
        """A folder with keys."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        (folder / ENV_ACCESS_KEY).write_text(access_key)
        (folder / ENV_SECRET_KEY).write_text(secret_key)
        return str(folder)

    def make(self, *users: str) -> int:
        """Exit code of making these users, each FOLDER=PREFIX."""
        return main([f"--endpoint={self.server.url}", f"--bucket={self.bucket}", *users])

    def may(self, access_key: str, secret_key: str) -> set[str]:
        """What keys may do, as `ACTION KEY`; `list` is of a folder, and a key of the other bucket begins with `/`."""
        client = Minio(self.server.address, access_key, secret_key, secure=False)
        found = set()
        for key in KEYS:
            for bucket, shown in ((self.bucket, key), (f"{self.bucket}-other", f"/{key}")):
                tries: dict[str, Callable[[], object]] = {
                    "read": lambda: client.stat_object(bucket, key),  # noqa: B023 - called at once
                    "write": lambda: self._put(client, bucket, key),  # noqa: B023
                    "list": lambda: list(client.list_objects(bucket, key[:-1])),  # noqa: B023
                }
                found |= {f"{action} {shown}" for action, attempt in tries.items() if allowed(attempt)}
        return found

    def admin(self, access_key: str, secret_key: str) -> MinioAdmin:
        """A client of MinIO's own API."""
        provider = StaticProvider(access_key, secret_key)
        return MinioAdmin(endpoint=self.server.address, credentials=provider, secure=False)

    @staticmethod
    def _put(client: Minio, bucket: str, key: str) -> None:
        client.put_object(bucket, key, io.BytesIO(b"1"), 1)


@pytest.fixture
def bundled(minio: MinioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundled:
    """A store with the root's keys in the environment."""
    monkeypatch.setenv(ENV_ACCESS_KEY, USER)
    monkeypatch.setenv(ENV_SECRET_KEY, PASSWORD)
    return Bundled(minio, tmp_path)


def allowed(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except S3Error as error:
        if error.code not in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise
        return False
    return True


def everything(*keys: str) -> set[str]:
    return {f"{action} {key}" for action in ("read", "write", "list") for key in keys}


SOURCES = {"read sources/model/a", "list sources/model/a"}


def test_a_user_reaches_its_prefix_and_reads_the_sources(bundled: Bundled, capsys: pytest.CaptureFixture[str]) -> None:
    own = bundled.folder("own", "own-key", "own-secret")
    team = bundled.folder("team", "team-key", "team-secret")
    assert bundled.make(f"{own}=runs", f"{team}=team/") == EXIT_OK
    assert capsys.readouterr().out == f"own: s3://{bundled.bucket}/runs; team: s3://{bundled.bucket}/team\n"
    assert bundled.may("own-key", "own-secret") == everything("runs/a", "runs/b/c") | SOURCES
    assert bundled.may("team-key", "team-secret") == everything("team/a") | SOURCES
    assert bundled.may(USER, PASSWORD) == everything(*KEYS, *(f"/{key}" for key in KEYS))


def test_a_user_administers_nothing(bundled: Bundled) -> None:
    own = bundled.folder("own", "own-key", "own-secret")
    assert bundled.make(f"{own}=runs") == EXIT_OK
    admin = bundled.admin("own-key", "own-secret")
    attempts: list[Callable[[], Any]] = [
        lambda: admin.user_add("mine", "mine-secret"),
        lambda: admin.policy_set("readwrite", user="own-key"),
        lambda: admin.policy_add("rlhf.own", policy={"Version": "2012-10-17", "Statement": []}),
        admin.user_list,
        admin.service_restart,
    ]
    for attempt in attempts:
        with pytest.raises(MinioAdminException, match="AccessDenied"):
            attempt()


def test_without_a_prefix_a_user_reaches_the_bucket(bundled: Bundled) -> None:
    own = bundled.folder("own", "own-key", "own-secret")
    assert bundled.make(f"{own}=") == EXIT_OK
    assert bundled.may("own-key", "own-secret") == everything(*KEYS)


def test_a_user_of_the_sources_may_write_them(bundled: Bundled) -> None:
    own = bundled.folder("own", "own-key", "own-secret")
    assert bundled.make(f"{own}=sources") == EXIT_OK
    assert bundled.may("own-key", "own-secret") == everything("sources/model/a")


def test_keys_that_were_changed_open_nothing_any_more(bundled: Bundled) -> None:
    first, second = bundled.folder("own", "own-key", "own-secret"), bundled.folder("team", "team-key", "team-secret")
    assert bundled.make(f"{first}=runs", f"{second}=team") == EXIT_OK
    bundled.folder("own", "own-key", "other-secret")
    bundled.folder("team", "other-key", "team-secret")
    for _ in range(2):  # and doing it again changes nothing
        assert bundled.make(f"{first}=runs", f"{second}=team") == EXIT_OK
        assert bundled.may("own-key", "own-secret") == bundled.may("team-key", "team-secret") == set()
        assert bundled.may("own-key", "other-secret") == everything("runs/a", "runs/b/c") | SOURCES
        assert bundled.may("other-key", "team-secret") == everything("team/a") | SOURCES


def test_who_is_not_named_any_more_goes_and_strangers_stay(bundled: Bundled) -> None:
    root = bundled.admin(USER, PASSWORD)
    root.user_add("stranger", "stranger-secret")
    root.policy_set("readonly", user="stranger")
    own = bundled.folder("own", "own-key", "own-secret")
    team = bundled.folder("team", "team-key", "team-secret")
    assert bundled.make(f"{own}=runs", f"{team}=team") == EXIT_OK
    assert bundled.make(f"{own}=runs") == EXIT_OK
    assert bundled.may("team-key", "team-secret") == set()
    assert '"rlhf.team"' not in root.policy_list()
    assert "read elsewhere" in bundled.may("stranger", "stranger-secret")


def test_what_is_wrong_is_said(
    bundled: Bundled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = bundled.folder("own", "own-key", "own-secret")
    assert bundled.make(own) == EXIT_USER
    assert "give FOLDER=PREFIX" in capsys.readouterr().err
    assert bundled.make(f"{own}-2=runs") == EXIT_USER
    assert ENV_ACCESS_KEY in capsys.readouterr().err
    short = bundled.folder("short", "own-key", "short")
    assert bundled.make(f"{short}=runs") == EXIT_INFRASTRUCTURE
    assert "length" in capsys.readouterr().err
    monkeypatch.setenv(ENV_SECRET_KEY, "wrong-wrong-wrong")
    assert bundled.make(f"{own}=runs") == EXIT_INFRASTRUCTURE
    assert bundled.server.url in capsys.readouterr().err
    monkeypatch.delenv(ENV_ACCESS_KEY)
    assert bundled.make(f"{own}=runs") == EXIT_USER
    assert "root" in capsys.readouterr().err
