"""The scripted chat of `mmchat bench chat`, and an Engine that times another one."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from mmchat.bench.conversations import EIGHT, Ask
from mmchat.bench.pictures import draw
from mmchat.engine import Engine, Event, Piece, Sampling, Token
from mmchat.session import Session

MAX_NEW_TOKENS = 64


class Timed:
    """An Engine that times another.

    seconds: inside it, from request to end.  generate_s: of that, after the first token of each answer.
    n_tokens: generated in generate_s, so without the first of each answer.  waited_s: of generate_s and of what was
    done with the tokens meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds = self.generate_s = self.waited_s = 0.0
        self.n_tokens = 0

    @property
    def context_rows(self) -> int:
        return self._engine.context_rows

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        events = self._engine.generate(pieces, sampling, should_stop, resume_ids=resume_ids)
        first = 0.0  # when the first token came
        while True:
            started = time.perf_counter()
            event = next(events, None)
            now = time.perf_counter()
            self.seconds += now - started
            if first:
                self.generate_s += now - started
                self.n_tokens += isinstance(event, Token)
            elif isinstance(event, Token):
                first = now
            if event is None:
                self.waited_s += now - first if first else 0.0
                return
            yield event


_TURNS = tuple(step for step in EIGHT.steps if isinstance(step, Ask))
N_TURNS = len(_TURNS)


@lru_cache
def _png(seed: int) -> bytes:
    file = io.BytesIO()
    draw(seed).save(file, "PNG")
    return file.getvalue()


def pictures(turn: int) -> list[bytes]:
    """The new pictures of a turn, as PNG files."""
    return [_png(seed) for seed in _TURNS[turn].new]


def say(session: Session, turn: int) -> float:
    """Ask the question with this number, from 0; seconds until the answer's end."""
    step, new = _TURNS[turn], pictures(turn)
    started = time.perf_counter()
    for _ in session.ask(step.text, new, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS):
        pass
    return time.perf_counter() - started
