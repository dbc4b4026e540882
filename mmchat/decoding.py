"""Scores -> token, tokens -> text: what every engine does after the model has run."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.engine import Sampling


def choose(logits: NDArray[np.float32], sampling: Sampling, generated: Sequence[int]) -> int:
    """The next token.  logits: (vocab,); generated: the answer's tokens so far.

    In the order of the transformers library: repetition penalty, temperature, top_k, top_p.  Each step draws from a
    generator of its own, seeded with (seed, step), so that an answer can be continued after a crash.
    """
    scores = logits.astype(np.float64)
    if sampling.repetition_penalty != 1.0 and generated:
        seen = np.unique(np.asarray(generated))
        scores[seen] = np.where(
            scores[seen] < 0, scores[seen] * sampling.repetition_penalty, scores[seen] / sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return int(scores.argmax())
    order = _best(scores, sampling.top_k)
    with np.errstate(over="ignore"):  # a temperature next to 0 makes all but the best impossible
        weights = np.exp((scores[order] - scores[order[0]]) / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p < 1.0:
        keep = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
        order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
    draw: Any = np.random.default_rng([sampling.seed or 0, len(generated)])
    return int(order[int(draw.choice(len(order), p=weights))])


def _best(scores: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    """The n best (0: all), the best first; of equals the first ones.  Only these are sorted: there are 150,000."""
    if not 0 < n < len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, -n)[-n]
    among = np.flatnonzero(scores >= least)
    return among[np.argsort(-scores[among], kind="stable")][:n]


class TextStream:
    """Joins tokens to text: whole characters only, nothing of a stop text, everything else at once."""

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._token_bytes, self._stop = token_bytes, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""  # all that was released
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes.  After a stop text was met (stopped), always "" ."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._token_bytes(token))
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])  # the one that was complete first, however the tokens fall
        return self._release(len(self._held) - self._open_stop())

    def finish(self) -> str:
        """What was held back in case a stop text followed; an unfinished character is dropped."""
        return "" if self.stopped else self._release(len(self._held))

    def _open_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-n:]) for text in self._stop):
                return n
        return 0

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        self.text += text
        return text


def ids_of_text(
    ids: Sequence[int], text: str, token_bytes: Callable[[int], bytes], encode: Callable[[str], list[int]]
) -> list[int]:
    """The first tokens of ids that spell the beginning of text, then the encoded rest of it."""
    wanted = text.encode()
    taken: list[int] = []
    for token in ids:
        piece = token_bytes(token)
        if not wanted.startswith(piece):
            break
        wanted = wanted[len(piece) :]
        taken.append(token)
    return taken + (encode(wanted.decode(errors="ignore")) if wanted else [])
