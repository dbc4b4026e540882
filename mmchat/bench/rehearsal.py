"""A conversation's sizes, run through the planner: what an engine that rewinds would compute, without any engine.

For comparing policies: `run(script, policy=Policy(keep=1.0), ...)` trims the minimum.  Texts are so many rows, answers
so many tokens, pictures so many slices; everything else is mmchat.context's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from mmchat.context import Conversation, Policy, fit
from mmchat.errors import ContextFull
from mmchat.prompt import Message, Picture, Text
from mmchat.record import ImageHandle, Marks, Turn, Usage
from mmchat.slicing import SlicePlan

# What a board has, and the longest answer that it is asked for.
CONTEXT_ROWS, MAX_NEW_TOKENS = 4096, 512

_WORD = "."  # a text of one row
_HEADER = ["assistant"] * 3


@dataclass(frozen=True)
class Said:
    """A turn by its sizes: rows of the question's text, tokens of the answer, slices of each new picture."""

    question: int
    answer: int
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sent:
    """What a turn would cost.

    rows: of the prompt.  prefilled: of these, computed.  new: those of the question itself, of the end of the answer
    before it and of the header of the answer to come.  changes: how much was degraded.
    """

    rows: int
    prefilled: int
    new: int
    changes: int


@dataclass(frozen=True)
class Rehearsal:
    """turns: up to the first that cannot fit, if there is one (is_refused)."""

    turns: tuple[Sent, ...]
    is_refused: bool

    @property
    def prefilled(self) -> int:
        return sum(turn.prefilled for turn in self.turns)

    @property
    def new(self) -> int:
        return sum(turn.new for turn in self.turns)

    @property
    def ratio(self) -> float:
        """Rows prefilled per row that is new; 1.0 where nothing is ever computed twice."""
        return self.prefilled / max(1, self.new)

    @property
    def n_trims(self) -> int:
        return sum(turn.changes > 0 for turn in self.turns)

    @property
    def kept(self) -> int:
        """The fewest rows that a trim left; 0 where there was none."""
        return min((turn.rows for turn in self.turns if turn.changes), default=0)


def pictures_and_short_answers(n_turns: int, n_pictures: int) -> list[Said]:
    """Pictures of all sizes at random turns."""
    rng = Random(f"{n_turns} {n_pictures}")
    at = set(rng.sample(range(n_turns), n_pictures))
    return [
        Said(rng.randint(8, 25), rng.randint(8, 40), (rng.choice((1, 3, 5, 7, 10)),) if i in at else ())
        for i in range(n_turns)
    ]


def long_answers(n_turns: int) -> list[Said]:
    """Text alone, most of it answers."""
    rng = Random(f"{n_turns}")
    return [Said(rng.randint(8, 60), rng.randint(100, 400)) for _ in range(n_turns)]


_SCRIPTS = {
    "30 turns, 20 images": pictures_and_short_answers(30, 20),
    "300 turns of text, long answers": long_answers(300),
}


def curves(keeps: Sequence[float]) -> list[dict[str, Any]]:
    """What each script computes per new row in a board's context, over the share of it that a trim leaves at least."""
    found = []
    for name, script in _SCRIPTS.items():
        for keep in keeps:
            result = run(script, cap=CONTEXT_ROWS, max_new_tokens=MAX_NEW_TOKENS, policy=Policy(keep=keep))
            found.append(
                {
                    "name": name,
                    "context_rows": CONTEXT_ROWS,
                    "keep": keep,
                    "trims": result.n_trims,
                    "kept_least": result.kept / CONTEXT_ROWS if result.n_trims else None,
                    "rows_prefilled": result.prefilled,
                    "rows_new": result.new,
                    "rows_ratio": result.ratio,
                }
            )
    return found


def run(
    script: Sequence[Said],
    *,
    cap: int,
    max_new_tokens: int,
    policy: Policy | None = None,
    query_num: int = 64,
    system: int = 6,
) -> Rehearsal:
    """query_num: rows per slice.  system: rows of the system prompt's text."""
    counter = _Counter(query_num)
    turns: list[Turn] = []
    sent: list[Sent] = []
    held: list[Any] = []
    marks, n_images = Marks(), 0
    head = Message("system", (Text(_WORD * system),))
    for number, said in enumerate(script, 1):
        images = [_picture(n_images + i, number, slices, query_num) for i, slices in enumerate(said.pictures, 1)]
        n_images += len(images)
        question: tuple[str | ImageHandle, ...] = (*images, _WORD * said.question)
        conversation = Conversation(head, turns, question)
        try:
            fitted = fit(
                conversation, marks, counter, cap=cap, max_new_tokens=max_new_tokens, policy=policy or Policy()
            )
        except ContextFull:
            return Rehearsal(tuple(sent), True)
        marks = fitted.marks
        rows = [row for message in conversation.messages(marks) for row in counter.lay_out(message)] + _HEADER
        same = min(
            next((i for i, (a, b) in enumerate(zip(held, rows, strict=False)) if a != b), len(held)), len(rows) - 1
        )
        new = counter.message(Conversation(head, (), question).messages(Marks())[-1]) + counter.header
        sent.append(Sent(fitted.rows, len(rows) - same, new + (2 if turns else len(rows) - new), len(fitted.changes)))
        ids = tuple((number << 20) + i for i in range(said.answer))
        held = [*rows, *ids]
        turns.append(Turn(question, _WORD * said.answer, ids, "stop", Usage()))
    return Rehearsal(tuple(sent), False)


def _picture(number: int, turn: int, slices: int, query_num: int) -> ImageHandle:
    plan = SlicePlan((1000, 1000), (448, 448), (slices - 1, 1) if slices > 1 else None)
    keys = tuple(f"{number} {i}" for i in range(slices))
    return ImageHandle(f"img{number}", plan.size, slices, slices * query_num, turn, plan=plan, keys=keys, pixels=list)


class _Counter:
    """A mmchat.context.Counter that takes words and signs for rows, and lays them out."""

    header = len(_HEADER)

    def __init__(self, query_num: int) -> None:
        self._query_num = query_num

    def message(self, message: Message, n_images: int = 0) -> int:
        return len(self.lay_out(message))

    def lay_out(self, message: Message) -> list[Any]:
        rows: list[Any] = [message.role] * len(_HEADER)
        rows += message.ids or ()
        for part in message.parts:
            if isinstance(part, Text):
                rows += re.findall(r"\w+|\S", part.text)
            else:
                rows += ["image"] * 3 + [(key, i) for key in _keys(part) for i in range(self._query_num + 2)]
            rows.append("\n")
        return [*rows, "end", "\n"]


def _keys(picture: Picture) -> tuple[str, ...]:
    return picture.keys or ("",) * picture.plan.n_inputs
