"""The real thing, end to end: mmchat.open on the demo model, both workers, pictures, many turns."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import mmchat
from mmchat.record import Usage
from mmchat.session import Reply, Session
from tests.fakes import eventually, is_gone, workers

SIZE = (200, 200)
CIRCLE = "What colour is the circle?"
BACKGROUND = "What colour is the background?"
DESCRIBE = "Describe the image."  # the longest answers of this model


def picture(shape: str, colour: str, background: str, size: tuple[int, int] = SIZE) -> Image.Image:
    """One plain shape in the middle of a plain background."""
    image = Image.new("RGB", size, background)
    width, height = size
    box = (width // 4, height // 4, width - width // 4, height - height // 4)
    getattr(ImageDraw.Draw(image), {"circle": "ellipse", "square": "rectangle"}[shape])(box, fill=colour)
    return image


@pytest.fixture
def open_demo(tmp_path: Path) -> Iterator[Callable[[], mmchat.Runtime]]:
    """Runtimes on one store; afterwards none of their processes is left."""
    opened: list[mmchat.Runtime] = []
    before = workers()

    def open_demo() -> mmchat.Runtime:
        opened.append(mmchat.open("demo", store=tmp_path / "store", n_threads=1))
        return opened[-1]

    yield open_demo
    for runtime in opened:
        pids = runtime.llm.worker.pid, runtime.vision.worker.pid
        runtime.close()
        runtime.close()
        assert all(pid is None or is_gone(pid) for pid in pids)
    eventually(lambda: workers() <= before)


@pytest.fixture
def rt(open_demo: Callable[[], mmchat.Runtime]) -> mmchat.Runtime:
    return open_demo()


# Six turns, six pictures; the third turn brings two, the fifth none.
CHAT: list[tuple[str, list[Image.Image]]] = [
    (CIRCLE, [picture("circle", "red", "blue")]),
    (BACKGROUND, [picture("square", "white", "green")]),
    (
        "How many images are there?",
        [picture("circle", "yellow", "black"), picture("circle", "green", "white", (90, 90))],
    ),
    (CIRCLE, [picture("circle", "blue", "white", (300, 180))]),
    (BACKGROUND, []),
    (DESCRIBE, [picture("square", "red", "yellow", (100, 250))]),
]


def run_chat(session: Session) -> list[Reply]:
    replies = [session.ask(question, images=images) for question, images in CHAT]
    for reply in replies:
        assert reply.text == "".join(reply)
    return replies


def test_six_turns_and_six_pictures(open_demo: Callable[[], mmchat.Runtime]) -> None:
    rt = open_demo()
    chat = rt.session()
    replies = run_chat(chat)
    n_known = n_slices = 0
    for number, (reply, turn) in enumerate(zip(replies, chat.turns, strict=True), 1):
        usage = reply.usage
        pictures = [image for image in chat.images if image.turn == number]
        assert len(pictures) == len(CHAT[number - 1][1])
        assert usage.n_prompt == usage.n_reused + usage.n_prefilled
        new = usage.n_prompt - n_known
        assert new <= usage.n_prefilled <= new + 1, f"turn {number}"
        assert usage.slices_encoded + usage.slices_cached == sum(image.slices for image in pictures)
        assert (usage.n_new, usage.restarts, reply.stop_reason) == (len(turn.ids), 0, "stop")
        n_known = usage.n_prompt + usage.n_new
        n_slices += usage.slices_encoded
    assert len(chat.images) == 6
    assert rt.store.info().n_files == n_slices
    assert "red" in replies[0].text
    assert "green" in replies[1].text

    rt.close()  # another run, another process, the same store
    again = run_chat(open_demo().session())
    assert [reply.text for reply in again] == [reply.text for reply in replies]
    for reply, before in zip(again, replies, strict=True):
        assert reply.usage.slices_encoded == 0
        assert reply.usage.slices_cached == before.usage.slices_encoded + before.usage.slices_cached
        assert (reply.usage.n_prompt, reply.usage.n_prefilled) == (before.usage.n_prompt, before.usage.n_prefilled)


def test_without_pictures_no_encoder_is_started(rt: mmchat.Runtime) -> None:
    assert rt.session().ask("Hello!").text
    assert rt.vision.worker.pid is None


def test_earlier_pictures_answer_in_later_turns(rt: mmchat.Runtime) -> None:
    """The same question, the same words in between: only the first picture differs, and with it the later answer."""
    answers = set()
    for colour in ("red", "blue"):
        chat = rt.session()
        chat.ask("How many images are there?", images=[picture("circle", colour, "white")])
        assert chat.ask("How many images are there?", images=[picture("circle", colour, "white")]).text
        later = chat.ask(CIRCLE)
        assert colour in later.text
        assert later.usage.slices_encoded == later.usage.slices_cached == 0
        answers.add(later.text)
    assert len(answers) == 2


# Crashes.  A worker may be done before it is killed, so each of these tries a few times, and must succeed each time.


def until_it_hit(attempt: Callable[[], Usage]) -> None:
    for _ in range(8):
        usage = attempt()
        assert usage.restarts <= 1
        if usage.restarts == 1:
            return
    pytest.fail("the worker was never killed in time")


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 3}], ids=["greedy", "seeded"])
def test_the_llm_worker_is_killed_in_mid_answer(rt: mmchat.Runtime, sampling: dict[str, Any]) -> None:
    square = picture("square", "red", "yellow")
    undisturbed = rt.session().ask(DESCRIBE, images=[square], **sampling)
    assert len(list(undisturbed)) > 3

    def attempt() -> Usage:
        chat = rt.session()
        reply = chat.ask(DESCRIBE, images=[square], **sampling)
        texts = iter(reply)
        seen = [next(texts)]
        kill(rt.llm.worker.pid)
        seen += texts
        assert "".join(seen) == reply.text == undisturbed.text
        usage, expected = reply.usage, undisturbed.usage
        assert (usage.n_new, reply.stop_reason) == (expected.n_new, undisturbed.stop_reason)
        assert usage.n_prompt == expected.n_prompt == usage.n_reused + usage.n_prefilled
        follow_up = chat.ask(BACKGROUND)
        assert follow_up.usage.n_reused == usage.n_prompt + usage.n_new
        assert follow_up.usage.restarts == 0
        return usage

    until_it_hit(attempt)


def test_the_llm_worker_is_killed_between_answers(rt: mmchat.Runtime) -> None:
    chat = rt.session()
    chat.ask(CIRCLE, images=[picture("circle", "red", "blue")]).usage  # noqa: B018
    expected = chat.ask(BACKGROUND).text
    chat.undo()
    kill(rt.llm.worker.pid)
    eventually(lambda: rt.llm.worker.pid is None)
    reply = chat.ask(BACKGROUND)
    assert reply.text == expected
    assert reply.usage.n_reused == 0
    assert reply.usage.slices_encoded == 0


def test_the_vision_worker_is_killed_while_it_encodes(rt: mmchat.Runtime) -> None:
    shades = iter(range(0, 250, 9))

    def noisy() -> Image.Image:
        """A picture whose ten slices all differ from each other, and from those of any before."""
        shade = next(shades)
        return Image.linear_gradient("L").resize((400, 300)).point([(value + shade) % 256 for value in range(256)])

    def attempt() -> Usage:
        image = noisy()
        reply = rt.session().ask(DESCRIBE, images=[image])
        killed: list[int] = []

        def on_wait(stage: str, done: int, total: int) -> None:
            pid = rt.vision.worker.pid
            if stage == "encode" and not killed and pid is not None:
                killed.append(pid)
                kill(pid)

        reply.on_wait = on_wait
        text, usage = reply.text, reply.usage
        assert killed
        assert usage.slices_encoded + usage.slices_cached == 10
        assert rt.session().ask(DESCRIBE, images=[image]).text == text
        return usage

    until_it_hit(attempt)


def test_a_damaged_embedding_is_made_again(rt: mmchat.Runtime) -> None:
    chat = rt.session()
    first = chat.ask(CIRCLE, images=[picture("circle", "red", "blue")]).text
    expected = chat.ask(BACKGROUND).text
    files = sorted(path for path in (rt.store.root / "data").rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    files[0].write_bytes(before[files[0]][:-1] + b"\x7f")  # the right length, another byte
    files[1].write_bytes(before[files[1]][:100])
    files[2].unlink()
    kill(rt.llm.worker.pid)  # so that the embeddings are needed again

    chat.undo()
    eventually(lambda: rt.llm.worker.pid is None)
    reply = chat.ask(BACKGROUND)
    assert reply.text == expected
    assert reply.usage.slices_encoded == 3
    assert {path: path.read_bytes() for path in files} == before
    assert rt.session().ask(CIRCLE, images=[picture("circle", "red", "blue")]).text == first


def test_a_store_too_small_for_the_conversation_still_answers(tmp_path: Path) -> None:
    """Files in use are not evicted; what was evicted between turns is made again."""
    with mmchat.open("demo", store=tmp_path / "small", store_cap_bytes=60_000, n_threads=1) as rt:
        chat = rt.session()
        assert "red" in chat.ask(CIRCLE, images=[picture("circle", "red", "blue")]).text
        assert "green" in chat.ask(CIRCLE, images=[picture("circle", "green", "white")]).text
        assert chat.ask(BACKGROUND).text


def test_two_sessions_take_turns(rt: mmchat.Runtime) -> None:
    def alone(colour: str) -> list[str]:
        chat = rt.session()
        image = picture("circle", colour, "white")
        return [chat.ask(CIRCLE, images=[image]).text, chat.ask(BACKGROUND).text, chat.ask(DESCRIBE).text]

    expected = {colour: alone(colour) for colour in ("red", "blue")}
    chats = {colour: rt.session() for colour in expected}
    said: dict[str, list[str]] = {colour: [] for colour in expected}
    for question in (CIRCLE, BACKGROUND, DESCRIBE):
        for colour, chat in chats.items():
            images = [picture("circle", colour, "white")] if question == CIRCLE else []
            said[colour].append(chat.ask(question, images=images).text)
    assert said == expected


def test_taking_turns_back_costs_the_new_rows_alone(rt: mmchat.Runtime) -> None:
    """Five turns back, and something else asked: on the real engine."""
    chat = rt.session()
    for colour in ("red", "green", "blue"):
        chat.ask(CIRCLE, images=[picture("circle", colour, "white")]).text  # noqa: B018
    for question in (BACKGROUND, "Thank you.", CIRCLE):
        chat.ask(question).text  # noqa: B018
    chat.undo(5)
    plan = chat.plan("How many images are there?")
    reply, last = chat.ask("How many images are there?"), chat.turns[-1].usage
    usage = reply.usage
    assert 0 < usage.n_prefilled <= usage.n_prompt - last.n_prompt - last.n_new
    assert (plan.rows_new, plan.slices_new) == (usage.n_prefilled, 0)
    assert plan.seconds.first_token is not None
    assert reply.plan.seconds == plan.seconds


def test_a_branch_answers_as_a_fresh_session_with_the_same_record(rt: mmchat.Runtime, tmp_path: Path) -> None:
    chat = rt.session()
    chat.ask(DESCRIBE, images=[picture("square", "red", "yellow")]).text  # noqa: B018
    chat.ask(DESCRIBE, images=[picture("circle", "green", "white")]).text  # noqa: B018
    chat.ask("Thank you.").text  # noqa: B018
    branch = chat.branch(at=2)
    reply, last = branch.ask(BACKGROUND), chat.turns[1].usage
    assert 0 < reply.usage.n_prefilled <= reply.usage.n_prompt - last.n_prompt - last.n_new
    answers = [reply.text, branch.ask("What shapes are in the first image?").text]
    assert all(answers)
    with mmchat.open("demo", store=tmp_path / "other") as other:
        fresh = other.session()
        for turn in chat.turns[:2]:
            part = next(part for part in turn.parts if not isinstance(part, str))
            image = picture("square", "red", "yellow") if part.id == "img1" else picture("circle", "green", "white")
            assert fresh.ask(DESCRIBE, images=[image]).text == turn.text
        assert [fresh.ask(BACKGROUND).text, fresh.ask("What shapes are in the first image?").text] == answers
    assert len(chat.turns) == 3


def test_two_threads_with_a_conversation_each_take_turns(rt: mmchat.Runtime) -> None:
    """Neither is refused."""
    order: list[str] = []
    chats = {"a": rt.session("Be brief."), "b": rt.session("Be long.")}

    def talk(name: str) -> None:
        for _ in range(4):
            assert chats[name].ask("Hello!").text
            order.append(name)

    threads = [threading.Thread(target=talk, args=(name,)) for name in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert sorted(order) == ["a"] * 4 + ["b"] * 4
    assert all(len(chat.turns) == 4 for chat in chats.values())


def test_a_full_context_is_trimmed_and_answers_as_one_that_never_held_more(tmp_path: Path) -> None:
    """What the KV cache has seen before the trim leaves no trace: another worker, with what is sent alone, agrees."""
    with mmchat.open("demo", store=tmp_path, context_rows=512) as rt:
        chat = rt.session()
        degraded = []
        for colour in ("red", "green", "blue", "black", "red", "green"):
            reply = chat.ask(CIRCLE, images=[picture("circle", colour, "white")], max_new_tokens=40)
            assert reply.usage.n_prompt <= 512 - 40
            degraded += [str(change) for change in reply.degraded]
        assert {"img3 is sent without its cells", "turn 1 is not sent any more"} <= set(degraded)
        rt.llm.worker.kill()
        again = chat.branch(at=5).ask(CIRCLE, images=[picture("circle", "green", "white")], max_new_tokens=40)
        assert again.text == chat.turns[-1].text
        assert again.usage.n_reused == 0


def test_sessions_that_take_turns_compute_only_what_is_new(rt: mmchat.Runtime) -> None:
    """And know so beforehand."""
    chats = {colour: rt.session() for colour in ("red", "blue", "green")}
    for colour, chat in chats.items():
        assert chat.ask(CIRCLE, images=[picture("circle", colour, "white")]).text
    for chat in chats.values():
        n_known = chat.turns[-1].usage.n_prompt + chat.turns[-1].usage.n_new
        plan = chat.plan(BACKGROUND)
        usage = chat.ask(BACKGROUND).usage
        assert usage.n_prefilled == usage.n_prompt - n_known == plan.rows_new


def test_a_second_session_of_the_same_thread_is_told_that_the_engine_is_busy(rt: mmchat.Runtime) -> None:
    one, other = rt.session(), rt.session()
    texts = iter(one.ask(DESCRIBE, images=[picture("circle", "red", "blue")]))
    next(texts)
    with pytest.raises(mmchat.EngineBusy):
        list(other.ask("Hello!"))
    list(texts)
    assert other.turns == []
    assert other.ask("Hello!").text


def test_cancel_keeps_the_chat_usable(rt: mmchat.Runtime) -> None:
    chat, square = rt.session(), picture("square", "red", "yellow")
    whole = rt.session().ask(DESCRIBE, images=[square]).text
    reply = chat.ask(DESCRIBE, images=[square])
    seen: list[str] = []
    for text in reply:
        seen.append(text)
        reply.cancel()
    assert whole.startswith("".join(seen))
    assert [turn.text for turn in chat.turns] == ["".join(seen)]
    chat.undo()
    for _ in chat.ask(DESCRIBE, images=[square]):
        break
    chat.undo()
    assert chat.ask(DESCRIBE, images=[square]).text == whole


def test_closing_in_the_middle_of_an_answer(open_demo: Callable[[], mmchat.Runtime]) -> None:
    """What `with mmchat.open(...)` does when the loop over an answer raises."""
    rt = open_demo()
    texts: Any = iter(rt.session().ask(DESCRIBE, images=[picture("square", "red", "yellow")]))
    next(texts)
    rt.close()
    texts.close()


def test_what_does_not_fit_is_refused_and_the_chat_goes_on(rt: mmchat.Runtime) -> None:
    chat = rt.session()
    with pytest.raises(mmchat.ContextFull):
        list(chat.ask("word " * 100_000))
    with pytest.raises(mmchat.ContextFull):
        list(chat.ask("Hello!", max_new_tokens=rt.context_rows))
    assert chat.ask("Hello!").text


def test_stop_texts_and_lengths_reach_the_engine(rt: mmchat.Runtime) -> None:
    square = picture("square", "red", "yellow")
    whole = rt.session().ask(DESCRIBE, images=[square])
    short = rt.session().ask(DESCRIBE, images=[square], max_new_tokens=3)
    assert (short.stop_reason, short.usage.n_new) == ("length", 3)
    assert whole.text.startswith(short.text)
    stop = whole.text[5:8]
    cut = rt.session().ask(DESCRIBE, images=[square], stop=stop)
    assert (cut.text, cut.stop_reason) == (whole.text[: whole.text.index(stop)], "stop")
