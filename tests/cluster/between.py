"""A proxy between one operator and the API server that counts writes, and kills, hangs or hangs up when told to."""

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

import yaml

LEASES: Final = "/leases"
HOP_BY_HOP: Final = ("connection", "keep-alive", "transfer-encoding", "content-length")


class Between:
    """Speaks plain HTTP to the operator and HTTPS, as the administrator of `upstream`, to the API server.

    A write is a request that may change something, other than to a Lease: those come by the clock.
    """

    def __init__(self, upstream: Path, kubeconfig: Path) -> None:
        """`kubeconfig` is written: the one for the operator."""
        given = yaml.safe_load(upstream.read_text())
        cluster = given["clusters"][0]["cluster"]
        self.token: str = given["users"][0]["user"]["token"]
        self.address = urlsplit(cluster["server"]).netloc
        self.tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self.writes: list[str] = []
        self.kill: Callable[[], None] = lambda: None
        self.kill_at: tuple[int, Literal["before", "after"]] | None = None
        """Call `kill` before or after the API server gets the write of this number, counted from 1; once."""
        self._lock = threading.Lock()
        self._answers = threading.Event()
        self._answers.set()
        self._lost: set[socket.socket] = set()
        self._clients: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        given["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}
        given["users"][0]["user"] = {}
        kubeconfig.write_text(yaml.safe_dump(given))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self.hang_up()
        self._answers.set()
        self._server.server_close()

    def hang(self) -> None:
        """From now on nothing is answered, streams included. What is asked still reaches the API server."""
        self._answers.clear()

    def answer(self, old_connections: bool = True) -> None:
        """Answer again. `old_connections` False: those that are open now stay silent for good, as after a failover."""
        if not old_connections:
            with self._lock:
                self._lost |= self._clients
        self._answers.set()

    def hang_up(self) -> None:
        """Close every open connection."""
        with self._lock:
            for each in self._clients:
                _shut(each)

    @contextmanager
    def connected(self, client: socket.socket) -> Iterator[None]:
        """Note a connection of the operator's while it is open."""
        with self._lock:
            self._clients.add(client)
        try:
            yield
        finally:
            with self._lock:
                self._clients.discard(client)
                self._lost.discard(client)

    def wait(self, client: socket.socket) -> bool:
        """Return once answers may go out; false if never by this connection."""
        self._answers.wait()
        with self._lock:
            return client not in self._lost

    def count(self, method: str, path: str) -> int:
        """The number of a write; 0 for anything else."""
        if method in ("GET", "HEAD") or LEASES in path:
            return 0
        with self._lock:
            self.writes.append(f"{method} {path}")
            return len(self.writes)

    def dies(self, number: int, when: Literal["before", "after"]) -> bool:
        """Whether the operator is to be killed here; it then is."""
        if number == 0 or self.kill_at != (number, when):
            return False
        self.kill_at = None
        self.kill()
        return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: connections break here on purpose."""


def _handler_of(between: Between) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle(self) -> None:
            self._upstream = http.client.HTTPSConnection(between.address, context=between.tls)
            try:
                with between.connected(self.connection):
                    super().handle()
            finally:
                self._upstream.close()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            number = between.count(self.command, self.path)
            self.close_connection = True  # unless all goes well
            if between.dies(number, "before"):
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() not in (*HOP_BY_HOP, "host")}
            headers |= {"Authorization": f"Bearer {between.token}", "Accept-Encoding": "identity"}
            try:
                self._upstream.request(self.command, self.path, body or None, headers)
                answer = self._upstream.getresponse()
            except (OSError, http.client.HTTPException):  # the API server is away
                self._upstream.close()
                self._unavailable()
                return
            if between.dies(number, "after"):
                return
            self._pass_on(answer)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def _pass_on(self, answer: http.client.HTTPResponse) -> None:
            streamed = answer.length is None
            whole = b"" if streamed else answer.read()
            if not self._may_answer():
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            if not streamed:
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole)
                self.close_connection = False
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while chunk := answer.read1(1 << 16):
                if not self._may_answer():
                    return
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.write(b"0\r\n\r\n")
            self.close_connection = False

        def _may_answer(self) -> bool:
            if between.wait(self.connection):
                return True
            while self.connection.recv(1 << 16):  # silent until the operator gives up
                pass
            return False

        def _unavailable(self) -> None:
            if not self._may_answer():
                return
            text = json.dumps({"kind": "Status", "message": "the API server is away", "code": 503}).encode()
            self.send_response(503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        return
