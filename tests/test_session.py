"""Sessions on a fake engine and a fake encoder: first by an oracle, then one thing at a time."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image

from mmchat.engine import Event, Piece, Sampling
from mmchat.errors import (
    ContextFull,
    EngineError,
    ImageError,
    MissingEmbeddings,
    MmchatError,
    PromptError,
    SessionError,
    WorkerDied,
)
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer
from mmchat.record import ImageHandle, Usage
from mmchat.session import Reply, Session
from mmchat.store import Store
from tests.fakes import FakeEngine, FakeVision

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
QUERY_NUM, WIDTH = SPEC.vision.query_num, SPEC.llm.hidden_size


class FaultyEngine(FakeEngine):
    """Raises fault instead of the event with this number, once; loses a key of the store before a request, once."""

    fault: tuple[int, Exception] | None = None
    lose: Callable[[], None] | None = None

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        lose, self.lose = self.lose, None
        if lose:
            lose()
        for number, event in enumerate(super().generate(pieces, sampling, should_stop, resume_ids=resume_ids)):
            if self.fault and number == self.fault[0]:
                (_, error), self.fault = self.fault, None
                raise error
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
        self.chat = Session(SPEC, TOKENIZER, self.store, self.vision, self.engine, **self.options)

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
CONTEXT_ROWS = 700


@dataclass
class Known:
    """What the oracle knows of a turn."""

    question: list[str | int]  # texts, and pictures by their place in PICTURES
    text: str
    whole: bool
    reply: Reply
    n_known_rows: int  # of the engine's cache, when the turn ended


class Conversations(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.setup = Setup(Path(self.folder.name), CONTEXT_ROWS, {"policy": "error"})
        self.chat, self.engine = self.setup.chat, self.setup.engine
        self.turns: list[Known] = []
        self.encoded: set[str] = set()
        self.cache_is_the_record = True  # nothing but recorded turns of this conversation went to the engine

    def teardown(self) -> None:
        self.folder.cleanup()

    # What every ask shares

    def begin(self, question: list[str | int], answer: str) -> Reply:
        self.engine.script[:] = [answer]
        parts = [PICTURES[part] if isinstance(part, int) else part for part in question]
        return self.chat.ask(parts, max_new_tokens=60)

    def record(self, question: list[str | int], reply: Reply, seen: str, *, whole: bool, n_lost: int = 0) -> None:
        self.turns.append(Known(question, seen, whole, reply, len(self.engine.held)))
        usage, turn = reply.usage, self.chat.turns[-1]
        assert reply.text == turn.text == seen
        assert turn.usage is reply.usage_so_far
        handles = [part for part in turn.parts if isinstance(part, ImageHandle)]
        slices = [key for handle in handles for key in handle.keys]
        if whole:
            assert usage.n_prompt == usage.n_reused + usage.n_prefilled
            assert usage.n_new == len(turn.ids)
            assert usage.slices_encoded + usage.slices_cached == len(slices) + n_lost
            if self.cache_is_the_record and len(self.turns) > 1:
                assert usage.n_reused >= self.turns[-2].n_known_rows - (not self.turns[-2].whole)
                new = usage.n_prompt - (self.turns[-2].n_known_rows)
                assert new <= usage.n_prefilled <= new + 1
        self.cache_is_the_record = True

    def expect_failure(self, question: list[str | int], reply: Reply, error: type[Exception]) -> None:
        before = self.chat.turns, self.chat.images
        with pytest.raises(error):
            list(reply)
        with pytest.raises(error):  # and again, without running again
            assert reply.text
        assert (self.chat.turns, self.chat.images) == before
        self.cache_is_the_record = False

    def too_long(self, question: list[str | int], reply: Reply) -> bool:
        """Whether the question does not fit any more; it is then refused, and nothing else happens."""
        n_requests = self.engine.n_requests
        n_rows = self.chat.prompt(self.chat._question(prepared(reply), self.chat.turns)).n_rows
        if n_rows + 60 <= CONTEXT_ROWS:
            return False
        with pytest.raises(ContextFull) as caught:
            list(reply)
        assert (caught.value.n_prompt, caught.value.limit) == (n_rows, CONTEXT_ROWS)
        assert self.engine.n_requests == n_requests
        return True

    # Rules

    questions = st.lists(st.one_of(st.integers(0, 2), st.sampled_from(["What?", " ", "ok\n"])), max_size=4).map(
        lambda parts: [*parts, "Why?"] if sum(isinstance(part, int) for part in parts) <= 3 else ["Why?"]
    )
    answers = st.sampled_from(ANSWERS)

    @rule(question=questions, answer=answers, by=st.sampled_from(["text", "usage", "loop"]))
    def ask(self, question: list[str | int], answer: str, by: str) -> None:
        reply = self.begin(question, answer)
        if self.too_long(question, reply):
            return
        if by == "loop":
            assert "".join(reply) == answer
        else:
            getattr(reply, by)
        assert reply.stop_reason == "stop"
        self.record(question, reply, answer, whole=True)

    @rule(question=questions, answer=answers, n=st.integers(1, 3), how=st.sampled_from(["break", "cancel", "close"]))
    def stop_in_the_middle(self, question: list[str | int], answer: str, n: int, how: str) -> None:
        reply = self.begin(question, answer)
        if self.too_long(question, reply):
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
        self.record(question, reply, "".join(seen), whole=whole)

    @rule(question=questions)
    def cancel_before_it_runs(self, question: list[str | int]) -> None:
        reply = self.begin(question, "never")
        reply.cancel()
        if self.too_long(question, reply):
            return
        assert (reply.text, reply.stop_reason) == ("", "cancelled")

    @rule(question=questions)
    def forget_it_before_it_runs(self, question: list[str | int]) -> None:
        self.begin(question, "never")

    @rule(question=questions, answer=answers, at=st.integers(0, 3), died=st.booleans())
    def the_engine_fails(self, question: list[str | int], answer: str, at: int, died: bool) -> None:
        reply = self.begin(question, answer)
        if self.too_long(question, reply):
            return
        error = WorkerDied("it died", name="LLM") if died else EngineError("it failed")
        self.engine.fault = (min(at, len(TOKENIZER.encode(answer))), error)
        self.expect_failure(question, reply, type(error))

    @rule(shade=st.integers(0, 255))
    def the_encoder_fails(self, shade: int) -> None:
        reply = self.chat.ask(["Why?", picture(f"rgb(0, {shade}, 99)")], max_new_tokens=60)
        if self.too_long(["Why?", 0], reply):
            return
        self.setup.vision.faults = [WorkerDied("it died", name="vision")]
        cache_is_the_record = self.cache_is_the_record
        self.expect_failure(["Why?", 0], reply, WorkerDied)
        self.cache_is_the_record = cache_is_the_record  # the engine was not asked

    @precondition(lambda self: self.chat.images)
    @rule(question=questions, answer=answers, which=st.integers(0, 100))
    def an_embedding_is_lost(self, question: list[str | int], answer: str, which: int) -> None:
        """Of an earlier picture, just before the engine reads it."""
        reply = self.begin(question, answer)
        if self.too_long(question, reply):
            return
        keys = [key for image in self.chat.images for key in image.keys]
        lost = keys[which % len(keys)]
        self.engine.lose = lambda: self.setup.store._path(lost).unlink(missing_ok=True)
        n_encoded = len(self.setup.vision.encoded)
        assert reply.text == answer
        assert self.setup.vision.encoded[n_encoded:].count(lost) >= 1
        self.record(question, reply, answer, whole=True, n_lost=1)

    @rule()
    def ask_too_much(self) -> None:
        reply = self.chat.ask("why " * CONTEXT_ROWS)
        before = self.chat.turns
        with pytest.raises(ContextFull):
            list(reply)
        assert self.chat.turns == before

    @precondition(lambda self: self.turns)
    @rule(n=st.integers(1, 3))
    def undo(self, n: int) -> None:
        if n > len(self.turns):
            with pytest.raises(SessionError, match=f"cannot take back {n}"):
                self.chat.undo(n)
            return
        taken = self.chat.undo(n)
        assert [turn.text for turn in taken] == [known.text for known in self.turns[-n:]]
        del self.turns[-n:]
        self.cache_is_the_record = False

    @rule(question=questions, answer=answers)
    def ask_while_an_answer_is_running(self, question: list[str | int], answer: str) -> None:
        reply = self.begin(question, answer)
        if self.too_long(question, reply):
            return
        texts = iter(reply)
        first = next(texts)
        other = self.chat.ask("Me too?")
        with pytest.raises(SessionError, match="finish or close it first"):
            list(other)
        with pytest.raises(SessionError, match="finish or close it before undoing"):
            self.chat.undo()
        assert first + "".join(texts) == answer
        self.record(question, reply, answer, whole=True)

    @precondition(lambda self: self.turns)
    @rule(which=st.integers(0, 100))
    def read_an_old_answer_again(self, which: int) -> None:
        known = self.turns[which % len(self.turns)]
        n_requests = self.engine.n_requests
        assert "".join(known.reply) == known.reply.text == known.text
        assert self.engine.n_requests == n_requests

    # What is always so

    @invariant()
    def the_record_is_what_the_user_saw(self) -> None:
        note(f"{[known.text for known in self.turns]}")
        turns = self.chat.turns
        assert [turn.text for turn in turns] == [known.text for known in self.turns]
        for turn, known in zip(turns, self.turns, strict=True):
            assert [part for part in turn.parts if isinstance(part, str)] == [
                part for part in known.question if isinstance(part, str)
            ]
            data = b"".join(map(TOKENIZER.token_bytes, turn.ids))
            assert data.decode(errors="ignore") == turn.text

    @invariant()
    def the_pictures_are_those_of_the_turns(self) -> None:
        images = self.chat.images
        wanted = [
            (PICTURES[part].size, number)
            for number, known in enumerate(self.turns, 1)
            for part in known.question
            if isinstance(part, int)
        ]
        assert [(image.size, image.turn) for image in images] == wanted
        assert [image.id for image in images] == [f"img{i}" for i in range(1, len(wanted) + 1)]
        for image in images:
            assert image.rows == image.slices * QUERY_NUM == len(image.keys) * QUERY_NUM
            assert (image.slices > 1) == (image.size == PICTURES[CUT].size)

    @invariant()
    def the_conversation_can_go_on(self) -> None:
        self.chat.check_idle()
        assert not list((self.setup.store.root / "leases").iterdir())


def prepared(reply: Reply) -> Any:
    """The parts of a reply that has not run yet."""
    return reply._prepared


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


def test_cancel_while_lost_embeddings_are_made_again_is_a_cancel(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.ask("Red.", "What?", images=[picture()])
    reply = setup.says("Never.").chat.ask("And?")
    setup.engine.lose = setup.store.clear

    def clear() -> None:
        setup.store._path(setup.chat.images[0].keys[0]).unlink()
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
