"""Calibration finds what the stand-in library does, chooses the strategy for it, and the next chat keeps to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mmchat
from mmchat import calibrate as calibration
from mmchat import probe_ladder, probe_runs, probes
from mmchat.calibrate import Report, Step, calibrate
from mmchat.cli import app
from mmchat.cli.calibrating import _to_text
from mmchat.engine import Done, ImageRows, Piece, Sampling, Tokens
from mmchat.errors import ContextFull, EngineError, WorkerDied
from mmchat.llm_proc import LlmClient, Rkllm
from mmchat.model_dir import open_model
from mmchat.probe_pictures import Sight
from mmchat.profile import Profile
from mmchat.rkllm_abi import FAMILIES
from mmchat.runtime import open_vision
from mmchat.store import Store
from mmchat.worker import Worker
from tests.conversation import GREEDY, talk
from tests.fakes import never
from tests.rkllm_standin.__main__ import LIBRARY, write_board_folder
from tests.rkllm_standin.build import library


def run(folder: Path, **options: Any) -> Report:
    return calibrate(open_model(folder), folder / LIBRARY, **options)


@pytest.fixture
def short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_ladder, "rungs", lambda longest: [64, 129])
    monkeypatch.setattr(probes, "TRIALS", 2)
    monkeypatch.setattr(probes, "_MEMORY_RUNS", 2)


# (family, switches) -> (strategy, rewinds, end token kept)
BEHAVIOURS: list[tuple[str, dict[str, str], tuple[str, bool, bool | None]]] = [
    ("1.2.1b1", {"KV": "append"}, ("resend", False, None)),  # it cannot tell how many rows it holds
    ("1.2.1-1.2.3", {"KV": "broken-append"}, ("resend", False, False)),
    ("1.2.1-1.2.3", {"KV": "append", "EOS_IN_KV": "1"}, ("append", False, True)),
    ("1.2.1-1.2.3", {"KV": "prefix"}, ("prefix", True, False)),
    ("1.3.0", {"KV": "append", "KV_COUNT": "7"}, ("resend", False, None)),
    ("1.3.0", {"KV": "append+prefix"}, ("prefix", True, False)),
    ("1.3.0", {"KV": "append+prefix", "GENERATED_MATCH": "0"}, ("append", False, False)),
    ("1.3.0", {"KV": "stale-prefix"}, ("prefix", False, False)),
    ("1.3.0", {"KV": "prefix", "PREFILL_COUNT": "all"}, ("resend", False, False)),
    ("1.3.0", {"KV": "append", "NO_EOS": "1"}, ("resend", False, None)),
]


@pytest.mark.parametrize(("family", "switches", "expected"), BEHAVIOURS, ids=lambda value: str(value))
@pytest.mark.usefixtures("short_ladder")
def test_it_finds_what_the_library_does(
    family: str, switches: dict[str, str], expected: Any, board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in switches.items():
        monkeypatch.setenv(f"RKLLM_STANDIN_{name}", value)
    folder = board(family)
    report = run(folder)
    found = (report.profile.strategy, report.profile.rewinds, report.probes["append"].get("end_in_kv"))
    why = report.probes["append"].get("why") or report.probes["prefix"].get("why") or ""
    print(f"{family:12} {json.dumps(switches):46} {found[0]:7} rewinds {found[1]!s:5} end kept {found[2]!s:5} {why}")
    assert found == expected
    assert report.profile.safe_rows is None
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    assert (profile.strategy, profile.rewinds, profile.end_in_kv) == expected
    assert report.probes["repeats"]["good"]
    assert report.probes["files"]["good"]
    assert report.probes["abort"]["usable"]


@pytest.mark.parametrize("family", ["1.2.1-1.2.3", "1.3.0"])
@pytest.mark.usefixtures("short_ladder")
def test_answers_longer_than_what_is_compared_change_nothing(
    family: str, board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 1.2.3 they are aborted, and an aborted run has no counters."""
    monkeypatch.setattr(probe_runs, "EQUAL_TOKENS", 3)
    monkeypatch.setattr(probes, "EQUAL_TOKENS", 3)
    report = run(board(family))
    assert (report.profile.strategy, report.profile.rewinds) == ("prefix", True)


# What a KV cache may do, and the strategy for it where a library can tell how many rows it holds.
RULES: dict[str, tuple[dict[str, str], str]] = {
    "keeps nothing": ({"KV": "none"}, "resend"),
    "append": ({"KV": "append"}, "append"),
    "append, end token kept": ({"KV": "append", "EOS_IN_KV": "1"}, "append"),
    "broken append": ({"KV": "broken-append"}, "resend"),
    "prefix": ({"KV": "prefix"}, "prefix"),
    "prefix, but not of answers": ({"KV": "prefix", "GENERATED_MATCH": "0"}, "prefix"),
    "append and prefix": ({"KV": "append+prefix"}, "prefix"),
    "stale prefix": ({"KV": "stale-prefix"}, "prefix"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("short_ladder")
def test_a_calibrated_chat_is_openvinos_and_prefills_what_its_library_allows(
    family: str,
    rule: str,
    board: Any,
    openvino_talk: Any,
    board_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    tabulate: Any,
) -> None:
    """Six turns, four pictures, greedy: token for token the same, in every ABI and with every cache behaviour."""
    switches, strategy = RULES[rule]
    for name, value in switches.items():
        monkeypatch.setenv(f"RKLLM_STANDIN_{name}", value)
    folder = board(family)
    found = run(folder).profile.strategy
    with mmchat.open(folder, store=board_store, n_threads=1) as runtime:
        answers, n_prefilled, n_new = talk(runtime)
    tabulate(
        "RKLLM: a conversation of 6 turns and 4 pictures, calibrated",
        ABI=family,
        cache=rule,
        strategy=found,
        rows_prefilled=n_prefilled,
        new=n_new,
        ratio=f"{n_prefilled / n_new:.2f}",
        answers="OpenVINO's" if answers == openvino_talk[0] else "WRONG",
    )
    assert (answers, n_new) == openvino_talk
    assert found == (strategy if FAMILIES[family].kv_cache_size else "resend")
    n_answers = sum(map(len, answers[:-1]))
    if found == "resend":
        assert n_prefilled > n_new
    else:
        recomputed = n_answers if "GENERATED_MATCH" in switches else 0
        kept_ends = len(answers) - 1 if "EOS_IN_KV" in switches else 0
        assert n_prefilled == n_new + recomputed - kept_ends


@pytest.mark.usefixtures("short_ladder")
def test_the_ladder_finds_the_length_that_crashes(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "300")
    monkeypatch.setattr(probe_ladder, "rungs", lambda longest: [64, 128, 256, 512, longest])
    report = run(board())
    assert report.profile.safe_rows is not None
    assert 300 - 512 // 64 <= report.profile.safe_rows <= 300
    assert min(report.probes["ladder"]["crashed"]) > 300
    assert any("longer runs than" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_a_crash_that_does_not_repeat_is_no_limit(board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    run(board()).profile.path.unlink()
    n_runs = int.from_bytes((tmp_path / "count").read_bytes()[8:16], "little")
    (tmp_path / "count").unlink()
    monkeypatch.setenv("RKLLM_STANDIN_CRASH", str(n_runs - 4))  # the last of the ladder; four of memory follow
    report = run(board())
    assert (report.probes["ladder"]["odd"], report.probes["ladder"]["crashed"]) == ([129], [])
    assert report.profile.safe_rows is None
    assert any("runs of 129 rows crashed once" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_where_long_runs_crash_a_cache_that_takes_parts_is_preferred(
    board: Any, monkeypatch: pytest.MonkeyPatch, board_store: Path
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append+prefix")
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "128")
    folder = board()
    report = run(folder)
    assert report.probes["append"]["chunks"]
    assert (report.profile.strategy, report.profile.chunks) == ("append", True)
    assert 127 <= (report.profile.safe_rows or 0) <= 128
    with mmchat.open(folder, store=board_store, n_threads=1) as runtime:
        assert runtime.llm.prompt_rows == runtime.context_rows
        reply = runtime.session().ask("What colour is it, 1 2 3 4 5 6 7 8 9? " * 10, **GREEDY)
        assert reply.text
        assert reply.usage.n_prompt > 256
        assert reply.usage.restarts == 0
    old = run(board("1.2.1-1.2.3"))
    assert not old.probes["append"]["chunks"]  # it ends no run by itself
    assert (old.profile.strategy, old.profile.chunks) == ("prefix", False)


@pytest.mark.usefixtures("short_ladder")
def test_memory_that_is_lost_is_measured(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_LEAK_MB", "2")
    monkeypatch.setattr(probes, "_MEMORY_RUNS", 10)
    report = run(board())
    assert 1.9 < report.probes["memory"]["mb_per_run"] < 2.3
    lost = report.probes["memory"]["mb_per_run"]
    assert any(f"every run loses {lost} MB" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_it_goes_on_where_it_was(board: Any) -> None:
    folder, said = board(), list[str]()

    def interrupt(step: Step) -> None:
        said.append(str(step))
        if step.detail == "129 rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, say=interrupt)
    assert any("[6/8] speed" in text for text in said)
    said.clear()
    report = run(folder, say=lambda step: said.append(str(step)))
    assert said[:2] == ["[0/8] loading the model", "[7/8] how long a run may be"]
    assert not any("64 rows" in text for text in said)
    assert (report.probes["ladder"]["worked"], report.profile.safe_rows) == ([64, 129], None)  # no crash
    said.clear()
    run(folder, say=lambda step: said.append(str(step)))
    assert said == ["[0/8] loading the model"]


@pytest.mark.usefixtures("short_ladder")
def test_a_model_that_does_not_load_again_says_nothing_of_lengths(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash the NPU's memory may be gone until the board is restarted; then it goes on there."""
    folder, lost = board(), list[str]()
    noise, ready = probe_runs.Runs.noise, Worker.ready

    def crash(runs: probe_runs.Runs, n_rows: int) -> Any:
        if n_rows == 129 and not lost:
            runs.worker.ready()
            lost.append("memory")
            runs.worker.kill()
            raise WorkerDied("the LLM worker died (killed by signal 11 SIGSEGV)", name="LLM", exit_code=-11)
        return noise(runs, n_rows)

    def load(worker: Worker) -> dict[str, Any]:
        if lost == ["memory"] and worker.pid is None:
            raise EngineError("rkllm_init returned -1")
        return ready(worker)

    monkeypatch.setattr(probe_runs.Runs, "noise", crash)
    monkeypatch.setattr(Worker, "ready", load)
    report = run(folder)
    assert (report.probes["ladder"]["crashed"], report.profile.safe_rows) == ([], None)
    assert any("(rkllm_init returned -1): restart the board" in text for text in report.advice)
    assert "memory" not in report.probes
    assert "not measured" in _to_text(report)
    lost.append("restarted")
    report = run(folder)
    assert (report.probes["ladder"]["odd"], report.profile.safe_rows) == ([129], None)
    assert not any("restart the board" in text for text in report.advice)
    assert "mb_per_run" in report.probes["memory"]


def failing(why: str) -> Any:
    """A probe."""

    def probe(*_: Any) -> dict[str, Any]:
        raise EngineError(why)

    return probe


@pytest.mark.usefixtures("short_ladder")
def test_what_failed_for_a_missing_package_runs_again(
    board: Any, sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = board()
    with monkeypatch.context() as patch:
        patch.setattr("mmchat.calibrate.encoder", failing("no Lite2"))
        report = run(folder, sight=sight)
    assert report.probes["encoder"] == {"failed": "no Lite2"}
    assert any("'encoder' failed: no Lite2 (it runs again with the next" in text for text in report.advice)
    said: list[str] = []
    report = run(folder, sight=sight, say=lambda step: said.append(step.title))
    assert set(said) == {"loading the model", "the encoder's speed"}
    assert report.probes["encoder"]["s_per_slice"] > 0
    assert not any("failed" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_pictures_are_asked_again_where_the_choice_may_be_another(
    board: Any, sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = board()
    with monkeypatch.context() as patch:
        patch.setattr(probes, "prefix", failing("busy"))
        patch.setattr(probes, "append", failing("busy"))
        report = run(folder, sight=sight)
    assert (report.profile.strategy, report.probes["pictures"]["strategy"]) == ("resend", "resend")
    said: list[str] = []
    report = run(folder, sight=sight, say=lambda step: said.append(step.title))
    assert "is every picture found again" in said
    assert (report.profile.strategy, report.probes["pictures"]["strategy"]) == ("prefix", "prefix")


@pytest.mark.usefixtures("short_ladder")
def test_a_file_that_was_damaged_is_measured_anew_when_it_is_whole(board: Any) -> None:
    folder = board()
    text = (folder / "mmchat.json").read_text()
    run(folder)
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    bad = {"good": False, "why": "qwen.rkllm: is damaged: copy it again"}
    profile.update(probes={**profile.probes, "files": bad, "append": {"works": False, "why": "measured on it"}})
    report = run(folder)
    assert report.probes["files"] == {"good": True}
    assert "measured on it" not in str(report.probes["append"])
    assert (folder / "mmchat.json").read_text() == text


@pytest.mark.usefixtures("short_ladder")
def test_after_a_crash_of_an_early_probe_the_rest_waits_for_the_restart(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rkllm_init fails from then on: that says nothing of the library's cache."""
    folder, lost = board(), list[str]()
    ready = Worker.ready

    def crash(runs: probe_runs.Runs) -> dict[str, Any]:
        runs.worker.kill()
        lost.append("memory")
        raise WorkerDied("the LLM worker died (killed by signal 11 SIGSEGV)", name="LLM", exit_code=-11)

    def load(worker: Worker) -> dict[str, Any]:
        if lost == ["memory"]:
            raise EngineError("rkllm_init returned -1")
        return ready(worker)

    monkeypatch.setattr(probes, "abort", crash)
    monkeypatch.setattr(Worker, "ready", load)
    report = run(folder)
    assert set(report.probes) == {"files", "abort"}
    assert report.profile.strategy == "resend"
    assert any("(rkllm_init returned -1): restart the board" in text for text in report.advice)
    assert not any("different answers" in text for text in report.advice)
    assert "not known" in _to_text(report)
    assert "None" not in _to_text(report)
    assert not any("keeps nothing to rely on" in text for text in report.advice)
    lost.append("restarted")
    report = run(folder)
    assert report.profile.strategy == "prefix"
    assert "crashed" in report.probes["abort"]


@pytest.mark.usefixtures("short_ladder")
def test_a_crash_by_the_pictures_leaves_nothing_to_rely_on(board: Any) -> None:
    folder = board()
    assert run(folder).profile.strategy == "prefix"
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    for shown, strategy in (
        ({"crashed": "the LLM worker died", "worker": "LLM"}, "resend"),
        ({"crashed": "it was begun twice and never ended"}, "resend"),
        ({"crashed": "the vision worker died", "worker": "vision"}, "prefix"),
        ({"bound": True, "strategy": "resend"}, "resend"),
        ({"bound": True, "strategy": "prefix"}, "prefix"),
    ):
        profile.update(probes={**profile.probes, "pictures": shown})
        assert run(folder).profile.strategy == strategy, shown


@pytest.mark.usefixtures("short_ladder")
def test_what_took_the_board_down_twice_counts_as_crashed(board: Any) -> None:
    folder, said = board(), list[str]()
    run(folder)
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    whole = profile.probes
    profile.update(
        probes={**whole, "memory": {"begun": 2}, "ladder": {"begun": 1, "worked": [64], "trying": 129, "crashed": []}}
    )
    report = run(folder, say=lambda step: said.append(str(step)))
    assert "[7/8] how long a run may be: 129 rows, once more after a crash" in said
    assert (report.probes["ladder"]["odd"], report.profile.safe_rows) == ([129], None)
    assert "begun twice" in report.probes["memory"]["crashed"]
    assert any("'memory' crashed" in text for text in report.advice)
    # and where it goes down once more, that is on disk already
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    profile.update(probes={**whole, "ladder": {"begun": 2, "worked": [64], "trying": 129, "crashed": [129]}})
    assert 125 <= (run(folder).profile.safe_rows or 0) < 129


@pytest.mark.usefixtures("short_ladder")
def test_a_probe_that_crashes_is_a_result(board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("RKLLM_STANDIN_CRASH", "10")  # of the four of abort, four of repeats and more of append
    report = run(board())
    assert "SIGSEGV" in report.probes["append"]["crashed"]
    assert report.profile.strategy == "prefix"
    assert any("'append' crashed" in text for text in report.advice)


@pytest.fixture
def sight(board: Any, tmp_path: Path) -> Iterator[Sight]:
    store = Store(tmp_path / "sight")
    vision = open_vision(open_model(board()), store)
    yield Sight(vision, store)
    vision.worker.close()


@pytest.mark.usefixtures("short_ladder")
def test_pictures_are_asked_for_by_number_and_speeds_are_kept(board: Any, sight: Sight) -> None:
    folder = board()
    report = run(folder, sight=sight)
    shown = report.probes["pictures"]
    assert (shown["bound"], shown["asked"], shown["compared"]) == (True, 8, 8)
    assert shown["n_prefilled"] == shown["n_new"]
    assert shown["named"] > 4  # of eight; how many depends on the demo model
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    for name in ("prefill_rows_per_s", "decode_tokens_per_s", "encode_s_per_slice"):
        assert getattr(profile, name) > 0, name
    assert set(report.probes["ladder"]["seconds"]) == {"64", "129"}


@pytest.mark.usefixtures("short_ladder")
def test_pictures_that_are_mixed_up_end_in_resend(board: Any, sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the other probes have missed it."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", "stale-prefix")
    choose = calibration._chosen
    monkeypatch.setattr(calibration, "_chosen", lambda found: {**choose(found), "rewinds": True})
    report = run(board(), sight=sight)
    assert not report.probes["pictures"]["bound"]
    assert (report.profile.strategy, report.profile.rewinds) == ("resend", False)
    assert any("pictures were mixed up" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_an_encoder_that_does_not_work_leaves_the_rest(board: Any, sight: Sight) -> None:
    sight.vision.worker.close()  # type: ignore[attr-defined]
    report = run(board(), sight=sight)
    assert "closed" in report.probes["encoder"]["failed"]
    assert any("'pictures' failed" in text for text in report.advice)
    assert (report.profile.strategy, report.profile.encode_s_per_slice) == ("prefix", None)


@pytest.mark.usefixtures("short_ladder")
def test_the_command_prints_a_report_or_json(board: Any) -> None:
    folder = board()
    told = CliRunner().invoke(app, ["calibrate", "--model", str(folder)])
    assert told.exit_code == 0
    assert "strategy      prefix, written to" in told.stdout
    assert "RKLLM 1.3.0 (ABI 1.3.0)" in told.stdout
    assert "pictures      each is where it belongs" in told.stdout
    assert "[10/10] is every picture found again" in told.stderr
    as_json = CliRunner().invoke(app, ["calibrate", "--model", str(folder), "--json"])
    values = json.loads(as_json.stdout)
    assert (values["strategy"], values["safe_rows"]) == ("prefix", None)
    assert values["encode_s_per_slice"] > 0
    refused = CliRunner().invoke(app, ["calibrate", "--model", "demo"])
    assert refused.exit_code == 1


@pytest.mark.parametrize("longest", [40, 2015, 4063, 8159])
def test_the_ladders_rungs(longest: int) -> None:
    rungs = probe_ladder.rungs(longest)
    assert rungs == sorted(set(rungs))
    assert rungs[-1] == longest
    near = [n for n in (64, 96, 128, 192, 256, 384, 512, 640, 1024) if n < longest]
    assert {n + d for n in near for d in (-1, 0, 1)} <= set(rungs)
    assert sum(rungs) < 45_000  # rows: 10 minutes at 75 rows/s, as published


@dataclass
class Capped:
    """A client whose library segfaults above 512 rows, calibrated.  chunks: longer prompts are fed in parts."""

    client: LlmClient
    chunks: bool
    images: list[ImageRows]


@pytest.fixture(scope="module", params=[("1.2.1-1.2.3", "prefix"), ("1.3.0", "append")], ids=lambda case: case[1])
def capped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capped]:
    family, rule = request.param
    library(family)  # skips where there is no compiler
    folder = write_board_folder(tmp_path_factory.mktemp("capped"), family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RKLLM_STANDIN_KV", rule)
        patch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "512")
        patch.setenv("RKLLM_STANDIN_SEGFAULT_CONTEXT", "1")
        profile = run(folder).profile
        assert (profile.strategy, profile.safe_rows) == (rule, 512)
        spec, store = open_model(folder), Store(tmp_path_factory.mktemp("capped store"))
        rng = np.random.default_rng(0)
        images = []
        for i, n_rows in enumerate((16, 16, 40, 70)):  # two of a size
            images.append(ImageRows(f"{i:064x}", n_rows))
            store.put(images[-1].key, rng.standard_normal((n_rows, spec.llm.hidden_size)).astype(np.float32))
        client = LlmClient(spec, store, context_rows=spec.context_rows, rkllm=Rkllm(folder / LIBRARY, profile))
        yield Capped(client, profile.chunks, images)
        client.worker.close()


# A turn: rows of text, which text, pictures; and pieces that are taken off the conversation before it.
TURN = st.tuples(st.integers(1, 260), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 4))


@pytest.mark.timeout(3600)  # the deep profile's 5,000 examples
@given(turns=st.lists(TURN, min_size=1, max_size=5), n_new=st.integers(1, 12))
def test_no_conversation_kills_a_calibrated_worker(
    capped: Capped, turns: list[tuple[int, int, list[int], int]], n_new: int
) -> None:
    """Prompts of any length, pictures anywhere, edited anywhere: answered or refused; the worker lives on."""
    client = capped.client
    client.worker.ready()
    pid, pieces = client.worker.pid, list[Piece]()
    limit = client.context_rows - n_new if capped.chunks else 512
    for n_rows, seed, pictures, cut in turns:
        pieces = pieces[: len(pieces) - cut]
        pieces += [capped.images[i] for i in pictures]
        pieces.append(Tokens(tuple((seed * 7 + i) % 250 for i in range(n_rows))))
        n_prompt = sum(piece.n_rows for piece in pieces)
        try:
            done = list(client.generate(pieces, Sampling(max_new_tokens=n_new), never))[-1]
        except ContextFull:
            assert n_prompt > limit
            pieces = []
            continue
        assert n_prompt <= limit
        assert isinstance(done, Done)
        assert done.n_reused + done.n_prefilled == n_prompt
        if done.ids:
            pieces.append(Tokens(done.ids))
    assert client.worker.pid == pid
