"""A web server on loopback that holds files, breaks off where it is told to, and can stand for a model hub."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Held(threading.Event):
    """Until it is set, an answer of the web server waits; `reached` says that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait()


@dataclass
class Seen:
    """One request that came."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Web:
    """What the server holds and how it behaves; may be changed while it serves.

    cuts: after how many bytes of a body each of the next answers breaks off. endless: paths whose bodies never end.
    held: paths whose answers wait.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    endless: set[str] = field(default_factory=set)
    held: dict[str, threading.Event] = field(default_factory=dict)
    has_etags: bool = True
    has_ranges: bool = True
    seen: list[Seen] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def gets(self, suffix: str = "") -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "GET" and seen.path.endswith(suffix)]

    def hold(self, folder: Path, at: str) -> None:
        """Every file of a folder, under a path."""
        for path in folder.iterdir():
            self.files[f"{at}/{path.name}"] = path.read_bytes()

    def publish(self, folder: Path, repository: str, commit: str, *revisions: str) -> None:
        """A commit of a hub's repository, and the revisions that stand for it now."""
        for revision in (commit, *revisions):
            at = f"/{repository}/resolve/{revision}"
            self.hold(folder, at)
            for path in folder.iterdir():
                self.headers[f"{at}/{path.name}"] = {"X-Repo-Commit": commit}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base's
        pass

    def _answer(self, *, has_body: bool) -> None:
        web, path = self.web, self.path.partition("?")[0]
        web.seen.append(Seen(self.command, self.path, dict(self.headers.items())))
        if path in web.held:
            web.held[path].wait(60)
        status = web.statuses.get(path, 302 if path in web.redirects else 200 if path in web.files else 404)
        headers = dict(web.headers.get(path, {}))
        body = web.files.get(path, b"") if status == 200 else b""
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        if path in web.redirects:
            headers["Location"] = web.redirects[path]
        if status == 200 and web.has_etags:
            headers.setdefault("ETag", etag)
        if status == 200 and self.headers["If-None-Match"] == headers.get("ETag", ""):
            status, body = 304, b""
        elif status == 200 and web.has_ranges and self.headers["If-Range"] in (None, headers.get("ETag")):
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if asked and int(asked[1]) >= len(body):
                status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", b""
            elif asked:
                start = int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                status, body = 206, body[start:]
        self._send(status, headers, body, path if has_body else "")

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, path: str) -> None:
        self.send_response(status)
        endless = path in self.web.endless
        for name, value in headers.items():
            self.send_header(name, value)
        if not endless and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        if endless:
            self.send_header("Connection", "close")
        self.end_headers()
        if not path:
            return
        cuts = self.web.cuts.get(path)
        try:
            if cuts:
                self.wfile.write(body[: cuts.pop(0)])
                self.close_connection = True
            elif endless:
                while True:
                    self.wfile.write(bytes(1 << 16))
            else:
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in mid-answer are part of the tests."""


@contextmanager
def serving() -> Iterator[Web]:
    """A server until the end of the block."""
    web = Web()
    handler = type("Handler", (_Handler,), {"web": web})
    with _Server(("127.0.0.1", 0), handler) as server:
        web.address = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
