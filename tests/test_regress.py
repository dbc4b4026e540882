"""The regression kit without a board: talks and their files, prompts to measure, and that every check can fail."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmchat.cli import regressing
from mmchat.cli.options import Opening
from mmchat.engine import Done, Token
from mmchat.errors import RegressError, WorkerDied
from mmchat.prompt import DEFAULT_SYSTEM_PROMPT, build
from mmchat.regress import Sketch, Step, Talk, broken, check, hunt, report, talk
from mmchat.regress.rows import boundaries, fill
from mmchat.regress.strategies import conversations, prompts_of_rows
from mmchat.regress.trial import Failure, Trial
from tests.regress_kit import SPEC, TOKENIZER, FakeBoard, FakeClient, changed, crashing, other_token, rkllm

PICTURE = "What colour is the background?"


@pytest.fixture
def board(tmp_path: Path) -> FakeBoard:
    return FakeBoard(tmp_path / "store")


# Talks and their files


@given(drawn=conversations())
def test_a_talk_survives_its_file(drawn: Talk) -> None:
    assert Talk.from_dict(json.loads(drawn.to_json())) == drawn
    assert drawn.size >= (0, 1)


def test_files(tmp_path: Path) -> None:
    talks = (Talk((Step(text="é\n", pictures=(Sketch(3, 5, 6),)), Step("undo")), "trim"), Talk((Step(rows=40),)))
    talk.save(talks, tmp_path / "a.json")
    assert talk.load(tmp_path / "a.json") == talks
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept["talks"][1] == {"policy": "error", "steps": [{"do": "ask", "rows": 40}]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ("[]", "a file is list; it must be an object"),
        ('{"format": 2, "talks": []}', "format is 2; this version reads 1"),
        ('{"format": 1, "talks": []}', "talks is empty"),
        ('{"format": 1, "talks": [{"steps": 3}]}', "steps is 3; it must be a list"),
        ('{"format": 1, "talks": [{"policy": "no", "steps": []}]}', "policy is 'no'; it must be one of error, trim"),
        ('{"format": 1, "talks": [{"steps": [{"do": "sing"}]}]}', "do is 'sing'; it must be one of ask, edit"),
        ('{"format": 1, "talks": [{"steps": [{"at": 1}]}]}', "a step has 'at'; known are do, session"),
        ('{"format": 1, "talks": [{"steps": [{"text": " "}]}]}', "text is ' '; it must be a text that is not empty"),
        ('{"format": 1, "talks": [{"steps": [{"rows": true}]}]}', "rows is True; it must be a whole number from 0"),
        ('{"format": 1, "talks": [{"steps": [{"cancel_after": -1}]}]}', "cancel_after is -1"),
        ('{"format": 1, "talks": [{"steps": [{"pictures": [{"width": 9000}]}]}]}', "width is 9000"),
        ('{"format": 1, "talks": [{"steps": [{"pictures": [{"png": 1}]}]}]}', "png is 1; it must be a text"),
    ],
)
def test_files_that_are_none_of_ours(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RegressError, match=r"x\.json: ") as caught:
        talk.load(tmp_path / "x.json")
    assert says in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RegressError, match="cannot be read"):
        talk.load(tmp_path / "none.json")


def test_sketches_are_what_their_numbers_say() -> None:
    one, same, other = Sketch(1, 30, 20).draw(), Sketch(1, 30, 20).draw(), Sketch(2, 30, 20).draw()
    assert one.size == (30, 20)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    given_ = Sketch(png=base64.b64encode(file.getvalue()).decode())
    assert np.asarray(given_.draw()).tolist() == [[[255, 0, 0]] * 3] * 2
    for bad in ("!", base64.b64encode(b"GIF89a").decode()):
        with pytest.raises(RegressError, match="png cannot be read"):
            Sketch(png=bad).draw()


# Prompts to measure


@given(st.data())
def test_prompts_of_rows(data: st.DataObject) -> None:
    n = data.draw(st.one_of(st.integers(25, 300), st.sampled_from(boundaries(SPEC.context_rows))))
    text = data.draw(prompts_of_rows(n))
    prompt = build(
        [{"role": "user", "content": text}], TOKENIZER, sizes=[], system_prompt=DEFAULT_SYSTEM_PROMPT,
    )  # fmt: skip
    assert len(prompt.ids) == n


def test_too_few_rows_for_a_prompt_are_refused() -> None:
    @settings(database=None)
    @given(prompts_of_rows(3))
    def draws(text: str) -> None: ...

    with pytest.raises(RegressError, match=r"a prompt has [0-9]+ rows at least; 3 are asked for"):
        draws()


def test_a_tokenizer_that_joins_digits_is_told() -> None:
    with pytest.raises(RegressError, match="no text of digits makes exactly 7 rows"):
        fill(7, lambda text: 2 * len(text))


@given(st.integers(40, 9000))
def test_boundaries(cap: int) -> None:
    found = boundaries(cap, safe_rows=35)
    assert found == sorted(set(found))
    assert found[-3:] == [cap - 1, cap, cap + 1]
    assert {34, 35, 36} <= set(found)
    assert {n + d for n in (64, 128, 256, 1024, 4096) for d in (-1, 0, 1) if n + d <= cap} <= set(found)


# A board that keeps its promises, and one that does not


@settings(max_examples=max(15, settings().max_examples // 10))
@given(drawn=conversations(max_rows=401))
def test_whatever_is_drawn_passes_where_nothing_is_wrong(drawn: Talk, tmp_path_factory: Any) -> None:
    check(FakeBoard(tmp_path_factory.mktemp("store")).rt, drawn)


def test_a_question_asked_again_has_the_rows_that_it_had(board: FakeBoard) -> None:
    check(board.rt, Talk((Step(rows=50), Step("again"), Step("undo"), Step(text="So?"))))


def test_a_limit_on_runs_is_no_failure(board: FakeBoard) -> None:
    board.llm.prompt_rows = 100
    for rows in (99, 100, 101, 300):
        check(board.rt, Talk((Step(rows=rows, max_new_tokens=1), Step(text="And?"))))


TWO = Talk((Step(text="Describe the image."), Step(text="Say it again.")))
SHOWN = Talk((Step(text=PICTURE, pictures=(Sketch(0),)),))


def _refusing(event: Any, client: FakeClient) -> Any:
    from mmchat.errors import ContextFull

    raise ContextFull(50, 8, 400)


def _dying(event: Any, client: FakeClient) -> Any:
    raise WorkerDied("the LLM worker died", name="LLM")


@pytest.mark.parametrize(
    ("breaks", "kind", "says", "what"),
    [
        (changed(Done, n_prompt=7), broken.CountsWrong, "rows were sent", TWO),
        (changed(Done, n_prefilled=0), broken.CountsWrong, "are not the prompt's", TWO),
        (changed(Done, n_new=1), broken.CountsWrong, "8 tokens came", TWO),
        (changed(Done, reason="length", n_new=lambda e: 3), broken.CountsWrong, "8 tokens came", TWO),
        (
            changed(Done, n_reused=lambda e: e.n_reused + 1, n_prefilled=lambda e: e.n_prefilled - 1),
            broken.CountsWrong,
            "0 rows could be known at most",
            TWO,
        ),
        (crashing(lambda client: True), broken.Crashed, r"a prompt of [0-9]+ rows: the LLM worker died", TWO),
        (_dying, broken.Crashed, r"a prompt of [0-9]+ rows: the LLM worker died", TWO),
        (_refusing, broken.CapExceeded, "refused, though it fits", TWO),
        (
            lambda event, client: other_token(event) if client.worker.n_runs % 2 else event,
            broken.AnswersDiffer,
            "from an emptied cache",
            Talk(TWO.steps[:1]),
        ),
    ],
)
def test_a_broken_engine_is_found(
    breaks: Any, kind: type[broken.Broken], says: str, what: Talk, board: FakeBoard
) -> None:
    board.llm.broken = breaks
    with pytest.raises(kind, match=says):
        check(board.rt, what)


def test_an_end_token_that_the_cache_keeps_may_be_reused(board: FakeBoard) -> None:
    """One row more than question and answer, where the answer ended by itself; and no more than that."""
    board.llm._engine.script = ["red", "blue"] * 2
    for more, kind in ((1, None), (2, broken.CountsWrong)):
        board.llm.broken = changed(
            Done,
            n_reused=lambda e, more=more: e.n_reused + more * (e.n_reused > 0),
            n_prefilled=lambda e, more=more: e.n_prefilled - more * (e.n_reused > 0),
        )
        with pytest.raises(kind) if kind else contextlib.nullcontext():
            Trial(board.rt).player.play(TWO)


def test_a_text_that_is_not_what_its_tokens_spell(board: FakeBoard) -> None:
    board.llm._engine.script = ["red", "blue"]
    board.llm.broken = changed(Token, text="x")
    with pytest.raises(broken.CountsWrong, match="spell 'red', not 'x"):
        check(board.rt, TWO)


def test_an_answer_that_is_another_when_asked_again(board: FakeBoard) -> None:
    board.llm._engine.script = ["red", "blue"]
    with pytest.raises(broken.AnswersDiffer, match="asked again"):
        check(board.rt, Talk((Step(), Step("again"))))


def test_a_cache_that_does_not_forget(board: FakeBoard) -> None:
    board.llm.forgets = False
    with pytest.raises(broken.CountsWrong, match="0 rows could be known at most"):
        check(board.rt, TWO)


def test_embeddings_that_drift(board: FakeBoard) -> None:
    board.vision.drifts = True
    with pytest.raises(broken.PicturesDiffer, match="64x64 has other rows when it is encoded again"):
        check(board.rt, SHOWN)
    check(board.rt, TWO)


def test_a_picture_with_slices_that_are_the_same(board: FakeBoard) -> None:
    session = board.session()
    session.ask("?", Sketch(0, 121, 519).draw(), max_new_tokens=1).text  # noqa: B018
    (image,) = session.images
    assert len(set(image.keys)) < len(image.keys)
    check(board.rt, Talk((Step(pictures=(Sketch(0, 121, 519),)),)))


def test_a_store_that_drops_pictures_is_no_failure(board: FakeBoard) -> None:
    trial = Trial(board.rt)
    trial.player.play(SHOWN)
    board.store.clear()
    trial.player.play(SHOWN)  # encoded again, both times
    assert all(board.store.peek(key) for key in trial.player._again.values())


def test_a_strategy_that_was_given_up(board: FakeBoard) -> None:
    board.rkllm, board.llm.used = rkllm(["append", "resend"]), "resend"
    board.llm.worker.log_tail = "mmchat: this library does not keep to append (7 rows); from now on resend"
    with pytest.raises(broken.StrategiesDiffer, match=r"gave append up: .*\(7 rows\)"):
        check(board.rt, TWO)


# Telling a failure from what came before it


def failing(when: Callable[[FakeClient], bool], tmp_path: Path) -> tuple[Trial, FakeBoard]:
    board = FakeBoard(tmp_path / "store")
    board.llm.broken = crashing(when)
    return Trial(board.rt), board


def test_what_fails_on_new_workers_too_is_a_failure(tmp_path: Path) -> None:
    trial, board = failing(lambda client: client.n_rows >= 100, tmp_path)
    assert trial.attempt(TWO) is None
    assert not board.llm.worker.n_kills
    failure = trial.attempt(Talk((Step(rows=120),)))
    assert failure is not None
    assert (failure.name, failure.rows, failure.talks) == ("crash", 120, (Talk((Step(rows=120),)),))
    assert board.llm.worker.n_kills == 2
    n_runs = board.llm.worker.n_runs
    assert trial.attempt(Talk((Step(rows=120),))) is failure  # nothing is played twice
    assert board.llm.worker.n_runs == n_runs


def test_what_happens_once_is_flaky_and_no_failure(tmp_path: Path) -> None:
    once = iter([True])
    trial, _ = failing(lambda client: client.n_rows >= 100 and next(once, False), tmp_path)
    assert trial.attempt(TWO) is None
    assert trial.attempt(Talk((Step(rows=120),))) is None
    assert [flaky.rows for flaky in trial.flaky] == [120]


def test_flaky_ones_are_warnings_in_tests(tmp_path: Path) -> None:
    once = iter([True])
    board = FakeBoard(tmp_path / "store")
    check(board.rt, TWO)
    board.llm.broken = crashing(lambda client: next(once, False))
    with pytest.warns(UserWarning, match="seen once, and not again on new workers: a prompt of"):
        check(board.rt, Talk((Step(rows=50),)))


def test_what_needs_the_talks_before_it_is_a_failure_with_them(tmp_path: Path) -> None:
    trial, _ = failing(lambda client: client.worker.n_runs == 9, tmp_path)
    one = [Talk((Step(rows=40 + n),)) for n in range(5)]  # two runs each
    assert [trial.attempt(talk) for talk in one[:4]] == [None] * 4
    failure = trial.attempt(one[4])
    assert failure is not None
    assert failure.talks == tuple(one)


# Making it small


def hunted(
    fails: Callable[[Talk], bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    openings: Any = (),
    lengths: Any = (),
    minutes: float = 2,
) -> hunt.Outcome:
    """The search with a verdict by looking at the talk; nothing is played."""

    def attempt(trial: Trial, talk: Talk) -> Failure | None:
        return Failure(broken.Crashed, "it broke", (talk,), 0) if fails(talk) else None

    monkeypatch.setattr(Trial, "attempt", attempt)
    monkeypatch.setattr(hunt, "HABITS", openings)
    monkeypatch.setattr(hunt, "lengths", lambda cap: lengths)
    monkeypatch.setattr(hunt, "conversations", lambda runtime, max_rows: conversations(max_rows=max_rows))
    board = FakeBoard(tmp_path / "store")
    return hunt.hunt(board.rt, minutes=minutes, seed=1, database=tmp_path / "db")


@pytest.mark.parametrize("longest", [150, 151, 399, 1900])
def test_a_length_is_found_to_the_row(longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = lambda talk: any(step.rows > longest for step in talk.steps)  # noqa: E731
    outcome = hunted(fails, tmp_path, monkeypatch, lengths=(1024, 2015) if longest > 999 else ())
    assert outcome.failure is not None
    (small,) = outcome.failure.talks
    assert small == Talk((Step(rows=longest + 1, max_new_tokens=1),))
    assert longest > 999 or any((tmp_path / "db" / "examples").iterdir())


def test_what_failed_is_tried_first_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Talk] = []

    def fails(talk: Talk) -> bool:
        seen.append(talk)
        return any(step.rows > 100 for step in talk.steps)

    assert not hunted(fails, tmp_path, monkeypatch).good
    seen.clear()
    assert not hunted(fails, tmp_path, monkeypatch).good
    assert fails(seen[0])


def test_what_was_found_survives_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_failed = 0

    def fails(talk: Talk) -> bool:
        nonlocal n_failed
        n_failed += any(step.rows > 100 for step in talk.steps)
        if n_failed == 3:
            raise KeyboardInterrupt
        return any(step.rows > 100 for step in talk.steps)

    outcome = hunted(fails, tmp_path, monkeypatch)
    assert outcome.failure is not None
    assert any(step.rows > 100 for step in outcome.failure.talks[0].steps)
    n_failed = 2
    with pytest.raises(KeyboardInterrupt):
        hunted(fails, tmp_path / "nothing yet", monkeypatch)


def test_an_opening_that_fails_is_made_small_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Talk((Step(text="long" * 9), Step("undo"), *SHOWN.steps, Step("edit", text="so", cancel_after=3)), "trim")

    def fails(talk: Talk) -> bool:
        return any(step.pictures for step in talk.steps) and any(step.do == "edit" for step in talk.steps)

    outcome = hunted(fails, tmp_path, monkeypatch, openings=(start,))
    assert outcome.failure is not None
    (small,) = outcome.failure.talks
    assert small.policy == "error"
    assert [(step.do, step.text, len(step.pictures)) for step in small.steps] == [("ask", "?", 1), ("edit", "?", 0)]


def test_nothing_is_found_where_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = hunted(lambda talk: False, tmp_path, monkeypatch, minutes=0.02)
    assert outcome.good
    assert outcome.seconds >= 1


# Reports


def outcome(failure: Failure | None, *flaky: Failure) -> hunt.Outcome:
    facts = {"model": "demo", "folder": "/m", "context_rows": 400, "strategy": "append"}
    return hunt.Outcome(failure, flaky, facts, 5, 1.5, 3, 4, 6, 120)


FAILURE = Failure(broken.Crashed, "died \x00 & <gone>", (Talk((Step(rows=120, text="\ud800"),)),), 120)


def test_reports() -> None:
    good, bad, odd = outcome(None), outcome(FAILURE), outcome(None, FAILURE)
    assert [found.good for found in (good, bad, odd)] == [True, False, False]
    assert report.to_text(good, None).endswith("verdict     passed")
    text = report.to_text(bad, Path("x.json"))
    assert "mmchat regress --model /m --replay x.json" in text
    options = regressing._conditions(Opening("demo", "openvino", "my store", 512, 2))
    text = report.to_text(bad, Path("x y.json"), options)
    again = "--model /m --engine openvino --context 512 --threads 2 --store 'my store' --replay 'x y.json'"
    assert again in text
    assert '"rows": 120' in text
    assert report.to_text(odd, None).endswith("verdict     flaky")
    told = json.loads(json.dumps(report.to_dict(bad, Path("x.json"))))
    assert (told["passed"], told["failure"]["property"], told["replay"]) == (False, "crash", "x.json")
    for found, kinds in ((good, []), (bad, ["failed"]), (odd, ["flaky"])):
        (suite,) = ElementTree.fromstring(report.to_junit(found))
        assert suite.get("tests") == str(len(suite.findall("testcase"))) == "6"
        assert [element.get("type") for element in suite.iter("failure")] == kinds
        assert suite.get("failures") == str(len(kinds))


# What it needs


def test_without_hypothesis_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['hypothesis'] = None; from mmchat.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "regress", "--model", "demo"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mmchat: regress needs hypothesis: pip install hypothesis\n"


def test_the_package_imports_neither_hypothesis_nor_pytest() -> None:
    code = "import mmchat.regress, sys; from mmchat.regress import check; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"hypothesis", "pytest", "openvino"} & set(loaded)
