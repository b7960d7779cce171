"""A hub on this machine: model and data set repositories of one commit each, served as the real one serves them."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c" * 40
ABOUT = re.compile(r"api/(?P<kind>models|datasets)/(?P<repository>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")
FILE = re.compile(r"((?P<kind>datasets)/)?(?P<repository>[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<name>.+)")


class Hub:
    """What the server holds: folders by owner/name."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.datasets: dict[str, Path] = {}
        self.gated: set[str] = set()
        """Repositories that anyone may list and none may read."""
        self.refuses: int | None = None
        """The status that answers everything."""
        self.asked: list[str] = []
        """Files that were sent, in order."""


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if self.hub.refuses:
            return self._send(self.hub.refuses, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if about := ABOUT.fullmatch(path):
            return self._about(about["kind"], about["repository"], about["revision"] or "main")
        if file := FILE.fullmatch(path):
            return self._file(file["kind"] or "models", file["repository"], file["commit"], file["name"])
        return self._send(404, b"", {})  # what else the client likes to know

    def _folder(self, kind: str, repository: str) -> Path | None:
        held: dict[str, Path] = getattr(self.hub, kind)
        return held.get(repository)

    def _about(self, kind: str, repository: str, revision: str) -> None:
        folder = self._folder(kind, repository)
        if not folder:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        siblings = [{"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
        about = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        return self._send(200, json.dumps(about).encode(), {})

    def _file(self, kind: str, repository: str, commit: str, name: str) -> None:
        folder = self._folder(kind, repository)
        if not folder or commit != COMMIT:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if folder else "RepoNotFound"})
        if repository in self.hub.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if not (folder / name).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = (folder / name).read_bytes()
        if self.command == "GET":
            self.hub.asked.append(name)
        etag = hashlib.sha256(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, which the hub's client of this process talks to instead of the real one."""
    from huggingface_hub import constants

    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
