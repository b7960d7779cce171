"""A way to a store that refuses, slows down and breaks off when a test says so: an HTTP proxy on this machine."""

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

CHUNK = 16 << 10
RST = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, as a broken network does
BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
MANIFESTS = r"PUT \S*/manifest\.json"  # commits: of artifacts, and of checkpoints


class FaultyLink:
    """Listens at `url` in a `with` block and passes every request on to `store`, until told otherwise.

    A fault strikes the requests whose "METHOD /path?query" contains a match of its pattern. A later fault replaces
    an earlier one of its kind.
    """

    def __init__(self, store: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.store = store.removeprefix("http://")
        self.seen: list[str] = []
        """Requests as they ended: "METHOD /path?query status", the status 0 where the connection was cut."""
        self._passed: dict[str, float] = {}  # request whose body passes -> the share of it that has passed
        self._server = _Server((host, port), _Handler)
        self._server.link = self
        self.url = f"http://{host}:{self._server.server_port}"
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.mend()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def mend(self) -> None:
        """Pass everything."""
        self._refuse = self._cut = self._swallow = self._hide = _Fault()
        self._rate: float | None = None

    def refuse(self, only: str = "", times: int | None = None) -> None:
        """Answer 503 as a busy store does, `times` times or until mend()."""
        self._refuse = _Fault(only, times)

    def cut(self, only: str = "", times: int | None = None) -> None:
        """Break the connection off when half of the request's body has passed."""
        self._cut = _Fault(only, times)

    def swallow(self, only: str = "", times: int | None = None) -> None:
        """Let the store do what is asked of it, and break the connection off instead of its answer."""
        self._swallow = _Fault(only, times)

    def hide_missing(self) -> None:
        """Deny what does not exist, as AWS does to those who may not list the whole bucket."""
        self._hide = _Fault("")

    def slow(self, rate: float) -> None:
        """Pass `rate` bytes a second, both ways and all connections together."""
        self._rate = rate

    def under_way(self, only: str) -> str | None:
        """A matching request, "METHOD /path?query", of whose body a part has passed and a part has yet to."""
        return next((line for line, share in list(self._passed.items()) if share < 1 and re.search(only, line)), None)

    def pace(self, size: int) -> None:
        """Wait until `size` more bytes may pass."""
        if rate := self._rate:
            with self._lock:
                self._free_at = max(time.monotonic(), self._free_at) + size / rate
                wait = self._free_at - time.monotonic()
            time.sleep(max(0.0, wait))

    def serve(self, request: "_Handler") -> int:
        """Answer one request. Returns the status, 0 where the connection was cut."""
        line = f"{request.command} {request.path}"
        length = int(request.headers.get("Content-Length", 0))
        if self._refuse.strikes(line):
            for _ in _chunks(request.rfile.read, length):
                pass
            request.answer(503, [("Content-Type", "application/xml"), ("Retry-After", "60")], BUSY)  # MinIO says 60
            return 503
        upstream = http.client.HTTPConnection(self.store, timeout=300)
        try:
            upstream.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            sends = length // 2 if self._cut.strikes(line) else length
            for chunk in _chunks(request.rfile.read, sends):
                self.pace(len(chunk))
                upstream.send(chunk)
                self._passed[line] = self._passed.get(line, 0.0) + len(chunk) / length
            if sends < length:
                return request.cut()
            with upstream.getresponse() as response:
                if self._swallow.strikes(line):
                    response.read()
                    return request.cut()
                if response.status == 404 and self._hide.strikes(line):
                    response.read()
                    request.answer(403, [("Content-Type", "application/xml")], DENIED)
                    return 403
                request.begin(response.status, response.getheaders())
                while data := response.read(CHUNK):
                    self.pace(len(data))
                    request.wfile.write(data)
                return response.status
        except (OSError, http.client.HTTPException):  # one of the two has gone
            return request.cut()
        finally:
            self._passed.pop(line, None)
            upstream.close()


class _Fault:
    """What strikes the next `times` matching requests (None: all of them), and without a pattern no request."""

    def __init__(self, only: str | None = None, times: int | None = None) -> None:
        self._only, self._left = only, times
        self._lock = threading.Lock()

    def strikes(self, line: str) -> bool:
        with self._lock:
            if self._only is None or self._left == 0 or not re.search(self._only, line):
                return False
            if self._left is not None:
                self._left -= 1
            return True


class _Server(ThreadingHTTPServer):
    link: FaultyLink
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Inherited by each connection: what waits here would make a slow link look silent for seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):  # a client's idle ones, whose threads wait for its next request
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed in the meantime
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        self.server.link.seen.append(f"{self.command} {self.path} {self.server.link.serve(self)}")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.begin(status, [*headers, ("Content-Length", str(len(body)))])
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        kept = [(name, value) for name, value in headers if name.lower() not in ("connection", "transfer-encoding")]
        if status not in (204, 304) and "content-length" not in [name.lower() for name, _ in kept]:
            kept.append(("Connection", "close"))  # which then ends the body
        for name, value in kept:
            self.send_header(name, value)
        self.end_headers()

    def cut(self) -> int:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        self.connection.close()
        return 0

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: `seen` has it."""


def _chunks(read: Callable[[int], bytes], length: int) -> Any:
    while length > 0:
        chunk = read(min(CHUNK, length))
        if not chunk:
            raise ConnectionError("the client broke off")
        length -= len(chunk)
        yield chunk
