"""The shape of a model that is not imported yet: from a folder here or from the hub, or why it is not known."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf_api.budget import ModelShape
from rlhf_api.run import Model
from rlhf_operator.model_config import shape_before_import

CONFIG = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """One gated model at one commit."""

    def do_GET(self) -> None:
        status, answer = 404, b""
        if self.path == "/owner/not-json/resolve/main/config.json":
            status, answer = 200, b"<html>"
        elif self.path == "/owner/name/resolve/refs%2Fpr%2F1/config.json":
            allowed = self.headers["Authorization"] == "Bearer word"
            status, answer = (200, json.dumps(CONFIG).encode()) if allowed else (401, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url + "/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "word")
    yield url
    server.shutdown()
    server.server_close()


def test_a_folder_here_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    found = shape_before_import(Model(source=folder.as_uri()))
    assert isinstance(found, ModelShape)
    assert (found.layers, found.kv_heads) == (30, 3)


def test_the_hub_is_asked_for_the_revision_with_the_token(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = Model(source="hf://owner/name", revision="refs/pr/1")
    assert isinstance(shape_before_import(gated), ModelShape)
    monkeypatch.delenv("HF_TOKEN")
    assert shape_before_import(gated) == f"{hub}/owner/name/resolve/refs%2Fpr%2F1/config.json: 401 Unauthorized"


def test_what_the_hub_lacks_or_garbles_is_said(hub: str) -> None:
    assert str(shape_before_import(Model(source="hf://owner/name"))).endswith("config.json: 404 Not Found")
    assert str(shape_before_import(Model(source="hf://owner/not-json"))).startswith(
        "config.json of hf://owner/not-json: Expecting value"
    )


def test_a_hub_that_is_away_is_said(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "refused" in str(shape_before_import(Model(source="hf://owner/name")))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("hf://owner/name/model.gguf", "a GGUF file is read by the import"),
        ("s3://bucket/model", "s3:// is read by the import"),
        ("file:///nowhere", "config.json of file:///nowhere: [Errno 2]"),
    ],
)
def test_other_sources_wait_for_the_import(source: str, why: str) -> None:
    assert str(shape_before_import(Model(source=source))).startswith(why)
