"""Counts over the standard conversations: slices encoded per distinct slice, rows prefilled per new row.

The counts are the real pipeline's, workers and all; the oracles beside them are made from the requests alone.  With
greedy answers nothing in them depends on the machine's speed.

New rows of a request: those after what it has in common with what any session's last answer left; where the
conversation was degraded to fit, and so differs from what its record was before, the rows of the newest question.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mmchat
from mmchat.bench import rehearsal
from mmchat.bench.board import Work, predicted_s
from mmchat.bench.conversations import OVERFLOW, STANDARD, Ask, Conversation
from mmchat.bench.pictures import draw
from mmchat.context import Policy
from mmchat.embedding import RowKey, common_prefix, row_keys
from mmchat.engine import Done, Engine, Event, Piece, Sampling
from mmchat.prompt import Message, Picture, Text, render
from mmchat.record import ImageHandle
from mmchat.runtime import Runtime
from mmchat.session import Session

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 64}

# Shares of the cap that a trim leaves at least; 1 trims the minimum, 0.5 is the default.
KEEPS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
REENCODE = "re-encode and resend everything"
ONE_IMAGE = "one image per conversation"


@dataclass(frozen=True)
class Request:
    """One question and what it took.

    rows: of the prompt.  computed: of the answer, those that the cache then holds.  new: rows that were new.
    n_changes: what was degraded for it to fit.
    alone: the work of asking each picture that the question is about in a conversation of its own.
    """

    rows: tuple[RowKey, ...]
    computed: tuple[int, ...]
    new: int
    n_prefilled: int
    n_answer: int
    n_slices: int
    n_changes: int
    alone: Work


@dataclass
class Counted:
    """A conversation's requests, and the keys of all its slices."""

    name: str
    requests: list[Request] = field(default_factory=list)
    slices: set[str] = field(default_factory=set)


class _Listener:
    """An Engine that remembers the last request of the one it passes everything on to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: list[RowKey] = []
        self.done: Done | None = None

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
        self.rows = row_keys(pieces)
        for event in self._engine.generate(pieces, sampling, should_stop, resume_ids=resume_ids):
            if isinstance(event, Done):
                self.done = event
            yield event


def count(conversation: Conversation, runtime: Runtime) -> Counted:
    """Run a conversation on a runtime that has done nothing yet, store included; what it took."""
    listener = _Listener(runtime.llm)
    counted = Counted(conversation.name)
    known: dict[int, ImageHandle] = {}
    talks: dict[int, _Talk] = {}
    for step in conversation.steps:
        if step.session not in talks:
            talks[step.session] = _Talk(_session(runtime, listener, conversation))
        talk = talks[step.session]
        if not isinstance(step, Ask):
            talk.session.undo(step.n_turns)
            del talk.before[-step.n_turns :]
            continue
        pictures = [draw(seed, conversation.size) for seed in step.new]
        reply = talk.session.ask(step.text, pictures, **GREEDY)
        usage = reply.usage
        handles = [part for part in talk.session.turns[-1].parts if isinstance(part, ImageHandle)]
        known.update(zip(step.new, handles, strict=True))
        counted.slices.update(key for handle in handles for key in handle.keys)
        done = listener.done
        assert done is not None
        rows = tuple(listener.rows)
        # A token that ended the answer by its number was generated, but never fed to the model.
        computed = done.ids[:-1] if done.reason == "length" else done.ids
        if _begins_with(rows, talk.before[-1] if talk.before else ()):
            known_rows = max(common_prefix(other.left, rows) for other in talks.values())
            new = len(rows) - min(known_rows, len(rows) - 1)
        else:
            new = _rows_of_question([*handles, step.text], runtime)
        alone = _alone(step, [known[seed] for seed in step.about or step.new], usage.n_new, runtime)
        counted.requests.append(
            Request(
                rows, computed, new, usage.n_prefilled, usage.n_new, usage.slices_encoded, len(reply.degraded), alone
            )
        )
        talk.left = (*rows, *computed)
        talk.before.append(talk.left)
    return counted


@dataclass
class _Talk:
    """A session; the rows that a cache would hold after each recorded turn (before), and after the last one (left)."""

    session: Session
    before: list[tuple[RowKey, ...]] = field(default_factory=list)
    left: tuple[RowKey, ...] = ()


def _begins_with(rows: Sequence[RowKey], before: Sequence[RowKey]) -> bool:
    return common_prefix(rows, before) == len(before)


def _rows_of_question(parts: Sequence[ImageHandle | str], runtime: Runtime) -> int:
    said = [Message("user", (Text("a"),)), Message("assistant", ids=())]
    question = Message("user", tuple(_part(part) for part in parts))
    return _n_rows([*said, question], runtime) - _n_rows(said[:1], runtime)


def _session(runtime: Runtime, engine: Engine, conversation: Conversation) -> Session:
    return Session(
        runtime.spec,
        runtime.tokenizer,
        runtime.store,
        runtime.vision,
        engine,
        max_slice_nums=conversation.max_slice_nums,
        policy=conversation.policy,
    )


def _part(part: ImageHandle | str) -> Text | Picture:
    return Text(part) if isinstance(part, str) else Picture(part.plan, part.keys)


def _n_rows(messages: Sequence[Message], runtime: Runtime) -> int:
    spec = runtime.spec
    rendered = render(messages, runtime.tokenizer, query_num=spec.vision.query_num, use_image_id=spec.use_image_id)
    return rendered.n_rows


def _alone(step: Ask, pictures: Sequence[ImageHandle], n_new: int, runtime: Runtime) -> Work:
    work = Work()
    for parts in [[_part(picture), Text(step.text)] for picture in pictures] or [[Text(step.text)]]:
        n_views = sum(part.plan.n_inputs for part in parts if isinstance(part, Picture))
        n_rows = _n_rows([Message("user", tuple(parts))], runtime)
        work += Work(n_views, n_rows - n_views * runtime.spec.vision.query_num, n_views, n_new)
    return work


def _work(rows: Sequence[RowKey], n_slices: int, n_new: int, query_num: int) -> Work:
    n_text = sum(isinstance(row, int) for row in rows)
    return Work(n_slices, n_text, (len(rows) - n_text) / query_num, n_new)


def _sums(
    counted: Counted, engine: str, strategy: str, how: str, prefilled: Sequence[int], query_num: int
) -> dict[str, Any]:
    """The figures of one conversation, with prefilled rows (the last ones) of each request."""
    requests = counted.requests
    ours, reencoded, alone = Work(), Work(), Work()
    for request, n in zip(requests, prefilled, strict=True):
        ours += _work(request.rows[len(request.rows) - n :], request.n_slices, request.n_answer, query_num)
        whole = _work(request.rows, 0, request.n_answer, query_num)
        reencoded += whole + Work(n_slices=round(whole.n_image_views))
        alone += request.alone
    n_slices, n_new = sum(request.n_slices for request in requests), sum(request.new for request in requests)
    return {
        "name": counted.name,
        "engine": engine,
        "strategy": strategy,
        "counted": how,
        "turns": len(requests),
        "slices_encoded": n_slices,
        "slices_distinct": len(counted.slices),
        "slices_ratio": n_slices / len(counted.slices),
        "rows_prefilled": sum(prefilled),
        "rows_new": n_new,
        "rows_ratio": sum(prefilled) / n_new,
        "tokens_generated": sum(request.n_answer for request in requests),
        "predicted_rk3588_s": predicted_s(ours),
        "peers": {REENCODE: predicted_s(reencoded), ONE_IMAGE: predicted_s(alone)},
    }


def _by_the_rules(requests: Sequence[Request], strategy: str) -> list[int]:
    """Rows that RKLLM would prefill, by the rules of mmchat.rkllm_embed and where the library keeps to them."""
    held: tuple[RowKey, ...] = ()
    prefilled = []
    for request in requests:
        common = min(common_prefix(held, request.rows), len(request.rows) - 1)
        if strategy == "resend" or (strategy == "append" and common < len(held)):
            common = 0
        prefilled.append(len(request.rows) - common)
        held = (*request.rows, *request.computed)
    return prefilled


def describe(counted: Counted, runtime: Runtime) -> list[dict[str, Any]]:
    """A conversation's figures: as it ran, and as it would be with RKLLM's strategies."""
    query_num = runtime.spec.vision.query_num
    measured = [request.n_prefilled for request in counted.requests]
    if runtime.spec.board:
        return [_sums(counted, "rkllm", runtime.strategy, "run", measured, query_num)]
    return [
        _sums(counted, "openvino", "rewind", "run", measured, query_num),
        *(
            _sums(counted, "rkllm", strategy, "rules", _by_the_rules(counted.requests, strategy), query_num)
            for strategy in ("resend", "append", "prefix")
        ),
    ]


def run(model: str, say: Callable[[str], None]) -> dict[str, Any]:
    """All conversations, and the overflowing one over the share of the cap that a trim leaves; and that in the planner
    alone, for a board's context.

    Raises what opening the model and asking raise.
    """

    def hold(conversation: Conversation) -> list[dict[str, Any]]:
        say(f"work: {conversation.name}" + (f", {conversation.policy.keep:g} kept" if conversation.policy else ""))
        with (
            tempfile.TemporaryDirectory() as folder,
            mmchat.open(model, store=folder, context_rows=conversation.context_rows) as runtime,
        ):
            counted = count(conversation, runtime)
            trims = [len(request.rows) / runtime.context_rows for request in counted.requests if request.n_changes]
            return [
                {**one, "trims": len(trims), "kept_least": min(trims, default=None)}
                for one in describe(counted, runtime)
            ]

    found = [figures for conversation in (*STANDARD, OVERFLOW) for figures in hold(conversation)]
    curve = []
    for keep in KEEPS:
        figures = hold(replace(OVERFLOW, policy=Policy(keep=keep)))[0]
        names = ("trims", "kept_least", "rows_prefilled", "rows_new", "rows_ratio", "slices_ratio")
        curve.append({"keep": keep, **{name: figures[name] for name in names}})
    return {"conversations": found, "overflow_curve": curve, "rehearsals": rehearsal.curves(KEEPS)}
