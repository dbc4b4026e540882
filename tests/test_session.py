"""Sessions on a fake engine and a fake encoder: first by an oracle, then one thing at a time."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from PIL import Image

from mmchat.bundle import Bundle
from mmchat.context import Policy
from mmchat.embedding import common_prefix
from mmchat.engine import Encoded, Event, ImageRows, Piece, Restarted, Sampling, Token
from mmchat.errors import (
    BundleError,
    ContextFull,
    EngineError,
    ImageError,
    MissingEmbeddings,
    MmchatError,
    PromptError,
    SessionError,
    WorkerDied,
)
from mmchat.forecast import Outlook
from mmchat.model_dir import open_model
from mmchat.prompt import DEFAULT_SYSTEM_PROMPT, ChatTokenizer, Message, Picture, Text, render
from mmchat.record import ImageHandle, Marks, Turn, Usage
from mmchat.runtime import Runtime
from mmchat.saving import Restored
from mmchat.session import Reply, Session
from mmchat.slicing import SlicePlan
from mmchat.store import Store
from tests.fakes import FakeEngine, FakeVision

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
QUERY_NUM, WIDTH = SPEC.vision.query_num, SPEC.llm.hidden_size


class FaultyEngine(FakeEngine):
    """Raises fault instead of the event with this number, once; loses a key of the store before a request, once.

    death: dies before the event with this number, once, and another worker goes on, as mmchat.llm_proc has it.
    requests: what it was sent.  most_rows: that it ever held.
    """

    fault: tuple[int, Exception] | None = None
    lose: Callable[[], None] | None = None
    death: int | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requests: list[tuple[Piece, ...]] = []
        self.most_rows = 0

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        self.requests.append(tuple(pieces))
        lose, self.lose = self.lose, None
        if lose:
            lose()
        script, shown = self.script[:1], list(resume_ids)
        for number, event in enumerate(super().generate(pieces, sampling, should_stop, resume_ids=resume_ids)):
            if self.fault and number == self.fault[0]:
                (_, error), self.fault = self.fault, None
                raise error
            if number == self.death:
                self.death, self.held, self.script = None, [], script
                yield Restarted("it died")
                yield from super().generate(pieces, sampling, should_stop, resume_ids=shown)
                return
            if isinstance(event, Token):
                shown.append(event.id)
            self.most_rows = max(self.most_rows, len(self.held))
            yield event


@dataclass
class Setup:
    """A session and everything below it."""

    root: Path
    context_rows: int = 2048
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store(self.root / "store")
        self.engine = FaultyEngine(TOKENIZER, self.store, WIDTH, context_rows=self.context_rows)
        self.vision = FakeVision(self.store, QUERY_NUM, WIDTH)
        self.outlook = Outlook()
        self.chat = self.another()

    def another(self, turns: Sequence[Turn] = (), marks: Marks | None = None) -> Session:
        """Another session on the same engine."""
        return Session(
            SPEC,
            TOKENIZER,
            self.store,
            self.vision,
            self.engine,
            turns=turns,
            marks=marks,
            outlook=self.outlook,
            **self.options,
        )

    def says(self, answer: str) -> Setup:
        self.engine.script.append(answer)
        return self

    def ask(self, answer: str, *args: Any, **kwargs: Any) -> Reply:
        reply = self.says(answer).chat.ask(*args, **kwargs)
        assert reply.text == answer
        return reply


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def picture(colour: str = "red", size: tuple[int, int] = (56, 42)) -> Image.Image:
    return Image.new("RGB", size, colour)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# The oracle

ANSWERS = ["red", "It is a circle.", "Two: one is blue, the other green.", "café 😀"]
# One view, one view of another shape, and one that is cut into cells of which some are equal.
PICTURES = [picture("red"), picture("blue", (30, 90)), picture("white", (200, 150))]
CUT = 2
TEXTS = ["What?", " ", "ok\n", "Is @img1 like @img2?", "@img7 and img1"]
CONTEXT_ROWS, RESERVED = 260, 60


def handles() -> list[ImageHandle]:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder))
        setup.says("Three.").chat.ask("What?", PICTURES).text  # noqa: B018
        return setup.chat.images


HANDLES = handles()  # of PICTURES


@dataclass(frozen=True)
class Known:
    """What the oracle knows of a turn.  question: texts, and pictures by their place in PICTURES."""

    question: tuple[str | int, ...]
    text: str
    reply: Reply


@dataclass
class Oracle:
    """A session, and what its user has seen of it."""

    chat: Session
    turns: list[Known]

    def expected(self, question: Sequence[str | int], base: int, marks: Marks) -> tuple[Piece, ...]:
        """What the engine must be sent, laid out from what was said; the session is asked for marks and tokens only."""
        messages = [Message("system", (Text(DEFAULT_SYSTEM_PROMPT),))]
        names: dict[str, str] = {}
        n_images = n_seen = 0
        asked = [(known.question, known.text) for known in self.turns[:base]] + [(tuple(question), "")]
        for number, (parts, answer) in enumerate(asked, 1):
            n_pictures = sum(isinstance(part, int) for part in parts)
            said: list[Text | Picture] = []
            for part in parts:
                if isinstance(part, str):
                    said.append(Text(part))
                    continue
                n_images += 1
                name = f"img{n_images}"
                handle = HANDLES[part]
                form = marks.forms.get(name, "whole")
                if form in ("described", "line") or number in marks.dropped:
                    names[name] = name
                    about = f"described as: {answer}" if form == "described" and n_pictures == 1 else "not shown"
                    said.append(Text(f"[{name}: {handle.size[0]}x{handle.size[1]} picture, {about}]"))
                else:
                    n_seen += 1
                    names[name] = f"image {n_seen}"
                    one_view = SlicePlan(handle.size, handle.plan.source)
                    whole, overview = Picture(handle.plan, handle.keys), Picture(one_view, handle.keys[:1])
                    said.append(whole if form == "whole" else overview)
            for name, called in names.items():
                said = [Text(p.text.replace(f"@{name}", called)) if isinstance(p, Text) else p for p in said]
            if number not in marks.dropped:
                messages.append(Message("user", tuple(said)))
                messages += [Message("assistant", ids=self.chat.turns[number - 1].ids)] if number <= base else []
        return render(messages, TOKENIZER, query_num=QUERY_NUM).pieces


class Conversations(RuleBasedStateMachine):
    """Up to three conversations on one engine; whose turn it is changes at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.setup = Setup(Path(self.folder.name), CONTEXT_ROWS)
        self.engine, self.store = self.setup.engine, self.setup.store
        self.oracles = [Oracle(self.setup.chat, []), Oracle(self.setup.another(), [])]
        self.at = 0
        self.outlook_is_right = True  # the last request ended well
        self.rows_wanted = self.rows_told = self.n_encoded_again = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @property
    def oracle(self) -> Oracle:
        return self.oracles[self.at % len(self.oracles)]

    @property
    def chat(self) -> Session:
        return self.oracle.chat

    @rule(to=st.integers(0, 2))
    def another_conversation_goes_on(self, to: int) -> None:
        self.at = to

    # What every question shares

    def begin(self, question: Sequence[str | int], answer: str, edited: int = 0) -> Reply:
        """edited: number of the turn that the question takes the place of; 0: it is a new one."""
        self.engine.script[:] = [answer]
        parts = [PICTURES[part] if isinstance(part, int) else part for part in question]
        if edited:
            return self.chat.edit(edited, parts, max_new_tokens=RESERVED)
        return self.chat.ask(parts, max_new_tokens=RESERVED)

    def state(self) -> Any:
        return [(oracle.chat.turns, oracle.chat.images, oracle.chat.marks) for oracle in self.oracles]

    def to_send(self, reply: Reply) -> tuple[Piece, ...]:
        """What a reply that has not run will send.  Raises ContextFull."""
        turns = self.chat.turns[: reply._base]
        question = self.chat._question(prepared(reply), turns)
        return self.chat._plan(turns, self.chat.marks.of(turns), question, reply.sampling)[1].pieces

    def too_long(self, reply: Reply) -> bool:
        """Whether even what must stay does not fit any more; it is then refused, and nothing else happens."""
        n_requests, before = self.engine.n_requests, self.state()
        try:
            self.to_send(reply)
            return False
        except ContextFull:
            pass
        with pytest.raises(ContextFull) as caught:
            list(reply)
        assert caught.value.n_prompt + RESERVED > caught.value.limit == CONTEXT_ROWS
        assert self.engine.n_requests == n_requests
        assert self.state() == before
        return True

    def record(
        self,
        question: Sequence[str | int],
        reply: Reply,
        seen: str,
        before: tuple[Marks, list[Any]],
        *,
        whole: bool = True,
        n_lost: int = 0,
        died: bool = False,
    ) -> None:
        """before: the marks and what the engine held."""
        (marks, held), usage, turn = before, reply.usage, self.chat.turns[-1]
        base = len(self.chat.turns) - 1
        pieces = self.engine.requests[-1]
        assert pieces == self.oracle.expected(question, base, reply.plan.marks)
        n_rows = sum(piece.n_rows for piece in pieces)
        assert n_rows == reply.plan.rows == usage.n_prompt <= CONTEXT_ROWS - RESERVED
        assert self.chat.marks == reply.plan.marks
        wanted = render_rows(self.oracle.expected(question, base, marks.of(self.chat.turns[:base])))
        assert bool(reply.degraded) == (len(wanted) + RESERVED > CONTEXT_ROWS)

        self.rows_wanted += n_rows
        self.rows_told += usage.n_reused + usage.n_prefilled
        n_same = min(common_prefix(held, render_rows(pieces)), n_rows - 1)
        assert usage.n_reused == (0 if died else n_same)
        if self.outlook_is_right and not died:
            assert reply.plan.rows_reused == n_same
        self.outlook_is_right = True

        del self.oracle.turns[base:]
        self.oracle.turns.append(Known(tuple(question), seen, reply))
        assert reply.text == turn.text == seen
        assert turn.usage is reply.usage_so_far
        sent = {piece.key for piece in pieces if isinstance(piece, ImageRows)}  # not what is forgotten already
        slices = [key for handle in turn.images for key in handle.keys if key in sent]
        if whole:
            assert usage.n_new == len(turn.ids)
            assert usage.slices_encoded + usage.slices_cached == len(slices) + n_lost

    def now(self) -> tuple[Marks, list[Any]]:
        return self.chat.marks, list(self.engine.held)

    def expect_failure(self, reply: Reply, error: type[Exception]) -> None:
        before = self.state()
        with pytest.raises(error):
            list(reply)
        with pytest.raises(error):  # and again, without running again
            assert reply.text
        assert self.state() == before

    def a_turn(self, which: int) -> int:
        """Number of some turn; 0 where there is none."""
        return 1 + which % len(self.oracle.turns) if self.oracle.turns else 0

    # Rules

    questions = st.lists(st.one_of(st.integers(0, 2), st.sampled_from(TEXTS)), max_size=3).map(
        lambda parts: [*parts, "Why?"]
    )
    answers = st.sampled_from(ANSWERS)
    which = st.integers(0, 100)

    @rule(question=questions, answer=answers, by=st.sampled_from(["text", "usage", "loop"]))
    def ask(self, question: list[str | int], answer: str, by: str) -> None:
        reply, before = self.begin(question, answer), self.now()
        if self.too_long(reply):
            return
        if by == "loop":
            assert "".join(reply) == answer
        else:
            getattr(reply, by)
        assert reply.stop_reason == "stop"
        self.record(question, reply, answer, before)

    @rule(question=questions, answer=answers)
    def plan_before_asking(self, question: list[str | int], answer: str) -> None:
        reply, before, state = self.begin(question, answer), self.now(), self.state()
        files, n_requests = sorted(self.store.root.rglob("*")), self.engine.n_requests
        parts = [PICTURES[part] if isinstance(part, int) else part for part in question]
        try:
            plan = self.chat.plan(parts, max_new_tokens=RESERVED)
        except ContextFull:
            assert self.too_long(reply)
            return
        assert (self.state(), self.engine.n_requests) == (state, n_requests)
        assert sorted(self.store.root.rglob("*")) == files
        assert reply.text == answer
        assert reply.plan == plan
        assert plan.slices_new == reply.usage.slices_encoded
        self.record(question, reply, answer, before)

    @rule(question=questions, answer=answers, n=st.integers(1, 3), how=st.sampled_from(["break", "cancel", "close"]))
    def stop_in_the_middle(self, question: list[str | int], answer: str, n: int, how: str) -> None:
        reply, before = self.begin(question, answer), self.now()
        if self.too_long(reply):
            return
        seen: list[str] = []
        texts: Any = iter(reply)
        for text in texts:
            seen.append(text)
            if len(seen) == n:
                if how == "cancel":
                    reply.cancel()
                else:
                    break
        if how == "close":
            texts.close()
        del texts, text
        whole = "".join(seen) == answer and reply.stop_reason == "stop"
        assert answer.startswith("".join(seen))
        if not whole:
            assert reply.stop_reason == "cancelled"
        assert list(reply) == seen
        self.record(question, reply, "".join(seen), before, whole=whole)

    @rule(question=questions)
    def cancel_before_it_runs(self, question: list[str | int]) -> None:
        reply, before = self.begin(question, "never"), self.state()
        reply.cancel()
        if self.too_long(reply):
            return
        assert (reply.text, reply.stop_reason) == ("", "cancelled")
        assert self.state() == before

    @rule(question=questions)
    def forget_it_before_it_runs(self, question: list[str | int]) -> None:
        self.begin(question, "never")

    @rule(question=questions, answer=answers, at=st.integers(0, 3), died=st.booleans(), edited=st.booleans())
    def the_engine_fails(self, question: list[str | int], answer: str, at: int, died: bool, edited: bool) -> None:
        reply = self.begin(question, answer, self.a_turn(at) if edited else 0)
        if self.too_long(reply):
            return
        error = WorkerDied("it died", name="LLM") if died else EngineError("it failed")
        self.engine.fault = (min(at, len(TOKENIZER.encode(answer))), error)
        self.expect_failure(reply, type(error))
        self.outlook_is_right = False

    @rule(question=questions, answer=answers, at=st.integers(0, 3))
    def the_worker_dies_and_another_goes_on(self, question: list[str | int], answer: str, at: int) -> None:
        reply, before = self.begin(question, answer), self.now()
        if self.too_long(reply):
            return
        self.engine.death = min(at, len(TOKENIZER.encode(answer)))
        assert "".join(reply) == answer
        assert reply.usage.restarts == 1
        self.record(question, reply, answer, before, died=True)

    @rule(shade=st.integers(0, 255))
    def the_encoder_fails(self, shade: int) -> None:
        reply = self.chat.ask(["Why?", picture(f"rgb(0, {shade}, 99)")], max_new_tokens=RESERVED)
        if self.too_long(reply):
            return
        self.setup.vision.faults = [WorkerDied("it died", name="vision")]
        self.expect_failure(reply, WorkerDied)

    @rule(question=questions, answer=answers, which=which)
    def an_embedding_is_lost(self, question: list[str | int], answer: str, which: int) -> None:
        """Of a picture that was sent before, just before the engine reads it again."""
        reply, before = self.begin(question, answer), self.now()
        if self.too_long(reply):
            return
        keys = [piece.key for piece in self.to_send(reply) if isinstance(piece, ImageRows)]
        gone = {key for image in self.chat.images if not is_there(image) for key in image.keys}  # saved without
        keys = [key for key in keys if self.store.peek(key) and key not in gone]
        if not keys:
            return
        lost = keys[which % len(keys)]
        self.engine.lose = partial(os.unlink, self.store._path(lost))
        n_encoded = len(self.setup.vision.encoded)
        assert reply.text == answer
        n_new = reply.plan.slices_new
        assert self.setup.vision.encoded[n_encoded + n_new :] == [lost]
        self.n_encoded_again += 1
        self.outlook_is_right = False
        self.record(question, reply, answer, before, n_lost=1)

    @rule()
    def ask_too_much(self) -> None:
        reply, before = self.chat.ask("why " * CONTEXT_ROWS), self.state()
        with pytest.raises(ContextFull):
            list(reply)
        assert self.state() == before

    @rule(n=st.integers(1, 3))
    def undo(self, n: int) -> None:
        if n > len(self.oracle.turns):
            with pytest.raises(SessionError, match=f"cannot take back {n}"):
                self.chat.undo(n)
            return
        taken = self.chat.undo(n)
        assert [turn.text for turn in taken] == [known.text for known in self.oracle.turns[-n:]]
        del self.oracle.turns[-n:]

    @rule(question=questions, answer=answers, which=which)
    def edit(self, question: list[str | int], answer: str, which: int) -> None:
        number = self.a_turn(which)
        if not number:
            with pytest.raises(SessionError, match="there is no turn yet"):
                self.chat.edit(1, "Why?")
            return
        reply, before = self.begin(question, answer, number), self.now()
        if self.too_long(reply):
            return
        assert reply.text == answer
        assert len(self.chat.turns) == number
        self.record(question, reply, answer, before)

    @rule(answer=answers)
    def regenerate(self, answer: str) -> None:
        if not self.oracle.turns:
            return
        question, before = self.oracle.turns[-1].question, self.now()
        self.engine.script[:] = [answer]
        reply = self.chat.regenerate(max_new_tokens=RESERVED)
        if self.too_long(reply):
            return
        images = self.chat.images
        assert reply.text == answer
        assert self.chat.images == images
        self.record(question, reply, answer, before)

    @rule(which=which)
    def branch(self, which: int) -> None:
        """It answers as a session does that was made with the same record, and the two share nothing."""
        at = which % (1 + len(self.oracle.turns))
        one, other = self.chat.branch(at), self.setup.another(self.chat.turns[:at], self.chat.marks)
        assert (one.turns, one.marks, one.images) == (other.turns, other.marks, other.images)
        self.engine.script.clear()
        try:
            texts = [chat.ask("Why?", max_new_tokens=5).text for chat in (one, other)]
        except ContextFull:  # what is pinned is too much
            return
        assert texts[0] == texts[1]
        assert len(self.chat.turns) == len(self.oracle.turns)
        self.oracles[2:] = [Oracle(self.chat.branch(at), self.oracle.turns[:at])]

    @rule(by=st.sampled_from(["save", "autosave", "go on"]), form=st.sampled_from(["original", "reencoded", "none"]))
    def another_program_goes_on(self, by: str, form: str) -> None:
        """It knows nothing but the file; the one before it is gone, and so are all answers that had not begun."""
        if self.chat.saved_to is None or by == "save":
            path = Path(self.folder.name) / f"talk {len(list(Path(self.folder.name).iterdir()))}"
            getattr(self.chat, "save" if by == "save" else "autosave")(path, images=form)
        path = self.chat.saved_to or path
        before = self.state()
        self.chat.autosave(None)
        bundle = Bundle(path, write=by != "save")
        restored = Restored(bundle, SPEC, TOKENIZER, self.store)
        self.oracle.chat = Session(
            SPEC, TOKENIZER, self.store, self.setup.vision, self.engine, outlook=self.setup.outlook, **restored.options
        )
        if by != "save":
            self.chat.resume(bundle)
        assert self.state() == before
        assert (self.chat.notes, self.chat.policy) == ((), Policy())

    @rule(which=which, how=st.sampled_from(["pin", "unpin", "forget", "reattach"]))
    def a_picture_is_pinned_forgotten_or_reattached(self, which: int, how: str) -> None:
        images = self.chat.images
        if not images:
            with pytest.raises(SessionError, match="there is no picture 'img1'"):
                getattr(self.chat, how)("img1")
            return
        image = images[which % len(images)]
        getattr(self.chat, how)(image if which % 2 else f"@{image.id}")
        marks = self.chat.marks
        assert (image.id in marks.pinned) or how != "pin"
        assert (image.id not in marks.pinned) or how not in ("unpin", "forget")
        sent = {piece.key for piece in self.chat.prompt().pieces if isinstance(piece, ImageRows)}
        if how == "reattach":
            assert set(image.keys) <= sent
        elif how == "forget" and [other.keys for other in images].count(image.keys) == 1:
            assert not set(image.keys) & sent

    @rule(which=which, how=st.sampled_from(["pin", "unpin"]))
    def a_turn_is_pinned(self, which: int, how: str) -> None:
        number = self.a_turn(which)
        if number:
            getattr(self.chat, how)(number)
            assert (number in self.chat.marks.pinned_turns) == (how == "pin")
        with pytest.raises(SessionError, match="there is no turn"):
            getattr(self.chat, how)(len(self.oracle.turns) + 1)

    @rule(question=questions, answer=answers)
    def do_something_while_an_answer_is_running(self, question: list[str | int], answer: str) -> None:
        reply, before = self.begin(question, answer), self.now()
        if self.too_long(reply):
            return
        texts = iter(reply)
        first = next(texts)
        other = self.chat.ask("Me too?")
        with pytest.raises(SessionError, match="finish or close it first"):
            list(other)
        for call, doing in (
            (lambda: self.chat.undo(), "undoing"),
            (lambda: self.chat.pin(1), "pinning"),
            (lambda: self.chat.forget("img1"), "forgetting"),
            (lambda: self.chat.reattach("img1"), "reattaching"),
        ):
            with pytest.raises(SessionError, match=f"finish or close it before {doing}"):
                call()
        assert len(self.chat.branch().turns) == len(self.oracle.turns)
        assert first + "".join(texts) == answer
        self.record(question, reply, answer, before)

    @rule(which=which)
    def read_an_old_answer_again(self, which: int) -> None:
        number = self.a_turn(which)
        if number:
            known = self.oracle.turns[number - 1]
            n_requests = self.engine.n_requests
            assert "".join(known.reply) == known.reply.text == known.text
            assert self.engine.n_requests == n_requests

    # What is always so

    @invariant()
    def what_is_kept_is_the_record(self) -> None:
        for oracle in self.oracles:
            if oracle.chat.saved_to is not None:
                assert oracle.chat.unsaved is None
                restored = Restored(Bundle(oracle.chat.saved_to), SPEC, TOKENIZER, self.store)
                assert restored.notes == []
                assert (restored.turns, restored.marks) == (oracle.chat.turns, oracle.chat.marks)

    @invariant()
    def the_record_is_what_the_user_saw(self) -> None:
        for oracle in self.oracles:
            turns = oracle.chat.turns
            assert [turn.text for turn in turns] == [known.text for known in oracle.turns]
            for turn, known in zip(turns, oracle.turns, strict=True):
                assert [part for part in turn.parts if isinstance(part, str)] == [
                    part for part in known.question if isinstance(part, str)
                ]
                data = b"".join(map(TOKENIZER.token_bytes, turn.ids))
                assert data.decode(errors="ignore") == turn.text

    @invariant()
    def the_pictures_are_those_of_the_turns(self) -> None:
        for oracle in self.oracles:
            images = oracle.chat.images
            wanted = [
                (HANDLES[part].keys, number)
                for number, known in enumerate(oracle.turns, 1)
                for part in known.question
                if isinstance(part, int)
            ]
            assert [(image.keys, image.turn) for image in images] == wanted
            assert [image.id for image in images] == [f"img{i}" for i in range(1, len(wanted) + 1)]
            assert oracle.chat.marks == oracle.chat.marks.of(oracle.chat.turns)

    @invariant()
    def never_over_the_cap_and_no_row_unaccounted_for(self) -> None:
        assert self.engine.most_rows <= CONTEXT_ROWS
        assert self.rows_told == self.rows_wanted

    @invariant()
    def every_slice_was_encoded_once(self) -> None:
        encoded = self.setup.vision.encoded
        assert len(encoded) == len(set(encoded)) + self.n_encoded_again

    @invariant()
    def the_conversations_can_go_on(self) -> None:
        for oracle in self.oracles:
            oracle.chat.check_idle()
        assert not list((self.store.root / "leases").iterdir())


def render_rows(pieces: Sequence[Piece]) -> list[Any]:
    """As the fake engine compares them."""
    return [
        row
        for piece in pieces
        for row in ([(piece.key, i) for i in range(piece.n_rows)] if isinstance(piece, ImageRows) else piece.ids)
    ]


def is_there(image: ImageHandle) -> bool:
    """Whether a picture can be cut again."""
    try:
        return bool(image.pixels())
    except BundleError:
        return False


def prepared(reply: Reply) -> Any:
    """The parts of a reply that has not run yet."""
    return reply._prepared


@pytest.mark.timeout(3600)  # the deep profile's
def test_conversations() -> None:
    run_state_machine_as_test(Conversations, settings=settings(stateful_step_count=20))


# One thing at a time


def test_a_picture_is_a_path_bytes_a_pil_image_or_an_array(setup: Setup, tmp_path: Path) -> None:
    image = picture("green", (60, 40))
    file = tmp_path / "green.png"
    file.write_bytes(png(image))
    sources = [file, str(file), png(image), image, np.asarray(image)]
    setup.ask("Green.", "What colour?", images=sources)
    images = setup.chat.images
    assert [image.size for image in images] == [(60, 40)] * 5
    assert [image.name for image in images] == ["green.png", "green.png", "", "", ""]
    assert len({image.keys for image in images}) == 1
    assert setup.vision.encoded == list(images[0].keys)
    usage = setup.chat.turns[-1].usage
    assert (usage.slices_encoded, usage.slices_cached) == (1, 4)


def test_pictures_stand_where_they_are_named(setup: Setup, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(picture("red")))
    setup.ask("No.", ["Is", file, "like", picture("blue"), "?"], images=[picture("white")])
    assert [part if isinstance(part, str) else part.id for part in setup.chat.turns[0].parts] == [
        "img1", "Is", "img2", "like", "img3", "?",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "  \n", [], [" "]])
def test_an_empty_question_is_refused_at_once(setup: Setup, text: Any) -> None:
    with pytest.raises(SessionError, match="question is empty"):
        setup.chat.ask(text, images=[picture()])


def test_a_bad_picture_is_refused_at_once(setup: Setup, tmp_path: Path) -> None:
    for bad in (tmp_path / "none.png", b"no picture", np.zeros((3, 3, 3), np.int64), 5):
        with pytest.raises(ImageError):
            setup.chat.ask("What?", images=[bad])  # type: ignore[list-item]
    assert setup.chat.turns == []


def test_sampling_values_are_checked_at_once(setup: Setup) -> None:
    with pytest.raises(PromptError, match=r"unknown sampling value.*'temprature'.*known"):
        setup.chat.ask("What?", temprature=1.0)
    with pytest.raises(PromptError, match="top_p is 2"):
        setup.chat.ask("What?", top_p=2)


def test_the_models_own_sampling_is_the_default(setup: Setup) -> None:
    reply = setup.chat.ask("What?", top_k=3)
    assert reply.sampling.top_k == 3
    assert reply.sampling.max_new_tokens == SPEC.sampling.max_new_tokens
    assert reply.sampling.seed is not None  # so that a crashed worker's successor goes on with the same


def test_asking_runs_nothing(setup: Setup) -> None:
    setup.chat.ask("What?", images=[picture()])
    assert setup.vision.encoded == []
    assert setup.engine.n_requests == 0


def test_an_answer_runs_once(setup: Setup) -> None:
    reply = setup.says("It is red.").chat.ask("What?")
    assert reply.usage.n_new > 0
    assert reply.stop_reason == "stop"
    assert list(reply) == list(reply)
    assert "".join(reply) == reply.text == "It is red."
    assert setup.engine.n_requests == 1


def test_a_turn_costs_what_it_added(setup: Setup) -> None:
    n_known = 0
    for n in range(4):
        usage = setup.ask("It is red.", "What?", images=[picture("red", (28 * (n + 1), 28))]).usage
        assert (usage.n_reused, usage.n_prefilled) == (n_known, usage.n_prompt - n_known)
        assert usage.n_prompt == setup.chat.prompt().n_rows - len(TOKENIZER.encode("\n")) - 1 - usage.n_new - n_extra()
        n_known = usage.n_prompt + usage.n_new


def spelled(ids: Sequence[int]) -> str:
    return b"".join(map(TOKENIZER.token_bytes, ids)).decode()


def n_extra() -> int:
    """Rows of the header of the next answer, which Session.prompt() ends with."""
    return 1 + len(TOKENIZER.encode("assistant\n"))


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, GeneratorExit])
def test_ctrl_c_while_streaming_keeps_what_was_shown(setup: Setup, interrupted: type[BaseException]) -> None:
    """Raised inside the engine, where a Ctrl-C finds the program waiting."""
    setup.engine.fault = (4, interrupted())  # type: ignore[assignment]
    seen: list[str] = []
    with pytest.raises(interrupted):
        seen.extend(setup.says("It is a red circle.").chat.ask("What?"))
    assert seen
    assert [turn.text for turn in setup.chat.turns] == ["".join(seen)]
    assert setup.chat.turns[0].stop_reason == "cancelled"
    setup.ask("Round.", "And now?")


def test_ctrl_c_before_anything_was_shown_leaves_no_turn(setup: Setup) -> None:
    setup.engine.fault = (0, KeyboardInterrupt())  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        assert setup.says("Red.").chat.ask("What?").text
    assert setup.chat.turns == []
    setup.ask("Round.", "And now?")


def test_the_recorded_tokens_of_an_abandoned_answer_spell_what_was_shown(setup: Setup) -> None:
    """Text that is held back, for it may begin a stop text, was not shown."""
    assert setup.says("Red.").chat.ask("What?", stop=None).text == "Red."
    setup.chat.undo()
    for stop in (5, [""], ["a", 3]):
        with pytest.raises(PromptError, match=r"stop is .* it must be texts that are not empty"):
            setup.chat.ask("What?", stop=stop)
    reply = setup.says("It is red and round.").chat.ask("What?", stop="d and blue")
    for text in reply:
        if "re" in text:
            break
    turn = setup.chat.turns[0]
    assert b"".join(map(TOKENIZER.token_bytes, turn.ids)).decode() == turn.text


def test_a_break_counts_what_was_computed(setup: Setup) -> None:
    reply = setup.says("It is red and round.").chat.ask("What?")
    for _ in reply:
        break
    assert setup.chat.turns[0].usage.n_prompt > 0
    assert setup.chat.turns[0].usage.n_new == len(setup.chat.turns[0].ids)


def test_a_reply_that_came_too_early_can_be_run_later(setup: Setup) -> None:
    """The error says: finish the other one first."""
    first = iter(setup.says("Red.").chat.ask("What?"))
    next(first)
    second = setup.chat.ask("And?")
    with pytest.raises(SessionError, match="finish or close it first"):
        list(second)
    list(first)
    setup.says("Round.")
    assert second.text == "Round."


def test_a_picture_that_is_drawn_on_later_stays_what_it_was(setup: Setup) -> None:
    """As in a loop that draws every frame into one image; its embedding may have to be made again."""
    frame = picture("red")
    setup.ask("Red.", "What?", images=[frame])
    handle = setup.chat.images[0]
    before = [part.tobytes() for part in handle.pixels()]
    frame.paste("blue", (0, 0, *frame.size))
    assert [part.tobytes() for part in handle.pixels()] == before


def test_asking_does_not_change_the_callers_picture(setup: Setup) -> None:
    """A large JPEG may be decoded at a fraction of its size; not behind the back of who opened it."""
    file = io.BytesIO()
    picture("red", (2000, 1600)).save(file, "JPEG")
    with Image.open(file) as opened:
        setup.ask("Red.", "What?", images=[opened])
        assert opened.size == setup.chat.images[0].size == (2000, 1600)
        setup.ask("Red.", "And this?", images=[opened])
        assert opened.size == setup.chat.images[1].size == (2000, 1600)
    assert setup.chat.images[0].keys == setup.chat.images[1].keys


def test_a_file_that_changes_later_stays_what_it_was(setup: Setup, tmp_path: Path) -> None:
    file = tmp_path / "frame.png"
    file.write_bytes(png(picture("red")))
    setup.ask("Red.", "What?", images=[file])
    before = [part.tobytes() for part in setup.chat.images[0].pixels()]
    file.unlink()
    assert [part.tobytes() for part in setup.chat.images[0].pixels()] == before


def test_embeddings_lost_twice_are_an_error(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.vision, "encode", lambda *args: FakeVision.encode(setup.vision, [], *args[1:]))
    with pytest.raises(MissingEmbeddings):
        list(setup.chat.ask("What?", images=[picture()]))
    assert setup.chat.turns == []


def test_cancel_while_lost_embeddings_are_made_again_is_a_cancel(setup: Setup) -> None:
    setup.ask("Red.", "What?", images=[picture()])
    reply = setup.says("Never.").chat.ask("And?")

    def clear() -> None:
        os.unlink(setup.store._path(setup.chat.images[0].keys[0]))
        reply.cancel()

    setup.engine.lose = clear
    assert (reply.text, reply.stop_reason) == ("", "cancelled")
    assert len(setup.chat.turns) == 1


def test_progress_is_told(setup: Setup) -> None:
    reply, waits = setup.says("Red.").chat.ask("What?", images=[picture("white", (200, 150))]), list[Any]()
    reply.on_wait = lambda *args: waits.append(args)
    n_rows = reply.usage.n_prompt
    n_slices = setup.chat.turns[0].usage.slices_encoded
    assert waits == [*(("encode", i + 1, n_slices) for i in range(n_slices)), ("prefill", n_rows, n_rows)]


def test_usage_reads_like_a_table_too(setup: Setup) -> None:
    usage = setup.ask("Red.", "What?").usage
    assert usage["n_prompt"] == usage.n_prompt > 0
    assert set(usage.to_dict()) == set(Usage.__dataclass_fields__)
    assert usage.total_s >= 0


# What fits


SMALL = 300


@pytest.fixture
def small(tmp_path: Path) -> Setup:
    """Room for two pictures that are cut, and not for three; a trim is the least that helps."""
    return Setup(tmp_path, SMALL, {"policy": Policy(keep=1.0)})


def fill(setup: Setup, n: int, **sampling: Any) -> list[Reply]:
    return [setup.ask("Yes.", "What?", [PICTURES[CUT]], max_new_tokens=RESERVED, **sampling) for _ in range(n)]


def test_a_degraded_conversation_is_told_and_stays_so(small: Setup) -> None:
    *_, before, reply = fill(small, 3)
    assert before.degraded == ()
    told = ["img1 is sent without its cells", "img2 is sent without its cells"]
    assert [str(change) for change in reply.degraded] == told
    assert small.chat.marks.forms == {"img1": "overview", "img2": "overview"}
    assert small.vision.encoded == list(dict.fromkeys(HANDLES[CUT].keys))  # one picture, three handles
    after = small.ask("Yes.", "And?", max_new_tokens=RESERVED)
    assert after.degraded == ()
    assert small.chat.marks.forms == {"img1": "overview", "img2": "overview"}
    assert after.usage.n_prefilled == after.usage.n_prompt - reply.usage.n_prompt - reply.usage.n_new


def test_an_overview_is_found_under_the_key_of_the_whole_pictures_source_view(small: Setup) -> None:
    fill(small, 3)
    sent = [piece for piece in small.engine.requests[-1] if isinstance(piece, ImageRows)]
    assert sent[0].key == HANDLES[CUT].keys[0]
    assert [piece.key for piece in sent[2:]] == list(HANDLES[CUT].keys)


def test_a_refusing_policy_refuses_and_says_what_to_do(tmp_path: Path) -> None:
    setup = Setup(tmp_path, SMALL, {"policy": "error"})
    fill(setup, 2)
    with pytest.raises(ContextFull, match=r'holds 300: .*another policy than "error"'):
        list(setup.chat.ask("What?", [PICTURES[CUT]], max_new_tokens=RESERVED))
    assert len(setup.chat.turns) == 2


def test_what_an_engine_is_known_to_take_bounds_the_prompt(tmp_path: Path) -> None:
    setup = Setup(tmp_path, 2048)
    setup.chat._outlook = Outlook(lambda: "resend", longest=lambda: 260 - RESERVED)
    *_, reply = fill(setup, 3)
    assert reply.degraded
    assert reply.usage.n_prompt <= 260 - RESERVED


def test_forgetting_frees_rows_and_reattaching_brings_the_picture_back_in_its_place(setup: Setup) -> None:
    *_, whole = fill(setup, 2)
    setup.chat.forget("img1")
    forgotten = setup.ask("Yes.", "And?", max_new_tokens=RESERVED)
    assert forgotten.usage.n_prompt < whole.usage.n_prompt
    assert setup.chat.numbers == {"img2": 1}
    assert forgotten.degraded == ()  # it was the user's wish, and nothing had to go
    setup.chat.reattach("img1")
    assert setup.chat.numbers == {"img1": 1, "img2": 2}
    n_encoded = len(setup.vision.encoded)
    assert setup.ask("Yes.", "And?").usage.n_prompt > whole.usage.n_prompt
    assert len(setup.vision.encoded) == n_encoded


def test_what_is_reattached_outlives_what_came_after_it(small: Setup) -> None:
    fill(small, 3)
    small.chat.reattach("img1")
    (reply,) = fill(small, 1)
    assert small.chat.marks.form(small.chat.images[0]) == "whole"
    assert {change.what for change in reply.degraded} == {"img2", "img3", "turn 2", "turn 3"}


def test_a_pinned_picture_is_not_degraded(small: Setup) -> None:
    fill(small, 2)
    small.chat.pin("img1")
    (reply,) = fill(small, 1)
    assert "img1" not in {change.what for change in reply.degraded}
    assert small.chat.marks.dropped == {2}


def test_a_name_in_a_question_is_sent_as_the_pictures_number(setup: Setup) -> None:
    fill(setup, 2)
    setup.chat.forget(setup.chat.images[0])
    reply = setup.ask("Yes.", "Is @img2 like @img1 and @img9?")
    sent = setup.engine.requests[-1][-1]
    assert not isinstance(sent, ImageRows)
    assert spelled(sent.ids).endswith("user\nIs image 1 like img1 and @img9?<|im_end|>\n<|im_start|>assistant\n")
    assert reply.plan.unseen == ("img1", "img9")
    assert setup.chat.turns[-1].parts == ("Is @img2 like @img1 and @img9?",)  # the record has what was typed


def test_only_the_newest_turn_is_answered_again(setup: Setup) -> None:
    """A regenerate() that was made before another question would take that one's turn away."""
    setup.ask("One.", "1")
    again = setup.chat.regenerate()
    setup.ask("Two.", "2")
    with pytest.raises(SessionError, match="turn 1, which was to be answered again, is not the last any more"):
        again.text  # noqa: B018
    assert [turn.text for turn in setup.chat.turns] == ["One.", "Two."]
    again = setup.chat.regenerate()
    setup.chat.undo()
    setup.ask("Three.", "3")
    with pytest.raises(SessionError, match="turn 2, which was to be answered again, is not the last any more"):
        again.text  # noqa: B018
    replies = [setup.chat.regenerate(), setup.chat.regenerate()]
    assert [setup.says(text) and reply.text for text, reply in zip(("a", "b"), replies, strict=True)] == ["a", "b"]
    assert [turn.text for turn in setup.chat.turns] == ["One.", "b"]


def test_a_forgotten_picture_is_not_encoded_when_its_question_is_asked_again(setup: Setup) -> None:
    setup.ask("One.", "What?", PICTURES)
    setup.chat.forget("img3")
    setup.store.clear()
    again = setup.says("Uno.").chat.regenerate()
    assert again.plan.slices_new == again.usage.slices_encoded == 2
    assert (again.text, again.usage.slices_cached) == ("Uno.", 0)


def test_a_picture_of_the_conversation_is_shown_again_under_a_new_id(setup: Setup) -> None:
    fill(setup, 1)
    reply = setup.ask("Yes.", "And again?", setup.chat.images)
    assert [image.id for image in setup.chat.images] == ["img1", "img2"]
    assert setup.chat.images[0].keys == setup.chat.images[1].keys
    assert (reply.usage.slices_encoded, reply.usage.slices_cached) == (0, 5)
    with pytest.raises(SessionError, match="img1 is not in this conversation, or not any more"):
        setup.another().ask("What?", setup.chat.images)


# Other ways on


def test_asking_again_after_taking_turns_back_computes_the_new_rows_alone(setup: Setup) -> None:
    fill(setup, 7)
    setup.chat.undo(5)
    last = setup.chat.turns[-1].usage
    usage = setup.ask("Yes.", "Something else?").usage
    assert 0 < usage.n_prefilled <= usage.n_prompt - last.n_prompt - last.n_new


def test_an_edited_turn_goes_on_from_there(setup: Setup) -> None:
    setup.ask("One.", "First?", [PICTURES[0]])
    setup.ask("Two.", ["Is", PICTURES[1], "red?"])
    setup.ask("Three.", "Third?")
    reply = setup.says("Edited.").chat.edit(2, "Blue?")
    assert [turn.text for turn in setup.chat.turns] == ["One.", "Two.", "Three."]  # not yet
    assert reply.text == "Edited."
    assert [turn.text for turn in setup.chat.turns] == ["One.", "Edited."]
    assert [part if isinstance(part, str) else part.id for part in setup.chat.turns[1].parts] == ["img2", "Blue?"]
    assert setup.says("Other.").chat.edit(2, "Blue?", images=[PICTURES[CUT]]).text == "Other."
    assert [image.keys for image in setup.chat.images] == [HANDLES[0].keys, HANDLES[CUT].keys]
    assert setup.says("None.").chat.edit(1, "Blue?", images=[]).text == "None."
    assert setup.chat.images == []


def test_an_edit_that_fails_or_is_cancelled_changes_nothing(setup: Setup) -> None:
    fill(setup, 2)
    turns = setup.chat.turns
    setup.engine.fault = (1, EngineError("it failed"))
    with pytest.raises(EngineError):
        list(setup.says("Never.").chat.edit(1, "Why?"))
    reply = setup.says("Never.").chat.regenerate()
    reply.cancel()
    assert reply.text == ""
    assert setup.chat.turns == turns


def test_an_edit_of_a_turn_that_is_gone_by_then_is_refused(setup: Setup) -> None:
    fill(setup, 2)
    reply = setup.chat.edit(2, "Why?")
    setup.chat.undo(1)
    with pytest.raises(SessionError, match="turn 2, which was to be replaced, is not there"):
        list(reply)
    for number in (0, 2, -1, True, "1"):
        with pytest.raises(SessionError, match=f"there is no turn {number!r}: they are 1 to 1"):
            setup.chat.edit(number, "Why?")  # type: ignore[arg-type]


def test_regenerating_asks_the_same_again_and_keeps_pins(setup: Setup) -> None:
    setup.ask("One.", ["Is", PICTURES[1], "red?"])
    setup.chat.pin("img1")
    setup.chat.pin(1)
    reply = setup.says("Two.").chat.regenerate(temperature=0.5)
    assert (reply.text, reply.sampling.temperature) == ("Two.", 0.5)
    assert [turn.text for turn in setup.chat.turns] == ["Two."]
    assert setup.engine.requests[0] == setup.engine.requests[1]
    assert reply.usage.n_prefilled == 1
    assert (setup.chat.marks.pinned, setup.chat.marks.pinned_turns) == (frozenset({"img1"}), frozenset({1}))
    with pytest.raises(SessionError, match="no turn yet"):
        setup.another().regenerate()


def test_a_pin_is_of_a_picture_and_not_of_its_number(setup: Setup) -> None:
    setup.ask("One.", "First?", [PICTURES[0]])
    setup.ask("Two.", "Second?", [PICTURES[1]])
    setup.chat.pin("img2")
    assert setup.says("Other.").chat.edit(1, "Both?", images=[PICTURES[0], PICTURES[CUT]]).text == "Other."
    assert setup.chat.marks.pinned == frozenset()


def test_what_is_forgotten_stays_so_when_it_is_asked_again(setup: Setup) -> None:
    setup.ask("One.", "First?", [PICTURES[0]])
    setup.chat.forget("img1")
    assert setup.says("Two.").chat.regenerate().text == "Two."
    assert (setup.chat.marks.forms, setup.chat.numbers) == ({"img1": "line"}, {})
    assert setup.says("Three.").chat.edit(1, "Other?", images=[PICTURES[CUT]]).text == "Three."
    assert (setup.chat.marks.forms, setup.chat.numbers) == ({}, {"img1": 1})


def test_an_answer_that_is_being_read_does_not_pretend_to_have_ended(setup: Setup) -> None:
    reply = setup.says("one two three").chat.ask("Count.")
    texts = iter(reply)
    first = next(texts)
    for name in ("text", "stop_reason", "usage", "plan"):
        with pytest.raises(SessionError, match="is being streamed: what there is of it is in text_so_far"):
            getattr(reply, name)
    assert reply.text_so_far == first
    assert "".join([first, *texts]) == "one two three"
    assert (reply.text, reply.stop_reason) == ("one two three", "stop")


def test_a_branch_has_the_settings_and_goes_its_own_way(tmp_path: Path) -> None:
    setup = Setup(tmp_path, options={"system": "Be brief.", "max_slice_nums": 1, "policy": "turns"})
    fill(setup, 3)
    setup.chat.forget("img2")
    branch = setup.chat.branch(at=2)
    assert (branch.system, branch.max_slice_nums, branch.policy) == ("Be brief.", 1, setup.chat.policy)
    assert branch.turns == setup.chat.turns[:2]
    assert branch.marks.forms == {"img2": "line"}
    branch.reattach("img2")
    setup.says("Mine.")
    assert branch.ask("Why?").text == "Mine."
    assert (len(branch.turns), len(setup.chat.turns)) == (3, 3)
    assert setup.chat.marks.forms == {"img2": "line"}
    assert setup.chat.branch().turns == setup.chat.turns
    assert setup.chat.branch(at=0).turns == []
    for at in (-1, 4):
        with pytest.raises(SessionError, match=f"cannot branch after turn {at}"):
            setup.chat.branch(at=at)


SPENT = Usage(slices_encoded=2, encode_s=1.0, n_prefilled=10, prefill_s=1.0, n_new=4, generate_s=1.0)


def test_a_plan_has_the_seconds_that_any_session_of_the_engine_has_measured(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.chat.plan("What?", PICTURES[0]).seconds.first_token is None
    monkeypatch.setattr(Reply, "finish", lambda reply, started, done: reply.count(**SPENT.to_dict()))
    monkeypatch.setattr(setup.vision, "encode", lambda *_: Encoded(0, 0.0, 0))
    setup.ask("Yes.", "Is it?")
    for session in (setup.another(), setup.chat.branch(0), setup.chat):
        plan = session.plan("What?", PICTURES[0])
        assert plan.slices_new == 1
        assert plan.seconds.encode == 0.5
        assert plan.seconds.prefill == pytest.approx(0.1 * plan.rows_new)
        assert plan.seconds.token == 0.25
        assert plan.seconds.sources == ("measured in this run",)


def test_a_loaded_conversation_says_how_fast_it_was_where_it_was_the_same_model(tmp_path: Path) -> None:
    """Runtimes whose workers never start: nothing has run on them."""
    folder = tmp_path / "model"
    shutil.copytree(SPEC.folder, folder)
    store = Store(tmp_path / "store")

    def runtime(n_threads: int = 1) -> Runtime:
        return Runtime(open_model(folder), store, context_rows=2048, n_threads=n_threads)

    turns = [Turn(("What?",), "That.", tuple(TOKENIZER.encode("That.")), "stop", SPENT)] * 2
    runtime()._session(turns=turns, n_foreign=0).save(tmp_path / "mine")
    again = runtime().load(tmp_path / "mine")
    seconds = again.plan("Why?").seconds
    assert (seconds.token, seconds.sources) == (0.25, ("measured in this conversation before",))
    branch = again.branch(1).plan("Why?")
    assert branch.seconds.sources == seconds.sources
    assert branch.seconds.prefill == pytest.approx(branch.rows_new / 10)
    assert runtime().session().plan("Why?").seconds.token is None

    elsewhere = runtime(n_threads=2).load(tmp_path / "mine")
    assert elsewhere.plan("Why?").seconds.token is None
    elsewhere.undo()
    elsewhere.save(tmp_path / "elsewhere")  # its turn is still none of this one's
    assert runtime(n_threads=2).load(tmp_path / "elsewhere").plan("Why?").seconds.token is None

    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert runtime().load(tmp_path / "mine").plan("Why?").seconds.token is None


def test_a_second_thread_in_one_session_is_told(setup: Setup) -> None:
    """Sessions of one engine wait for each other (worker.py)."""
    texts = iter(setup.says("Yes.").chat.ask("What?"))
    next(texts)
    told: list[Exception] = []

    def ask() -> None:
        try:
            list(setup.chat.ask("Me too?"))
        except SessionError as error:
            told.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(20)
    assert "finish or close it first" in str(told[0])
    list(texts)


def test_options_of_a_session(tmp_path: Path) -> None:
    big = picture("white", (400, 300))
    plain = Setup(tmp_path / "a")
    plain.ask("Yes.", "What?", images=[big])
    other = Setup(tmp_path / "b", options={"system": "Be brief.", "max_slice_nums": 1, "use_image_id": False})
    other.ask("Yes.", "What?", images=[big])
    assert (plain.chat.images[0].slices, other.chat.images[0].slices) == (10, 1)
    assert TOKENIZER.special["<image_id>"] in plain.chat.prompt().ids
    assert TOKENIZER.special["<image_id>"] not in other.chat.prompt().ids
    brief = TOKENIZER.encode("Be brief.")
    assert any(other.chat.prompt().ids[i : i + len(brief)] == brief for i in range(10))
    with pytest.raises(ImageError, match="max_slice_nums is 0"):
        Setup(tmp_path / "c", options={"max_slice_nums": 0})


def test_every_error_is_one_of_ours(setup: Setup) -> None:
    for call in (lambda: setup.chat.undo(), lambda: setup.chat.ask(""), lambda: setup.chat.ask("x", seed=-1)):
        with pytest.raises(MmchatError):
            call()


def test_chunks_of_an_answer_are_never_empty(setup: Setup) -> None:
    """A token without text (its character is still open) is no chunk."""
    reply = setup.says("😀é").chat.ask("What?")
    assert all(reply)
    assert reply.text == "😀é"
    assert len(list(reply)) < reply.usage.n_new
