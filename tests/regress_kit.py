"""A board without a model that keeps every promise, and that can be told to break one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmchat.engine import Done, Encoded, Event, ImageRows, Piece, Restarted, Sampling, Token
from mmchat.forecast import Outlook
from mmchat.model_dir import DEMO, open_model
from mmchat.prompt import ChatTokenizer
from mmchat.runtime import Runtime
from mmchat.session import Session
from mmchat.store import Store
from tests.fakes import FakeEngine

SPEC = open_model(DEMO)
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)


class _Worker:
    """fresh: no run since it was started."""

    def __init__(self) -> None:
        self.n_runs = self.n_kills = 0
        self.log_tail = ""

    def kill(self) -> None:
        self.n_runs, self.n_kills = 0, self.n_kills + 1


class _Engine(FakeEngine):
    """Answers depend on the values of embeddings, not on their names."""

    def _rows(self, pieces: Sequence[Piece]) -> list[Any]:
        rows: list[Any] = []
        for piece in pieces:
            if isinstance(piece, ImageRows):
                image = self._store.get(piece.key)
                assert image is not None
                rows += [zlib.crc32(row.tobytes()) + 10**6 for row in image]
            else:
                rows += piece.ids
        return rows


class FakeClient:
    """In the place of LlmClient.  broken(event, client): what comes instead of an event.

    forgets: whether forget() does.  used: the strategy that it says it kept to; None: the one it was told.
    """

    def __init__(self, store: Store, context_rows: int) -> None:
        self._engine = _Engine(TOKENIZER, store, SPEC.llm.hidden_size, context_rows=context_rows)
        self.context_rows = self.prompt_rows = context_rows
        self.silence_s: float | None = None
        self.worker = _Worker()
        self.broken: Callable[[Event, FakeClient], Event] = lambda event, client: event
        self.forgets, self.used = True, "rewind"
        self.n_rows = 0

    def forget(self, strategy: str | None = None) -> str:
        if self.forgets:
            self._engine.held = []
        return self.used

    def generate(
        self, pieces: Sequence[Piece], sampling: Sampling, should_stop: Callable[[], bool], **resumed: Any
    ) -> Iterator[Event]:
        self.worker.n_runs += 1
        self.n_rows = sum(piece.n_rows for piece in pieces)
        for event in self._engine.generate(pieces, sampling, should_stop):
            yield self.broken(event, self)


class FakeVision:
    """Embeddings by pixels.  drifts: each one is another."""

    def __init__(self, store: Store) -> None:
        self._store, self.worker, self.drifts, self._n = store, _Worker(), False, 0

    def encode(
        self, slices: Sequence[tuple[str, NDArray[np.uint8]]], progress: Any = None, should_stop: Any = None
    ) -> Encoded:
        for key, pixels in slices:
            self._n += self.drifts
            rng = np.random.default_rng([zlib.crc32(pixels.tobytes()), self._n])
            shape = (SPEC.vision.query_num, SPEC.llm.hidden_size)
            self._store.put(key, rng.standard_normal(shape).astype(np.float32))
        return Encoded(len(slices), 0.0, 0)


class FakeBoard:
    """As much of a Runtime as the kit needs."""

    spec, tokenizer, strategy, rkllm = SPEC, TOKENIZER, "rewind", None

    def __init__(self, folder: Path, context_rows: int = 400) -> None:
        self.store = Store(folder, 1 << 30)
        self.llm: Any = FakeClient(self.store, context_rows)
        self.engine: Any = self.llm
        self.vision = FakeVision(self.store)
        self.context_rows = context_rows

    def session(self, policy: Any = None) -> Session:
        longest = self.llm.prompt_rows if self.llm.prompt_rows < self.context_rows else None
        outlook = Outlook(longest=lambda: longest)
        return Session(SPEC, TOKENIZER, self.store, cast(Any, self.vision), self.engine, policy=policy, outlook=outlook)

    @property
    def rt(self) -> Runtime:
        """The same, for the type checker."""
        return cast(Runtime, self)


def rkllm(strategies: Sequence[str]) -> Any:
    """What Runtime.rkllm has of it."""
    return SimpleNamespace(profile=SimpleNamespace(allowed=tuple(strategies), strategy=strategies[0]))


def changed(kind: type[Event], **values: Any) -> Callable[[Event, FakeClient], Event]:
    """Events of a kind with other values; a callable is given the event."""

    def change(event: Event, client: FakeClient) -> Event:
        if not isinstance(event, kind):
            return event
        return replace(event, **{name: value(event) if callable(value) else value for name, value in values.items()})

    return change


def crashing(when: Callable[[FakeClient], bool]) -> Callable[[Event, FakeClient], Event]:
    return lambda event, client: Restarted("the LLM worker died (SIGSEGV)") if when(client) else event


def other_token(event: Event) -> Event:
    return Token(event.id + 1, event.text) if isinstance(event, Token) else event


__all__ = ["SPEC", "TOKENIZER", "Done", "FakeBoard", "FakeClient", "changed", "crashing", "other_token", "rkllm"]
