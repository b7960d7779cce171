"""Readying and trying a store, as the chart does: on a real MinIO."""

import uuid

import pytest

from rlhf_api.names import ENV_SECRET_KEY, EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_USER
from rlhf_api.stage import StoreConfig
from rlhf_store.bucket import main

pytestmark = pytest.mark.s3


@pytest.fixture
def endpoint(s3_store: StoreConfig) -> str:
    """The endpoint, with its credentials in the environment."""
    assert s3_store.endpoint
    return s3_store.endpoint


def test_a_bucket_is_made_once_and_can_then_be_used(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--store=s3://made-{uuid.uuid4().hex[:12]}/runs", f"--endpoint={endpoint}"]
    assert main([*arguments, "--check"]) == EXIT_INFRASTRUCTURE
    assert "does not exist" in capsys.readouterr().err
    assert main(arguments) == EXIT_OK
    assert capsys.readouterr().out.endswith("/runs/: the bucket was made\n")
    assert main(arguments) == EXIT_OK
    assert capsys.readouterr().out.endswith("/runs/: the bucket is there\n")
    assert main([*arguments, "--check"]) == EXIT_OK
    assert "conditional writes work" in capsys.readouterr().out


def test_wrong_credentials_are_said_after_the_wait(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENV_SECRET_KEY, "wrong-wrong-wrong")
    assert main(["--store=s3://any", f"--endpoint={endpoint}", "--wait=0.1"]) == EXIT_INFRASTRUCTURE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("waiting: store s3://any/")
    assert "refused the credentials" in lines[-1]


def test_a_store_that_is_no_bucket_is_refused(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store=file:///tmp/x", f"--endpoint={endpoint}"]) == EXIT_USER
    assert "give s3://bucket/prefix" in capsys.readouterr().err
