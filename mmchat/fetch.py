"""Bytes by HTTP ranges into a file, which goes on where it was interrupted: by a dropped connection, or by kill -9.

huggingface_hub's own download begins a file anew in each process (2.x), and fetches whole files only; here a result is
put together of spans of several files, such as one tensor out of a shard of 5 GB.

What has arrived lies in `.NAME.part`; `.NAME.part.json` says of what it is a part, and how far it is known to be on
the disk.  Only what the server says about lengths is checked here; digests are the caller's.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mmchat.errors import DownloadError
from mmchat.outputs import replace_file

_TIMEOUT_S = 30
_READ_BYTES = 1 << 18
# How much may have to be fetched again after a crash.
_SYNC_BYTES = 1 << 25
# Before the next attempt, as long as none brings a byte; then it is given up.
_WAITS_S = (0, 1, 2, 4, 8)
_GONE_WRONG = (OSError, http.client.HTTPException)  # URLError, timeouts and resets are OSError


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file that has size bytes, at a URL whose content never changes."""

    url: str
    start: int
    end: int
    size: int


Piece = bytes | Span


def length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.end - piece.start


def key(pieces: Sequence[Piece]) -> str:
    """What identifies the result before it is there."""
    return hashlib.sha256(repr(tuple(pieces)).encode()).hexdigest()


def part_of(path: Path) -> Path:
    """Where what has arrived of path lies."""
    return path.with_name(f".{path.name}.part")


def part_bytes(path: Path, pieces: Sequence[Piece]) -> int:
    """How much of path has arrived already."""
    try:
        state = json.loads(_state_of(path).read_text(encoding="utf-8"))
        done = int(state["done"]) if state["key"] == key(pieces) else 0
        return done if 0 <= done <= part_of(path).stat().st_size else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def drop_part(path: Path) -> None:
    """Forget what has arrived of path."""
    for left in (_state_of(path), part_of(path)):
        left.unlink(missing_ok=True)


def read(span: Span, headers: Mapping[str, str]) -> bytes:
    """A span that is small enough for memory.  Raises DownloadError."""
    return b"".join(_arriving(span, 0, headers))


def fetch(
    path: Path, pieces: Sequence[Piece], headers: Mapping[str, str], progress: Callable[[int, int], None]
) -> Path:
    """Put the pieces together in part_of(path), which is returned; what is there of them already is kept.

    headers: sent to the first host of a URL; their authorization goes to no other.
    progress: called with (bytes done, bytes in all).

    Raises DownloadError: the server refuses, is gone, or serves other lengths than it should.
    """
    total, done = sum(map(length, pieces)), part_bytes(path, pieces)
    with part_of(path).open("r+b" if done else "w+b") as file:
        file.truncate(done)
        file.seek(done)
        part = _Part(path, file, key(pieces), done, lambda done: progress(done, total))
        progress(done, total)
        begin = 0
        for piece in pieces:
            skip, begin = max(0, part.done - begin), begin + length(piece)
            if skip >= length(piece):
                continue
            if isinstance(piece, bytes):
                part.add(piece[skip:])
            else:
                for data in _arriving(piece, skip, headers):
                    part.add(data)
        part.sync()
    return part_of(path)


class _Part:
    """A file that grows, and a note beside it of how far it is on the disk for sure."""

    def __init__(self, path: Path, file: IO[bytes], key: str, done: int, progress: Callable[[int], None]) -> None:
        self._path, self._file, self._key, self._progress = path, file, key, progress
        self.done = self._synced = done

    def add(self, data: bytes) -> None:
        self._file.write(data)
        self.done += len(data)
        if self.done - self._synced >= _SYNC_BYTES:
            self.sync()
        self._progress(self.done)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        state = json.dumps({"key": self._key, "done": self.done}).encode()
        replace_file(_state_of(self._path), state)
        self._synced = self.done


def _state_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part.json")


def _arriving(span: Span, skip: int, headers: Mapping[str, str]) -> Iterator[bytes]:
    """Every byte of the span after the first `skip`, in order, over as many connections as it takes."""
    at, failures = span.start + skip, 0
    while at < span.end:
        before, problem = at, "the connection was closed too early"
        try:
            with _open(span.url, f"bytes={at}-{span.end - 1}", headers) as response:
                skip, end = _answer(span, at, response)
                while skip and (data := response.read(min(_READ_BYTES, skip))):
                    skip -= len(data)
                while at < end and (data := response.read(min(_READ_BYTES, end - at))):
                    at += len(data)
                    yield data
        except urllib.error.HTTPError as error:
            error.close()
            problem = _refusal(span.url, error.code)
        except _GONE_WRONG as error:
            problem = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 0 if at > before else failures + 1
        if failures > len(_WAITS_S):
            raise DownloadError(f"{span.url}: {problem}; run the same command again: what has arrived is kept")
        if failures:
            time.sleep(_WAITS_S[failures - 1])


def _open(url: str, wanted: str, headers: Mapping[str, str]) -> Any:
    request = urllib.request.Request(url, headers={**headers, "Range": wanted, "Accept-Encoding": "identity"})
    return urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """The hub sends one to where the bytes are, which must not be shown the user's token."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


def _answer(span: Span, at: int, response: Any) -> tuple[int, int]:
    """How many bytes of the answer come before those that were asked for, and where in the file it ends.

    Raises DownloadError where it is not what was asked for.
    """
    first, last, size = "?", "?", "?"
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status == 200:  # a server without ranges sends everything
        first, last, size = "0", str(span.size - 1), str(span.size)
    elif response.status == 206 and match:
        first, last, size = match.group(1, 2, 3)
        if first != str(at) or int(last) >= span.end:
            match = None
    if not (match or response.status == 200) or size not in (str(span.size), "*") or int(last) < at:
        raise DownloadError(
            f"{span.url}: bytes {at} to {span.end - 1} of {span.size} were asked for, "
            f"but the server answers {response.status} with bytes {first} to {last} of {size}"
        )
    n_body, n_wanted = response.headers.get("Content-Length"), int(last) + 1 - int(first)
    if n_body is not None and n_body != str(n_wanted):
        raise DownloadError(f"{span.url}: bytes {first} to {last} of {size} are {n_body} bytes, the server says")
    return at - int(first), min(span.end, int(last) + 1)


def _refusal(url: str, status: int) -> str:
    """The problem, where another attempt may help.  Raises DownloadError where it will not."""
    problem = f"the server answers {status} ({http.client.responses.get(status, 'no known code')})"
    if status in (408, 425, 429) or status >= 500:
        return problem
    if status in (401, 403):
        problem += "; log in with `hf auth login`, or set HF_TOKEN, and accept the model's terms on its page"
    raise DownloadError(f"{url}: {problem}") from None
