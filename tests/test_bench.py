"""bench: what it counts is what was done, what it predicts is the counts times the figures, what it writes is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mmchat
from mmchat.bench import chat, host, record, rehearsal, work
from mmchat.bench.board import Work, predicted_s
from mmchat.bench.conversations import EIGHT, OVERFLOW, STANDARD, Ask, Conversation, Rewind
from mmchat.bench.pictures import draw
from mmchat.bench.script import Timed
from mmchat.engine import Event, Piece, Sampling, Tokens
from mmchat.model_dir import open_model
from mmchat.profile import Profile
from mmchat.prompt import ChatTokenizer
from mmchat.slicing import plan_slices, slice_image
from mmchat.store import Store
from tests.fakes import FakeEngine, FakeVision, never
from tests.rkllm_standin.__main__ import LIBRARY, write_board_folder
from tests.rkllm_standin.build import library
from tests.test_cli import run_here

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)


class ForgetfulEngine(FakeEngine):
    """Finds nothing in its cache."""

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        self.held = []
        yield from super().generate(pieces, sampling, should_stop, resume_ids=resume_ids)


@pytest.fixture
def runtime(tmp_path: Path) -> Callable[[type[FakeEngine]], Any]:
    """What looks like a runtime, on fakes."""

    def runtime(engine: type[FakeEngine]) -> Any:
        store = Store(tmp_path / engine.__name__)
        width = SPEC.llm.hidden_size
        return SimpleNamespace(
            spec=SPEC,
            tokenizer=TOKENIZER,
            store=store,
            vision=FakeVision(store, SPEC.vision.query_num, width),
            llm=engine(TOKENIZER, store, width, context_rows=SPEC.context_rows),
        )

    return runtime


# --- the conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", [*STANDARD, OVERFLOW], ids=lambda one: one.name)
def test_a_conversation_can_be_held(conversation: Conversation) -> None:
    """Questions are about pictures that were shown, and no more is taken back than was said."""
    shown: set[int] = set()
    n_turns = {0: 0, 1: 0}
    for step in conversation.steps:
        if isinstance(step, Rewind):
            assert 0 < step.n_turns <= n_turns[step.session]
            n_turns[step.session] -= step.n_turns
        else:
            shown.update(step.new)
            assert set(step.about) <= shown
            n_turns[step.session] += 1
    assert len({one.name for one in STANDARD}) == len(STANDARD)


def test_a_seed_is_a_picture() -> None:
    """The same one always; its views are all different, and differ from other pictures' views."""
    views = []
    for seed in range(1, 12):
        image = draw(seed)
        assert image.tobytes() == draw(seed).tobytes()
        plan = plan_slices(*image.size, scale_resolution=SPEC.slices.scale_resolution)
        views += [pixels.tobytes() for pixels in slice_image(image, plan)]
    assert len(set(views)) == len(views)
    assert draw(3, (320, 180)).size == (320, 180)


# --- work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", STANDARD, ids=lambda one: one.name)
def test_an_engine_with_one_cache_is_what_the_rules_say_of_prefix(
    runtime: Callable[[type[FakeEngine]], Any], conversation: Conversation
) -> None:
    """What was counted while it ran equals what was computed from the requests; nothing is done twice."""
    counted = work.count(conversation, runtime(FakeEngine))
    prefilled = [request.n_prefilled for request in counted.requests]
    assert prefilled == work._by_the_rules(counted.requests, "prefix")
    assert sum(request.n_slices for request in counted.requests) == len(counted.slices)
    if all(step.session == 0 for step in conversation.steps):
        assert prefilled == [request.new for request in counted.requests]
    else:
        assert sum(prefilled) > 1.5 * sum(request.new for request in counted.requests)


def test_an_engine_that_forgets_is_caught(runtime: Callable[[type[FakeEngine]], Any]) -> None:
    counted = work.count(EIGHT, runtime(ForgetfulEngine))
    prefilled = [request.n_prefilled for request in counted.requests]
    assert prefilled == work._by_the_rules(counted.requests, "resend") == [len(one.rows) for one in counted.requests]
    assert sum(prefilled) > 3 * sum(request.new for request in counted.requests)


def test_slices_that_are_encoded_twice_are_caught(runtime: Callable[[type[FakeEngine]], Any]) -> None:
    """As by a store that loses everything."""
    one = runtime(FakeEngine)
    steps = (Ask("What is it?", new=(1,)), Rewind(1), Ask("And now?", new=(1,)))
    for lossy, ratio in ((False, 1.0), (True, 2.0)):
        if lossy:
            one.store.has = lambda key: False
        one.store.clear()
        counted = work.count(Conversation("again", steps), one)
        assert work._sums(counted, "e", "s", "run", [1, 1], 16)["slices_ratio"] == ratio


def request(rows: Sequence[Any], computed: Sequence[int] = (), n_slices: int = 0) -> work.Request:
    return work.Request(tuple(rows), tuple(computed), len(rows), len(rows), len(computed), n_slices, 0, Work())


def test_the_rules_of_the_strategies() -> None:
    """A longer conversation, an edit, the same again, and another conversation."""
    requests = [
        request([1, 2, 3], [4]),
        request([1, 2, 3, 4, 5], [6]),
        request([1, 2, 9], [8]),
        request([1, 2, 9], [8]),
        request([7, 7], []),
    ]
    assert work._by_the_rules(requests, "resend") == [3, 5, 3, 3, 2]
    assert work._by_the_rules(requests, "append") == [3, 1, 3, 3, 2]
    assert work._by_the_rules(requests, "prefix") == [3, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("family", "strategy"), [("1.2.1-1.2.3", "resend"), ("1.2.1-1.2.3", "append"), ("1.3.0", "prefix")]
)
def test_the_rules_are_those_of_the_rkllm_engine(
    family: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in library, which keeps to them; a conversation with rewinds and pictures."""
    library(family)  # skips where there is no compiler
    folder = write_board_folder(tmp_path / "board", family)
    monkeypatch.setenv("RKLLM_STANDIN_KV", {"resend": "append"}.get(strategy, strategy))
    Profile.open(open_model(folder), folder / LIBRARY).update(strategy=strategy, rewinds=True)
    conversation = Conversation("short", STANDARD[2].steps[:9])
    with mmchat.open(folder, store=tmp_path / "store", n_threads=1) as runtime:
        counted = work.count(conversation, runtime)
        (figures,) = work.describe(counted, runtime)
    assert (figures["engine"], figures["strategy"]) == ("rkllm", strategy)
    assert [request.n_prefilled for request in counted.requests] == work._by_the_rules(counted.requests, strategy)


def test_predictions_are_counts_times_published_figures() -> None:
    """RK3588 w8a8 of the vendor's benchmark: 3.27 s per slice, 826 ms for 64 rows, 4.18 tokens per second."""
    assert predicted_s(Work(n_slices=2)) == pytest.approx(6.54)
    assert predicted_s(Work(n_text_rows=64)) == pytest.approx(0.826)
    assert predicted_s(Work(n_image_views=1)) == pytest.approx(0.826)
    assert predicted_s(Work(n_new=418)) == pytest.approx(100)
    assert predicted_s(Work(1, 2, 3, 4) + Work(1, 2, 3, 4)) == pytest.approx(2 * predicted_s(Work(1, 2, 3, 4)))


def test_the_figures_of_a_conversation() -> None:
    """Two turns about a picture of two views with two rows each, by hand."""
    view = [("k", 0), ("k", 1), ("l", 0), ("l", 1)]
    first = request([1, *view, 2, 3], [5, 6], n_slices=2)
    second = request([1, *view, 2, 3, 5, 6, 7], [8])
    counted = work.Counted("c", [first, second], {"k", "l"})
    found = work._sums(counted, "rkllm", "append", "rules", [7, 1], query_num=2)
    assert (found["slices_ratio"], found["rows_prefilled"], found["tokens_generated"]) == (1.0, 8, 3)
    assert found["predicted_rk3588_s"] == pytest.approx(predicted_s(Work(2, 4, 2, 3)))
    everything = Work(2, 3, 2, 2) + Work(2, 6, 2, 1)
    assert found["peers"][work.REENCODE] == pytest.approx(predicted_s(everything))


def test_bench_work_on_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pipeline: every slice once, every row once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "KEEPS", (1.0, 0.5))
    code, out, err = run_here("bench", "work", "--json", "--save")
    assert code == 0, err
    told = json.loads(out)
    ran = [one for one in told["conversations"] if one["counted"] == "run"]
    assert [one["name"] for one in ran] == [conversation.name for conversation in (*STANDARD, OVERFLOW)]
    for one in told["conversations"]:
        assert one["slices_ratio"] == 1.0
        assert set(one["peers"]) == {work.REENCODE, work.ONE_IMAGE}
        assert one["peers"][work.REENCODE] > one["predicted_rk3588_s"] > 0
    *roomy, overflowing = ran
    for one in roomy:
        assert (one["engine"], one["strategy"], one["trims"]) == ("openvino", "rewind", 0)
        assert one["rows_ratio"] == 1.0, one["name"]
    assert overflowing["trims"] > 0
    assert overflowing["kept_least"] >= 0.5
    assert 1.0 < overflowing["rows_ratio"] <= 2.0
    curve = {one["keep"]: one for one in told["overflow_curve"]}
    assert curve[0.5]["rows_ratio"] == overflowing["rows_ratio"] < curve[1.0]["rows_ratio"]
    saved = json.loads((tmp_path / "benchmarks" / "work.json").read_text())
    assert {name: saved[name] for name in ("conversations", "overflow_curve", "rehearsals")} == {
        name: told[name] for name in ("conversations", "overflow_curve", "rehearsals")
    }
    assert [(one["name"], one["keep"]) for one in told["rehearsals"]] == [
        (name, keep) for name in rehearsal._SCRIPTS for keep in (1.0, 0.5)
    ]
    assert "Predicted, not measured" in (tmp_path / "benchmarks" / "work.md").read_text()


# --- chat and host ----------------------------------------------------------------------------------------------


def test_a_timed_engine_passes_everything_on(tmp_path: Path) -> None:
    def engine() -> FakeEngine:
        return FakeEngine(TOKENIZER, Store(tmp_path), 8, context_rows=300)

    timed, sampling = Timed(engine()), Sampling(max_new_tokens=9, repetition_penalty=0.01)
    assert timed.context_rows == 300
    events = list(timed.generate([Tokens((1, 2))], sampling, never))
    assert events == list(engine().generate([Tokens((1, 2))], sampling, never))
    assert timed.n_tokens == 8  # all but the first
    assert 0 < timed.generate_s < timed.seconds
    assert timed.generate_s <= timed.waited_s


def test_bench_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = chat.run("demo", said.append, rounds=1)["chat"]
    assert (found["turns"], found["slices"], found["rounds"]) == (8, 27, 1)
    assert found["wall_s"] > 0
    assert found["overhead_share"] == pytest.approx(found["wall_s"] / found["model_s"] - 1)
    assert 0 < found["pictures_share"] < 1
    assert found["model_ms_per_token"] > 0
    assert len(said) == 2


def test_bench_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the start and the memory of whole programs, small."""
    monkeypatch.setattr(host, "_JPEGS", ((640, 480),))
    monkeypatch.setattr(host, "_TABLE_ROWS", 4000)
    (picture,) = host._pictures(1)
    assert picture["reference_pixels_equal"]
    assert picture["ratio"] > 0
    assert {(one["dtype"], one["rows"]) for one in host._rows(1)} == {
        (dtype, n) for dtype in ("F16", "BF16", "F32") for n in (1000, 4000)
    }
    messages = host._messages(1)
    assert all(one["ratio"] > 0 and one["ms"] > 0 for one in messages)
    assert host.psnr([np.zeros((2, 2, 3), np.uint8)], [np.full((2, 2, 3), 255, np.uint8)]) == 0


# --- the record -------------------------------------------------------------------------------------------------

CHAT = {
    "script": "s", "turns": 1, "tokens": 2, "slices": 3, "rounds": 5, "wall_s": 1.0, "model_s": 0.5,
    "overhead_share": 1.0, "pictures_share": 0.125, "model_ms_per_token": 3.0, "overhead_ms_per_token": 0.25,
}  # fmt: skip


def test_a_record_says_what_it_was_made_with_and_on(tmp_path: Path) -> None:
    found = {**record.context(), "chat": CHAT}
    assert {"date", "mmchat", "commit", "machine"} < set(found)
    assert found["machine"]["cores"] > 0
    files = record.save(found, tmp_path / "new" / "benchmarks")
    assert [path.name for path in files] == ["chat.json", "chat.md"]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(found))
    text = files[1].read_text()
    assert "| per token, host overhead | 0.250 ms |" in text
    assert found["machine"]["processor"] in text


@pytest.mark.parametrize(("load", "word"), [(0.1, "idle"), (1.9, "busy")])
def test_a_busy_machine_is_told(load: float, word: str) -> None:
    found = record.context()
    found["machine"].update(load_before=load, cores=2)
    assert f"was {word}" in record.to_markdown({**found, "chat": CHAT}).replace("*", "")


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    code, _, err = run_here("bench", "speed")
    assert code == 2
    assert "no section 'speed'" in err
    assert run_here("bench", "work", "--model", tmp_path)[0] == 1
