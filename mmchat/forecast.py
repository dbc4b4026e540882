"""What a turn will send and cost, said before it runs: the Plan, and what is known of an engine to make one.

Seconds come from speeds, and every plan says where those are from: measured by `mmchat calibrate` on this very board,
or since the model was opened, or earlier in a conversation that was held with the same engine and model, or published
for an RK3588 and not measured here.  Where nothing is known, nothing is said.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mmchat.context import Change, Conversation, Counter, Fitted, Policy, fit, mentions, told
from mmchat.embedding import RowKey, choose_cache, common_prefix, row_keys
from mmchat.engine import Piece, check_fits
from mmchat.prompt import Prompt
from mmchat.record import Form, Marks, Usage, images_in

# airockchip/rknn-llm, benchmark.md of 1.2.3 and 1.3.0: MiniCPM-V-2.6, w8a8, highest fixed frequencies, three NPU
# cores.  A first token after 826 ms for 64 rows; long prompts take longer per row, by how much is not published.
PUBLISHED_RK3588 = {"encode": 3.27, "prefill": 0.826 / 64, "generate": 1 / 4.18}
_PUBLISHED = "published for RK3588, not measured here"
_MEASURED, _BEFORE = "measured in this run", "measured in this conversation before"
_MOST_S, _MOST_DONE = 1e9, 1e12  # beyond that a saved conversation says what nobody measured


@dataclass(frozen=True)
class Speed:
    """Seconds per slice, row or token, and where the figure is from."""

    seconds: float
    source: str


Work = Literal["encode", "prefill", "generate"]
Speeds = Mapping[Work, Speed]


def measured(usage: Usage, source: str = _MEASURED) -> Speeds:
    """From what answers took in which no worker died: of others only a part of the time is known."""
    spent: tuple[tuple[Work, float, int], ...] = (
        ("encode", usage.encode_s, usage.slices_encoded),
        ("prefill", usage.prefill_s, usage.n_prefilled),
        ("generate", usage.generate_s, usage.n_new),
    )
    return {
        work: Speed(seconds / n, source) for work, seconds, n in spent if 0 < seconds < _MOST_S and 0 < n < _MOST_DONE
    }


def measured_before(usages: Iterable[Usage]) -> Speeds:
    """From what answers of a saved conversation took, with the same engine and model."""
    return measured(sum((usage for usage in usages if not usage.restarts), Usage()), _BEFORE)


def of_board(
    encode_s_per_slice: float | None, prefill_rows_per_s: float | None, decode_tokens_per_s: float | None
) -> Speeds:
    """From what a board's profile has (mmchat.calibrate); None: not measured."""
    seconds: dict[Work, float | None] = {
        "encode": encode_s_per_slice,
        "prefill": 1 / prefill_rows_per_s if prefill_rows_per_s else None,
        "generate": 1 / decode_tokens_per_s if decode_tokens_per_s else None,
    }
    return {work: Speed(value, "measured by mmchat calibrate") for work, value in seconds.items() if value}


def published() -> Speeds:
    return {work: Speed(seconds, _PUBLISHED) for work, seconds in PUBLISHED_RK3588.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class Seconds:
    """Predicted: encoding the new slices, prefilling the new rows, one token of the answer; None: not known.

    sources: where the figures are from.
    """

    encode: float | None
    prefill: float | None
    token: float | None
    sources: tuple[str, ...] = ()

    @property
    def first_token(self) -> float | None:
        return None if self.encode is None or self.prefill is None else self.encode + self.prefill


def predict(speeds: Speeds, n_slices: int, n_rows: int) -> Seconds:
    def seconds(work: Work, n: int) -> float | None:
        return speeds[work].seconds * n if work in speeds else (None if n else 0.0)

    used: list[Work] = [*(["encode"] if n_slices else []), "prefill", "generate"]  # type: ignore[list-item]
    sources = dict.fromkeys(speeds[work].source for work in used if work in speeds)
    return Seconds(seconds("encode", n_slices), seconds("prefill", n_rows), seconds("generate", 1), tuple(sources))


@dataclass(frozen=True)
class PlannedImage:
    """number: the picture's in the conversation as it is sent, from 1; None where the model does not see it."""

    id: str
    form: Form | Literal["dropped"]
    number: int | None


@dataclass(frozen=True)
class Plan:
    """What a question sends, and what that costs.

    rows: of the prompt.  max_new_tokens: rows kept for the answer.  cap: rows that both may take together.
    rows_reused, rows_new: of rows, those that the engine should still have, and those to be computed.
    slices_new: encoder inputs that have to be encoded: the question's, and those of pictures that must be computed
        again, as far as the store does not have them.
    images: all pictures of the conversation, and how each is sent.  dropped: numbers of turns that are not sent.
    degraded: what is sent otherwise from this question on, for it would not fit.
    unseen: pictures that the question names (@img2) and the model does not see.
    seconds: predicted.  marks: what the session remembers of all this once the question is answered.
    """

    rows: int
    max_new_tokens: int
    cap: int
    rows_reused: int
    rows_new: int
    slices_new: int
    images: tuple[PlannedImage, ...]
    dropped: tuple[int, ...]
    degraded: tuple[Change, ...]
    unseen: tuple[str, ...]
    seconds: Seconds
    marks: Marks = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        values = {name: value for name, value in asdict(self).items() if name != "marks"}
        return {**values, "seconds": {**values["seconds"], "first_token": self.seconds.first_token}}


def make_plan(
    conversation: Conversation,
    fitted: Fitted,
    max_new_tokens: int,
    cap: int,
    rows_reused: int,
    slices_new: int,
    speeds: Speeds,
) -> Plan:
    marks, sent = fitted.marks, conversation.numbers(fitted.marks)
    images = [
        (image, number in marks.dropped)
        for number, parts in enumerate([*(turn.parts for turn in conversation.turns), conversation.question], 1)
        for image in images_in(parts)
    ]
    return Plan(
        rows=fitted.rows,
        max_new_tokens=max_new_tokens,
        cap=cap,
        rows_reused=rows_reused,
        rows_new=fitted.rows - rows_reused,
        slices_new=slices_new,
        images=tuple(
            PlannedImage(image.id, "dropped" if is_dropped else marks.form(image), sent.get(image.id))
            for image, is_dropped in images
        ),
        dropped=tuple(sorted(marks.dropped)),
        degraded=told(conversation, fitted),
        unseen=tuple(name for name in mentions(conversation.question) if name not in sent),
        seconds=predict(speeds, slices_new, fitted.rows - rows_reused),
        marks=marks,
    )


class Outlook:
    """What is known of an engine beyond its protocol; one for all its sessions.

    strategy: what it does with its KV cache: "rewind" (OpenVINO), or RKLLM's of mmchat.rkllm_embed.
    rewinds: with "prefix", whether the library takes a cache that must be cut.
    n_caches: KV caches that it has at most.
    longest: rows of the longest prompt that is known to be safe; None where none crashed.
    speeds: of this board, where they were measured; published: whether it is one that speeds were published for.
    made_by: a name that engine, model and machine share with no others; "" where there is none.
    """

    def __init__(
        self,
        strategy: Callable[[], str] = lambda: "rewind",
        *,
        rewinds: Callable[[], bool] = lambda: True,
        n_caches: int = 1,
        longest: Callable[[], int | None] = lambda: None,
        speeds: Callable[[], Speeds] = dict,
        published: bool = False,
        made_by: Callable[[], str] = lambda: "",
    ) -> None:
        self._strategy, self._rewinds, self._longest = strategy, rewinds, longest
        self._speeds, self._published, self._made_by = speeds, published, made_by
        self._spent = Usage()
        self._spending = threading.Lock()  # several sessions end their answers in several threads
        self._n_caches = n_caches
        self._held: list[list[RowKey]] = [[]]  # in each cache, the least recently used first
        self._asked = self._held

    @property
    def longest(self) -> int | None:
        """With "append" a prompt is sent in parts, so a long one was not one long run."""
        return None if self._strategy() == "append" else self._longest()

    def spend(self, usage: Usage) -> None:
        """An answer took this, whatever became of it; from any thread."""
        if not usage.restarts:
            with self._spending:
                self._spent += usage

    def speeds(self, before: Speeds) -> Speeds:
        """before: what the record of a conversation says."""
        return {**(published() if self._published else {}), **before, **measured(self._spent), **self._speeds()}

    def note(self, n_foreign: int) -> dict[str, Any]:
        """For a saved conversation: all its turns but the first so many were measured here."""
        made_by = self._made_by()
        return {"measured": {"by": made_by, "after": n_foreign}} if made_by else {}

    def n_foreign(self, state: Mapping[str, Any], n_turns: int) -> int:
        """Of a saved conversation's turns, how many (the first ones) were measured elsewhere, or who knows where."""
        noted, made_by = state.get("measured"), self._made_by()
        if not made_by or not isinstance(noted, Mapping) or noted.get("by") != made_by:
            return n_turns
        after = noted.get("after")
        return after if type(after) is int and 0 <= after < n_turns else n_turns

    def reused(self, pieces: Sequence[Piece]) -> int:
        """Rows of a prompt that the engine should find in its cache."""
        rows, strategy = row_keys(pieces), self._strategy()
        held = self._held[choose_cache(self._held, rows, self._n_caches)[0]]
        same = common_prefix(held, rows)
        if strategy == "resend" or (same < len(held) and (strategy == "append" or not self._rewinds())):
            return 0
        return min(same, len(rows) - 1)

    def sent(self, pieces: Sequence[Piece], n_rows: int, ids: Iterable[int]) -> None:
        """The engine computed the first n_rows of a prompt, and fed itself these tokens of its answer."""
        rows = row_keys(pieces)
        target = choose_cache(self._asked, rows, self._n_caches)[1]
        others = [held for number, held in enumerate(self._asked) if number != target]
        self._held = self._asked = [*others, [*rows[:n_rows], *ids]]

    def asked(self) -> None:
        """A request is under way: nobody knows what the engine holds until sent() tells."""
        self._asked, self._held = self._held, [[]]

    def lost(self) -> None:
        """Nobody knows what the engine holds: the one that the request was sent to is gone."""
        self._held = self._asked = [[]]


def plan_prompt(
    conversation: Conversation,
    marks: Marks,
    counter: Counter,
    render: Callable[[Marks], Prompt],
    outlook: Outlook,
    *,
    cap: int,
    max_new_tokens: int,
    policy: Policy,
    slices_new: Callable[[Prompt, int], int],
    before: Speeds,
    longest: int | None = None,
) -> tuple[Plan, Prompt]:
    """What is sent of a conversation, and its plan.

    render: the conversation's prompt under marks.  slices_new: the encoder inputs still to be encoded for a
        prompt of which so many rows are in the engine's cache.
    before: see Outlook.speeds.  longest: rows of a prompt, where the engine has refused more; see Outlook.longest.
    The rest is fit's.

    Raises ContextFull.
    """
    fitted = fit(
        conversation,
        marks,
        counter,
        cap=cap,
        max_new_tokens=max_new_tokens,
        policy=policy,
        longest=min((n for n in (outlook.longest, longest) if n is not None), default=None),
    )
    prompt = render(fitted.marks)
    check_fits(prompt.n_rows, max_new_tokens, cap)
    reused, speeds = outlook.reused(prompt.pieces), outlook.speeds(before)
    return make_plan(conversation, fitted, max_new_tokens, cap, reused, slices_new(prompt, reused), speeds), prompt
