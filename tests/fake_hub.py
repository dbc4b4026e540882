"""A hub on this machine: the API that lists a repository, redirects to where the bytes are, ranges, and all the ways in
which such a server goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class FakeHub:
    """files: of repository owner/model.  faults: what happens to the next requests for bytes, in order, by file:

    ("drop", n)    the connection ends after n bytes of the answer
    ("status", n)  that status instead
    ("wrong", n)   the nth byte of the answer is another one
    ("less", n)    a range of n bytes, and it says so
    "whole"        no ranges here
    "shift"        the range begins a byte later than was asked for
    "size"         the file is said to be longer
    "long"         the answer is said to be longer than it is
    "no range"     it does not say which range it sends
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.faults = dict(files), dict[str, list[Any]]()
        self.repo, self.gated = "owner/model", False
        self.sent = dict[str, int]()  # bytes, by file
        self.tokens_seen = dict[str, set[str | None]]()  # by host
        self.chunk_wait_s = 0.0
        self._stop = threading.Event()
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def listing(self) -> dict[str, Any]:
        return {
            "id": self.repo,
            "modelId": self.repo,
            "sha": COMMIT,
            "private": False,
            "siblings": [self._sibling(name, data) for name, data in self.files.items()],
        }

    def wait(self) -> None:
        """Between chunks, where a test wants time to interrupt."""
        if self.chunk_wait_s:
            self._stop.wait(self.chunk_wait_s)

    @staticmethod
    def _sibling(name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        one: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
        if name.endswith(".safetensors"):
            one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return one


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here on purpose; what matters is what they wrote."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        fake, host = self.fake, self.headers["Host"].split(":")[0]
        fake.tokens_seen.setdefault(host, set()).add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if path.startswith("/cdn/"):
            self._send_bytes(path.removeprefix("/cdn/"))
        elif fake.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif re.fullmatch(rf"/api/models/{fake.repo}/revision/(main|{COMMIT})", path):
            self._answer(200, json.dumps(fake.listing()).encode())
        elif path.startswith(f"/api/models/{fake.repo}/revision/"):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif (name := path.removeprefix(f"/{fake.repo}/resolve/{COMMIT}/")) != path and name in fake.files:
            # Another host, as far as a client can tell.
            self._answer(302, b"", {"Location": f"http://localhost:{fake.port}/cdn/{name}"})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_bytes(self, name: str) -> None:
        data, queue = self.fake.files[name], self.fake.faults.get(name)
        fault = queue.pop(0) if queue else None
        kind, n = fault if isinstance(fault, tuple) else (fault, 0)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if kind == "status":
            return self._answer(n, b"")
        if not match or kind == "whole":
            self.send_response(200)
            first, last = 0, len(data) - 1
        else:
            self.send_response(206)
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            if kind == "shift":
                first += 1
            if kind == "less":
                last = min(last, first + n - 1)
            if kind != "no range":
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data) + (kind == 'size')}")
        body = data[first : last + 1]
        if kind == "wrong":
            body = body[:n] + bytes([body[n] ^ 0x7F]) + body[n + 1 :] if n < len(body) else body
        self.send_header("Content-Length", str(len(body) + 10 * (kind == "long")))
        self.end_headers()
        if kind == "drop":
            body = body[:n]
        try:
            for start in range(0, len(body), 1 << 15):
                self.wfile.write(body[start : start + (1 << 15)])
                self.fake.sent[name] = self.fake.sent.get(name, 0) + len(body[start : start + (1 << 15)])
                self.fake.wait()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if kind in ("drop", "long"):
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        return None
