"""An Engine and a Vision without a model, and small things that several tests need."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.decoding import TextStream, choose, ids_of_text
from mmchat.engine import Done, Encoded, Event, ImageRows, Piece, Prefill, Sampling, StopReason, Token, check_fits
from mmchat.errors import MissingEmbeddings, PromptError
from mmchat.prompt import ChatTokenizer
from mmchat.store import Store


class FakeEngine:
    """An Engine whose model is a hash: the scores depend on every row before them, and on nothing else.

    script: where it is set, answers that are given word by word instead, one per request.
    """

    def __init__(self, tokenizer: ChatTokenizer, store: Store, width: int, *, context_rows: int) -> None:
        self._tokenizer, self._store, self._width, self.context_rows = tokenizer, store, width, context_rows
        self.held: list[Any] = []  # the "KV cache"
        self.script: list[str] = []
        self.n_requests = 0

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        self.n_requests += 1
        rows = self._rows(pieces)
        check_fits(len(rows), sampling.max_new_tokens, self.context_rows)
        answer = [*self._tokenizer.encode(self.script.pop(0)), min(self._tokenizer.stop_ids)] if self.script else None
        wanted, generated = rows + list(resume_ids), list(resume_ids)
        stream = TextStream(self._tokenizer.token_bytes, sampling.stop)
        for token in generated:
            stream.push(token)
        n_common = next((i for i, (a, b) in enumerate(zip(self.held, wanted)) if a != b), len(self.held))  # noqa: B905
        n_reused = min(n_common, len(wanted) - 1)
        reason: StopReason = "cancelled"
        self.held = self.held[:n_reused]
        if not should_stop():
            self.held = wanted
            yield Prefill(len(wanted) - n_reused, len(wanted) - n_reused)
        while len(self.held) >= len(wanted) and not should_stop():
            if stream.stopped or len(generated) >= sampling.max_new_tokens:
                reason = "stop" if stream.stopped else "length"
                break
            token = choose(self._scores(), sampling, generated) if answer is None else answer[len(generated)]
            if token in self._tokenizer.stop_ids:
                reason = "stop"
                break
            generated.append(token)
            yield Token(token, stream.push(token))
            if not stream.stopped and len(generated) < sampling.max_new_tokens:
                self.held = [*self.held, token]
        rest, ids = stream.finish(), generated
        if stream.stopped:
            ids = ids_of_text(generated, stream.text, self._tokenizer.token_bytes, self._tokenizer.encode)
        reused = min(n_reused, len(rows))
        fed = max(0, min(len(self.held), len(rows)) - reused)
        yield Done(reason, rest, tuple(ids), len(rows), reused, fed, len(generated), 0.0, 0.0)

    def _scores(self) -> NDArray[np.float32]:
        rng = np.random.default_rng(zlib.crc32(repr(self.held).encode()))
        return rng.standard_normal(self._tokenizer.n_ids).astype(np.float32)

    def _rows(self, pieces: Sequence[Piece]) -> list[Any]:
        """Every row as something to compare.  Raises PromptError, MissingEmbeddings."""
        rows: list[Any] = []
        missing = []
        for piece in pieces:
            if isinstance(piece, ImageRows):
                image = self._store.get(piece.key)
                if image is None:
                    missing.append(piece.key)
                elif image.shape != (piece.n_rows, self._width) or not np.isfinite(image).all():
                    raise PromptError(f"{image.shape} is not {(piece.n_rows, self._width)}, or not finite")
                rows += [(piece.key, i) for i in range(piece.n_rows)]
            elif not all(0 <= number < self._tokenizer.n_ids for number in piece.ids):
                raise PromptError("an id that is not in the table")
            else:
                rows += piece.ids
        if missing:
            raise MissingEmbeddings(missing)
        if not rows:
            raise PromptError("the prompt is empty")
        return rows


class FakeVision:
    """A Vision whose encoder is a hash of the key.  faults: exceptions of the next calls."""

    def __init__(self, store: Store, n_rows: int, width: int) -> None:
        self._store, self._shape = store, (n_rows, width)
        self.encoded: list[str] = []
        self.faults: list[Exception] = []

    def encode(
        self,
        slices: Sequence[tuple[str, NDArray[np.uint8]]],
        progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Encoded:
        if self.faults:
            raise self.faults.pop(0)
        n_done = 0
        for key, _ in slices:
            if should_stop():
                break
            rng = np.random.default_rng(int(key[:8], 16))
            self._store.put(key, rng.standard_normal(self._shape).astype(np.float32))
            self.encoded.append(key)
            n_done += 1
            progress(n_done, len(slices))
        return Encoded(n_done, 0.0, 0)


def never() -> bool:
    return False


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for it; a test that waits for long has failed."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether no such process runs (a zombie that nobody has collected yet does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def workers() -> set[int]:
    """Processes of this one's workers that run, whatever they are still doing."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and any(word.startswith(b"mmchat-") and word.endswith(b"-worker") for word in command):
            found.add(int(entry.name))
    return found
