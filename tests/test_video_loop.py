"""The loop on a runtime without a model: what is asked, what is carried, what an earlier run saves, what it costs."""

from __future__ import annotations

import gc
import io
import itertools
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmchat import prompt
from mmchat.errors import ContextFull, EngineError, ImageError, ModelDirError, VideoError, WorkerDied
from mmchat.prompt import ChatTokenizer
from mmchat.video import Arrays, Caption, captions, open_source
from mmchat.video.gate import Gate
from mmchat.video.pace import Pace, official_times, seconds_of, spread
from mmchat.video.values import Frame, Notice, Shot
from tests.fakes import eventually
from tests.video_kit import COLOURS, SPEC, FakeRuntime, colour, distinct, make_video, many, without_usage

ASK: dict[str, Any] = {"max_new_tokens": 3}


@pytest.fixture
def fake(tmp_path: Path) -> FakeRuntime:
    return FakeRuntime(tmp_path / "store")


def indices(made: list[Caption]) -> list[int]:
    return [caption.index for caption in made]


# What is asked


def test_each_frame_is_asked_about_by_itself(fake: FakeRuntime) -> None:
    fake.engine.prompts = []
    made = list(captions(fake.rt, [colour("red"), colour("blue")], "What is it?", system="Be brief.", **ASK))
    again = [
        fake.session("Be brief.", max_slice_nums=1, use_image_id=False).ask(
            [picture, "What is it?"], temperature=0, **ASK
        )
        for picture in (colour("red"), colour("blue"))
    ]
    assert [caption.text for caption in made] == [reply.text.strip() for reply in again]
    assert (
        fake.engine.prompts[:2]
        == [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image><></image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ]
        * 2
    )
    assert [(caption.time, caption.end, caption.index, caption.carried) for caption in made] == [
        (0, 1, 0, False),
        (1, 2, 1, False),
    ]
    assert len({caption.digest for caption in made}) == 2


def test_the_beginning_stays_in_the_kv_cache(fake: FakeRuntime) -> None:
    """With question_first the question as well; and every frame costs what the second did."""
    reused: dict[bool, set[tuple[int, int]]] = {}
    for first in (False, True):
        made = list(captions(fake.rt, map(distinct, range(9)), "One, two?", question_first=first, **ASK))
        reused[first] = {(caption.usage.n_reused, caption.usage.n_prefilled) for caption in made[1:]}
        assert len(reused[first]) == 1
    [(without, _)], [(with_question, _)] = reused[False], reused[True]
    n_question = len(fake.tokenizer.encode("One, two?"))
    assert with_question >= without + n_question


def test_windows_hold_the_frames_in_order(fake: FakeRuntime) -> None:
    fake.engine.prompts = []
    made = list(captions(fake.rt, map(distinct, range(7)), window=3, **ASK))
    assert [(c.index, c.frames, c.time, c.end) for c in made] == [(0, 3, 0, 3), (3, 3, 3, 6), (6, 1, 6, 7)]
    assert [prompt.count("<image><></image>") for prompt in fake.engine.prompts] == [3, 3, 1]
    assert "Describe what happens in these images." in fake.engine.prompts[0]
    assert [caption.usage.slices_encoded for caption in made] == [3, 3, 1]


def test_a_story_tells_what_was_before(fake: FakeRuntime) -> None:
    fake.engine.prompts = []
    fake.engine.script = ["one", "two", "three", "four"]
    made = list(captions(fake.rt, map(distinct, range(4)), "Now?", story=2))
    assert [caption.text for caption in made] == ["one", "two", "three", "four"]
    before = ["", "Before:\n[00:00:00.000] one\n", "Before:\n[00:00:00.000] one\n[00:00:01.000] two\n",
              "Before:\n[00:00:01.000] two\n[00:00:02.000] three\n"]  # fmt: skip
    assert [prompt.split("user\n")[1] for prompt in fake.engine.prompts] == [
        f"{told}<image><></image>\nNow?<|im_end|>\n<|im_start|>assistant\n" for told in before
    ]
    assert [caption.usage.slices_encoded for caption in made] == [1] * 4
    assert [caption.usage.slices_cached for caption in made] == [0] * 4


def test_a_story_that_does_not_fit_begins_later(tmp_path: Path) -> None:
    fake = FakeRuntime(tmp_path / "store", context_rows=150)
    fake.engine.script = [f"{number} " * 5 for number in range(8)]
    prompts: list[str] = []
    fake.engine.prompts = prompts
    made = list(captions(fake.rt, map(distinct, range(8)), "Now?", story=8, max_new_tokens=40))
    assert len(made) == 8
    last = prompts[-1]
    assert "[00:00:06.000]" in last  # the newest stays
    assert last.count("[00:00:0") > 1
    assert "[00:00:00.000]" not in last


def test_slices_are_cut_as_asked(fake: FakeRuntime) -> None:
    wide = [colour("red", (300, 200)), colour("blue", (300, 200))]
    for options, n_slices in (({}, 1), ({"max_slice_nums": 2}, 3), ({"official": True}, 3)):
        made = list(captions(fake.rt, wide, **options, **ASK))
        assert [c.usage.slices_encoded + c.usage.slices_cached for c in made] == [n_slices] * 2


# Which frames


def test_one_frame_per_interval_is_taken(fake: FakeRuntime, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", [colour(COLOURS[i // 25]) for i in range(110)])

    def taken(**how: Any) -> list[tuple[int, float, float]]:
        return [(c.index, c.time, c.end) for c in captions(fake.rt, path, **how, **ASK)]

    assert taken() == [(0, 0, 1), (25, 1, 2), (50, 2, 3), (75, 3, 4), (100, 4, 4.4)]
    assert taken(every=2) == [(0, 0, 2), (50, 2, 4), (100, 4, 4.4)]
    assert [index for index, _, _ in taken(every=0.3)] == [0, 8, 15, 23, 30, 38, 45, 53, 60, 68, 75, 83, 90, 98, 105]
    assert [index for index, _, _ in taken(every=0)] == list(range(110))
    assert [index for index, _, _ in taken(every=0.001)] == list(range(110))
    assert taken(max_frames=2) == [(25, 1, 3), (75, 3, 4.4)]
    assert [index for index, _, _ in taken(every=0, max_frames=10)] == list(range(5, 110, 11))
    assert [index for index, _, _ in taken(official=True)] == [0, 25, 50, 75, 100]
    assert taken(official=True, max_frames=1) == [(50, 2, 4.4)]


def test_gaps_of_a_variable_frame_rate_are_not_filled(fake: FakeRuntime, tmp_path: Path) -> None:
    ticks = [0, 10, 20, 24, 26, 130, 131, 400]
    path = make_video(tmp_path / "a.mkv", [distinct(i, (64, 48)) for i in range(8)], ticks=ticks)
    made = list(captions(fake.rt, path, **ASK))
    assert [(c.index, c.time) for c in made] == [(0, 0), (4, 1.04), (5, 5.2), (7, 16)]
    assert [c.end for c in made][:-1] == [c.time for c in made][1:]
    assert made[-1].end > 16


def test_an_endless_iterator_ends_after_max_frames(fake: FakeRuntime) -> None:
    made = list(captions(fake.rt, map(distinct, itertools.count()), max_frames=3, every=2, **ASK))
    assert indices(made) == [0, 2, 4]
    assert made[-1].end == 6


@given(times=st.lists(st.floats(0, 100), min_size=1, max_size=60), every=st.sampled_from([0, 0.04, 0.5, 1, 7]))
def test_the_first_frame_of_each_interval_is_taken(times: list[float], every: float) -> None:
    """By the definition: of the frames in [n every, (n + 1) every) the first one, if none ran over it before."""
    times = sorted(times)
    frames = [Frame(i, time, 0.04, Image.Image) for i, time in enumerate(times)]
    shots = [shot for shot in Pace(every).shots(iter(frames), Arrays(())) if isinstance(shot, Shot)]
    seen: set[int] = set()
    wanted = []
    for frame in frames:
        interval = int((frame.time + 1e-6) // every) if every else frame.index
        if interval not in seen and not any(later > interval for later in seen):
            seen.add(interval)
            wanted.append(frame.index)
    assert [shot.frame.index for shot in shots] == wanted
    for shot, after in itertools.pairwise(shots):
        assert shot.frame.time <= shot.end == after.frame.time
    assert shots[-1].end >= times[-1]


@pytest.mark.parametrize(("n", "rate"), [(10, 1), (100, 25), (3000, 29.97), (2000, 2.5), (64, 1), (65, 1), (1601, 25)])
def test_the_official_recipe_is_the_published_example(n: int, rate: float) -> None:
    """The code of the model's page: decord's frame numbers, one per round(average rate), at most 64, uniform."""
    times = [i / rate for i in range(n)]
    numbers = list(range(0, n, round(rate / 1)))
    if len(numbers) > 64:
        gap = len(numbers) / 64
        numbers = [numbers[i] for i in [int(i * gap + gap / 2) for i in range(64)]]
    assert spread(official_times(times, rate), 64) == [times[number] for number in numbers]


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 2), ("2s", 2), ("500ms", 0.5), ("1.5m", 90), ("1 h", 3600), (".5", 0.5), ("0", 0)]
)
def test_times_can_be_written(text: str, seconds: float) -> None:
    assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1", "1d", "1e3", "nan", "1,5", "two"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(VideoError, match="is no time"):
        seconds_of(text)


@pytest.mark.parametrize(
    "options",
    [
        {"every": -1},
        {"every": float("nan")},
        {"max_frames": 0},
        {"changed": 1.5},
        {"changed": -0.1},
        {"window": 0},
        {"story": -1},
    ],
)
def test_values_that_are_no_use_are_refused_at_once(fake: FakeRuntime, options: dict[str, Any]) -> None:
    with pytest.raises(VideoError, match=next(iter(options))):
        captions(fake.rt, [distinct(0)], **options)


def test_an_impossible_number_of_slices_is_refused_at_once(fake: FakeRuntime) -> None:
    with pytest.raises(ImageError, match="max_slice_nums"):
        captions(fake.rt, [distinct(0)], max_slice_nums=0)


# The gate


def changed_part(part: float) -> Image.Image:
    picture = colour("black", (128, 128))
    picture.paste("white", (0, 0, 128, round(128 * part)))
    return picture


def test_a_frame_like_the_last_one_is_carried(fake: FakeRuntime) -> None:
    noise = np.random.default_rng(0).integers(-6, 7, (6, 128, 128, 3))
    grey = [Image.fromarray((np.full((128, 128, 3), 128) + n).astype(np.uint8)) for n in noise]
    frames = [grey[0], grey[1], colour("red", (128, 128)), colour("red", (128, 128)), grey[2], colour("red")]
    made = list(captions(fake.rt, frames, changed=0.1, **ASK))
    assert [caption.carried for caption in made] == [False, True, False, True, False, False]
    assert [made[i].text for i in (1, 3)] == [made[i].text for i in (0, 2)]
    assert [caption.usage.slices_encoded for caption in made] == [1, 0, 1, 0, 1, 1]
    assert len(fake.vision.encoded) == 4
    assert made[0].digest != made[1].digest
    assert [c.carried for c in captions(fake.rt, frames, changed=0, **ASK)] == [False] * 6


def test_the_share_that_must_change_is_the_share_of_the_picture() -> None:
    for part, goes in ((0.05, False), (0.09, False), (0.12, True), (0.5, True)):
        gate = Gate(0.1)
        assert gate.lets(changed_part(0))
        assert gate.lets(changed_part(part)) is goes


def test_slow_changes_add_up() -> None:
    gate = Gate(0.1)
    went = [gate.lets(changed_part(step / 50)) for step in range(51)]
    assert 9 <= went.count(True) <= 11
    assert not any(a and b for a, b in itertools.pairwise(went[1:]))


def test_a_window_asks_about_what_changed(fake: FakeRuntime) -> None:
    fake.engine.prompts = []
    red, blue = colour("red"), colour("blue")
    made = list(captions(fake.rt, [red, red, blue, blue, blue, blue, blue, red], window=2, changed=0.1, **ASK))
    assert [caption.carried for caption in made] == [False, False, True, False]
    assert [prompt.count("<>") for prompt in fake.engine.prompts] == [1, 1, 1]
    assert [caption.frames for caption in made] == [2] * 4


# What goes wrong


def test_a_bad_frame_is_skipped_and_told(fake: FakeRuntime) -> None:
    notices: list[str] = []
    frames: list[Any] = [distinct(0), b"no picture", np.zeros((2, 2, 9)), distinct(3), colour("red", (1, 9000))]
    made = list(captions(fake.rt, frames, on_notice=notices.append, **ASK))
    assert indices(made)[:2] == [0, 3]
    assert [caption.skipped for caption in made][:2] == [0, 2]
    assert [notice.split(":")[0].split()[1] for notice in notices][:2] == ["1", "2"]
    assert all("skipped" in notice for notice in notices)


def test_a_source_of_which_nothing_can_be_read_is_an_error(fake: FakeRuntime) -> None:
    with pytest.raises(VideoError, match="not one frame"):
        list(captions(fake.rt, [b"no picture"] * 3, on_notice=lambda text: None, **ASK))
    with pytest.raises(VideoError, match="not one frame"):
        list(captions(fake.rt, [], **ASK))


def test_notices_go_to_the_log_unless_somebody_listens(fake: FakeRuntime, caplog: pytest.LogCaptureFixture) -> None:
    list(captions(fake.rt, [distinct(0), b"no picture"], **ASK))
    assert "frame 1 (00:00:01.000) skipped" in caplog.text


def test_an_answer_that_fails_costs_one_frame(fake: FakeRuntime) -> None:
    notices: list[str] = []
    fake.engine.faults = [None, WorkerDied("the LLM worker died", name="LLM")]
    frames = [colour("red"), colour("blue"), colour("blue"), colour("red")]
    made = list(captions(fake.rt, frames, changed=0.1, on_notice=notices.append, **ASK))
    assert indices(made) == [0, 2, 3]
    assert [caption.carried for caption in made] == [False] * 3  # there was nothing to carry
    assert notices == ["frame 1 (00:00:01.000) not captioned: the LLM worker died"]


@pytest.mark.parametrize("n", [1, 2])
def test_where_every_answer_failed_that_is_an_error(fake: FakeRuntime, n: int) -> None:
    fake.engine.faults = [EngineError("out of order")] * n
    with pytest.raises(VideoError, match="not one frame could be captioned"):
        list(captions(fake.rt, [distinct(i) for i in range(n)], on_notice=lambda text: None, **ASK))


def test_that_is_so_where_a_live_source_is_left_after_so_many(fake: FakeRuntime) -> None:
    fake.engine.faults = [EngineError("out of order")]
    source = Arrays([distinct(0)], live=True)
    with pytest.raises(VideoError, match="not one frame could be captioned"):
        list(captions(fake.rt, source, every=0, max_frames=1, on_notice=lambda text: None, **ASK))


def test_what_was_lost_before_a_failed_answer_is_told_by_the_next(fake: FakeRuntime) -> None:
    fake.engine.faults = [EngineError("out of order")]
    frames = [b"no picture", distinct(0), distinct(1), distinct(2)]
    made = list(captions(fake.rt, frames, on_notice=lambda text: None, **ASK))
    assert [(caption.index, caption.skipped) for caption in made] == [(2, 1), (3, 0)]


def test_the_official_recipe_has_64_frames_of_whatever(fake: FakeRuntime) -> None:
    assert len(list(captions(fake.rt, map(distinct, range(70)), official=True, **ASK))) == 64


def test_three_failures_in_a_row_end_it(fake: FakeRuntime) -> None:
    fault = EngineError("out of order")
    fake.engine.faults = [fault, fault, None, fault, None, fault, fault, fault]
    running = captions(fake.rt, map(distinct, range(9)), on_notice=lambda text: None, **ASK)
    assert [next(running).index for _ in range(2)] == [2, 4]
    with pytest.raises(EngineError, match="out of order"):
        next(running)


@pytest.mark.parametrize("error", [ModelDirError("no weights"), ContextFull(9, 9, 9)])
def test_what_no_frame_is_to_blame_for_ends_it(fake: FakeRuntime, error: Exception) -> None:
    fake.engine.faults = [error]
    with pytest.raises(type(error)):
        list(captions(fake.rt, [distinct(0)], **ASK))


def test_an_encoder_that_fails_ahead_is_tried_again(fake: FakeRuntime) -> None:
    fake.vision.faults = [WorkerDied("the vision worker died", name="vision")]
    made = list(captions(fake.rt, map(distinct, range(3)), **ASK))
    assert [caption.usage.slices_encoded for caption in made] == [1] * 3


# Ahead


def test_the_next_frame_is_encoded_while_one_is_answered(fake: FakeRuntime) -> None:
    fake.engine.gate = threading.Event()
    running = captions(fake.rt, map(distinct, range(6)), **ASK)
    got: list[Caption] = []
    reader = threading.Thread(target=lambda: got.append(next(running)))
    reader.start()
    eventually(lambda: len(fake.vision.encoded) >= 2)
    assert not got
    fake.engine.gate.set()
    reader.join(60)
    got += running
    assert [caption.usage.slices_encoded for caption in got] == [1] * 6
    assert [caption.usage.slices_cached for caption in got] == [0] * 6


def test_what_is_encoded_ahead_is_counted_once(fake: FakeRuntime) -> None:
    wide = colour("red", (300, 200))
    reply = fake.session(max_slice_nums=2).ask("What is it?", wide, **ASK)
    reply.encode_ahead()
    n = reply.usage_so_far.slices_encoded + reply.usage_so_far.slices_cached
    assert (n, len(fake.vision.encoded)) == (3, len(set(fake.vision.encoded)))
    assert (reply.usage.slices_encoded, reply.usage.slices_cached) == (
        len(fake.vision.encoded),
        n - len(fake.vision.encoded),
    )
    reply.encode_ahead()  # it has run: nothing happens
    again = fake.session(max_slice_nums=2).ask("What is it?", wide, **ASK)
    again.encode_ahead()
    assert (again.usage.slices_encoded, again.usage.slices_cached) == (0, 3)
    lost = fake.session(max_slice_nums=2).ask("What is it?", colour("blue"), **ASK)
    lost.encode_ahead()
    fake.store.clear()
    assert (lost.usage.slices_encoded, lost.usage.slices_cached) == (2, 0)  # it was made twice


def test_where_the_npu_is_shared_nothing_is_encoded_ahead(fake: FakeRuntime) -> None:
    fake.parallel = False
    callers = set()
    encode = fake.vision.encode
    fake.vision.encode = lambda *a: callers.add(threading.current_thread().name) or encode(*a)  # type: ignore[method-assign,func-returns-value]
    made = list(captions(fake.rt, map(distinct, range(4)), **ASK))
    assert [caption.usage.slices_encoded for caption in made] == [1] * 4
    assert callers == {threading.current_thread().name}


def test_ahead_or_not_the_captions_are_the_same(tmp_path: Path) -> None:
    frames = [colour(COLOURS[i // 3 % 6]) for i in range(20)]
    for how in ({}, {"window": 3}, {"story": 2}, {"changed": 0.1, "window": 2, "story": 1}):
        a, b = (
            list(captions(FakeRuntime(tmp_path / f"{ahead} {how}").rt, frames, ahead=ahead, **how, **ASK))
            for ahead in (True, False)
        )
        assert without_usage(a) == without_usage(b)
        assert [c.usage.slices_encoded for c in a] == [c.usage.slices_encoded for c in b]


def test_leaving_early_leaves_no_thread(fake: FakeRuntime) -> None:
    def forever() -> Iterator[Any]:
        yield from map(distinct, itertools.count())

    before = set(threading.enumerate())
    for live in (False, True):
        running = captions(fake.rt, Arrays(forever(), live=live), every=0, **ASK)
        next(running)
        running.close()
        assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "mmchat-feed"]


def test_an_error_of_the_iterator_reaches_the_reader(fake: FakeRuntime) -> None:
    def broken() -> Iterator[Any]:
        yield distinct(0)
        yield distinct(1)
        raise RuntimeError("the camera's program failed")

    for live in (False, True):
        with pytest.raises(RuntimeError, match="program failed"):
            list(captions(fake.rt, Arrays(broken(), live=live), every=0, **ASK))


def test_thumbnails_are_small_pictures(fake: FakeRuntime) -> None:
    [made] = captions(fake.rt, [colour("red", (900, 450))], thumbnails=True, **ASK)
    assert made.thumbnail is not None
    with Image.open(io.BytesIO(made.thumbnail)) as image:
        assert (image.format, image.size) == ("JPEG", (320, 160))
    [plain] = captions(fake.rt, [colour("red")], **ASK)
    assert plain.thumbnail is None


# Going on


PLANS = st.fixed_dictionaries(
    {},
    optional={
        "changed": st.sampled_from([0.0, 0.1]),
        "window": st.integers(1, 3),
        "every": st.sampled_from([0.0, 1.0, 2.5]),
        "max_frames": st.integers(1, 9),
    },
)


@settings(max_examples=many(20, 300))
@given(
    frames=st.lists(st.sampled_from(["red", "green", "blue", "bad"]), min_size=1, max_size=14),
    plan=PLANS,
    story=st.integers(0, 2),
    keep=st.sets(st.integers(0, 14)),
    keep_all=st.booleans(),
    cut=st.integers(0, 14),
)
def test_a_run_that_goes_on_gives_what_is_left(
    frames: list[str],
    plan: dict[str, Any],
    story: int,
    keep: set[int],
    keep_all: bool,
    cut: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Wherever the first run was killed; also where only captions with some words were kept."""
    pictures: list[Any] = [b"bad" if name == "bad" else colour(name) for name in frames]
    if all(name == "bad" for name in frames):
        return
    fake = FakeRuntime(tmp_path_factory.mktemp("store"))
    how = {**plan, "story": story if keep_all else 0, "on_notice": lambda text: None, **ASK}
    try:
        full = list(captions(fake.rt, pictures, **how))
    except VideoError as error:
        if "not one frame could be" not in str(error) or "bad" not in frames:
            raise
        return  # only bad frames were taken
    texts = sorted({caption.text for caption in full})
    wanted = texts if keep_all else [text for i, text in enumerate(texts) if i in keep]
    kept = [caption for caption in full if caption.text in wanted]
    before = [Caption.from_dict(caption.to_dict()) for caption in kept[:cut]]
    n_requests = fake.engine.n_requests
    rest = [caption for caption in captions(fake.rt, pictures, after=before, **how) if caption.text in wanted]
    assert without_usage(rest) == without_usage(kept[cut:])
    if keep_all:
        assert fake.engine.n_requests - n_requests == sum(not caption.carried for caption in rest)


def test_captions_of_another_source_are_noticed(fake: FakeRuntime) -> None:
    made = list(captions(fake.rt, map(distinct, range(5)), **ASK))
    with pytest.raises(VideoError, match=r"frame 0 .* another source"):
        list(captions(fake.rt, map(distinct, range(1, 9)), after=made, **ASK))
    with pytest.raises(VideoError, match=r"frame 1 .* another source, or with other settings"):
        list(captions(fake.rt, map(distinct, range(5)), every=2, after=made, **ASK))
    with pytest.raises(VideoError, match="ends before frame 3"):
        list(captions(fake.rt, map(distinct, range(3)), after=made, **ASK))


def test_a_live_source_goes_on_counting(fake: FakeRuntime) -> None:
    made = list(captions(fake.rt, Arrays(map(distinct, range(50)), live=True), every=0, **ASK))
    more = list(captions(fake.rt, Arrays(map(distinct, range(50)), live=True), every=0, after=made, **ASK))
    assert more[0].index > made[-1].index
    assert more[0].time >= made[-1].end
    assert made[-1].at is not None
    assert more[0].at is not None
    assert more[0].time - made[-1].time == pytest.approx(more[0].at - made[-1].at, abs=0.5)


# Cost


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nothing_is_kept_of_a_frame(fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption that were kept would take some 700 bytes in every round; caches of libraries fill up in one."""
    # What is remembered of texts is bounded, but by more than the frames of this test.
    monkeypatch.setattr(prompt, "_KNOWN_MESSAGES", 8)
    monkeypatch.setattr(prompt, "_KNOWN_TEXTS", 8)
    fake.tokenizer = ChatTokenizer(SPEC.tokenizer_path)
    running = captions(fake.rt, map(distinct, itertools.count()), changed=0.01, story=2, max_new_tokens=1)

    def python_bytes_after(n: int) -> int:
        assert len(list(itertools.islice(running, n))) == n
        fake.vision.encoded.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    python_bytes_after(30)
    tracemalloc.start()
    try:
        sizes = [python_bytes_after(20), *(python_bytes_after(100) for _ in range(4))]
        assert min(after - before for before, after in itertools.pairwise(sizes)) / 100 < 250, sizes
    finally:
        tracemalloc.stop()
        running.close()


@pytest.mark.timeout(7200)
@pytest.mark.skipif("many(0, 1) == 0", reason="an hour: pytest --hypothesis-profile=deep")
def test_100_000_frames_leave_memory_and_store_as_they_were(tmp_path: Path) -> None:
    cap = 20 << 20
    fake = FakeRuntime(tmp_path / "store", cap_bytes=cap)

    def camera() -> Iterator[Any]:
        for number in itertools.count():
            time.sleep(0.001)
            yield distinct(number)

    running = captions(fake.rt, Arrays(camera(), live=True), every=0, max_new_tokens=1)
    sizes: list[int] = []
    reached, n_made = -1, 0
    for caption in running:
        assert caption.index == reached + caption.drops + 1
        reached, n_made = caption.index, n_made + 1
        if n_made % 1000 == 0:
            fake.vision.encoded.clear()
            gc.collect()
            sizes.append(resident_bytes())
            assert sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file()) <= cap + 8192
        if n_made == 100_000:
            break
    running.close()
    slope = np.polyfit(np.arange(20, 100) * 1000, sizes[20:], 1)[0]
    print(
        f"memory: {slope:.2f} bytes per frame, {sizes[0] / 1e6:.1f} to {sizes[-1] / 1e6:.1f} MB; {reached + 1} frames"
    )
    assert slope < 20


def test_notices_are_values() -> None:
    assert Notice("a", bad_frame=True) == Notice("a", True)
    assert open_source(source := Arrays([])) is source
