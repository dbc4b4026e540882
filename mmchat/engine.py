"""What an LLM engine and a vision encoder take and give: values and two protocols, no implementation.

A request is a whole conversation as pieces.  What of it is already in the engine's KV cache is the engine's own
business; it reports the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmchat.errors import ContextFull, PromptError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The longest that an engine may say nothing.  A prefill chunk of the 8B model on a slow board takes tens of seconds; a
# token, under one.  RKLLM prefills a whole prompt in one run: the lowest published figure is 43 rows per second.
SILENCE_S, SLOWEST_ROWS_PER_S = 300.0, 10.0

_LARGEST = 2**31 - 1  # what vendors' structs hold
_TO = f"to {_LARGEST}"
_LARGEST_SEED = 2**63 - 1  # what a message to a worker holds; no vendor takes a seed
_SEEDS = f"a whole number from 0 to {_LARGEST_SEED}"

StopReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Tokens:
    """Token ids; each becomes one row of the embedding table."""

    ids: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageRows:
    """The embedding of one encoder input, by its key in the store; n_rows rows of the model's width."""

    key: str
    n_rows: int


Piece = Tokens | ImageRows


@dataclass(frozen=True)
class Sampling:
    """How the answer's tokens are chosen.

    max_new_tokens: at most so many, the end token not counted; >= 1.
    temperature: 0 takes the most likely token always (greedy); the rest then has no effect but for the penalty.
    top_k: only the k most likely; 0 for all.  top_p: the smallest set with that probability, in (0, 1].
    repetition_penalty: divides the score of tokens already generated; 1 for none.
    seed: same seed, same answer; None draws one.
    stop: texts that end the answer; they are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop: Any = () if self.stop is None else self.stop  # a single text, a list and None are taken too
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, (list, tuple, set, frozenset)) else (stop,))
        checks: list[tuple[str, Any, bool, str]] = [
            ("max_new_tokens", self.max_new_tokens, _is_int(self.max_new_tokens, 1), f"a whole number from 1 {_TO}"),
            ("temperature", self.temperature, _in(self.temperature, 0, 100), "from 0 to 100"),
            ("top_k", self.top_k, _is_int(self.top_k, 0), f"a whole number from 0 {_TO}"),
            ("top_p", self.top_p, _in(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                _in(self.repetition_penalty, 0.01, 100),
                "from 0.01 to 100",
            ),
            ("seed", self.seed, self.seed is None or _is_int(self.seed, 0, _LARGEST_SEED), f"None or {_SEEDS}"),
            ("stop", self.stop, all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
        ]
        for name, value, good, wanted in checks:
            if not good:
                raise PromptError(f"{name} is {value!r}; it must be {wanted}")

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sampling:
        """Raises PromptError for a name that is no field."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise PromptError(f"unknown sampling value {sorted(unknown)}; known: {[f.name for f in fields(cls)]}")
        return cls(**values)


def _is_int(value: Any, low: int, high: int = _LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _in(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Prefill:
    """Progress: done of total rows are in the KV cache (total leaves out the reused ones)."""

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """One token of the answer and the text it completes ("" while a character or a stop text is still open)."""

    id: int
    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer; always the last event, exactly once.

    reason: "stop" (end token or stop text), "length" (max_new_tokens), "cancelled".
    text: what was held back and belongs to the answer after all.
    ids: the tokens of exactly the answer's text (a stop text and what follows it are cut off).
    n_prompt = n_reused + n_prefilled: rows of the prompt, those already in the KV cache, those computed now.
    n_new: tokens generated, the end token not counted.  prefill_s, generate_s: seconds.
    """

    reason: StopReason
    text: str
    ids: tuple[int, ...]
    n_prompt: int
    n_reused: int
    n_prefilled: int
    n_new: int
    prefill_s: float
    generate_s: float


@dataclass(frozen=True)
class Restarted:
    """The worker that ran the request died (why: its error) and another goes on where it was; only clients say so."""

    why: str


Event = Prefill | Token | Done | Restarted


def check_fits(n_prompt: int, max_new_tokens: int, limit: int) -> None:
    """The sequence cap, checked by the session and again by every engine.  Raises ContextFull."""
    if n_prompt + max_new_tokens > limit:
        raise ContextFull(n_prompt, max_new_tokens, limit)


@dataclass(frozen=True)
class Encoded:
    """What a Vision did: slices put into the store, seconds of encoding alone, workers replaced meanwhile."""

    n_slices: int
    seconds: float
    restarts: int


class Vision(Protocol):
    """What a session needs of the vision encoder."""

    def encode(
        self,
        slices: Sequence[tuple[str, NDArray[np.uint8]]],
        progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Encoded:
        """Put the embedding of every (store key, pixels (height, width, 3)) into the store.

        progress: called with (slices done, slices in all).  should_stop: asked while waiting; True ends early.
        """


class Engine(Protocol):
    """What every LLM engine does; tests/contract_engine.py is the long form of this docstring."""

    @property
    def context_rows(self) -> int:
        """Rows that prompt and answer may take together."""

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        """Prefill what is not cached, then one Token event per token, then one Done.

        should_stop is asked between prefill chunks and between tokens.
        resume_ids: tokens of this very answer that were shown before a crash; they are not generated again,
        but count for max_new_tokens, penalties and stop texts.

        Raises ContextFull, PromptError (bad piece) before the model sees anything; EngineError when it fails.
        """
