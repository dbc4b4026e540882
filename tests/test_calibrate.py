"""Calibration finds what the stand-in library does, chooses the strategy for it, and the next chat keeps to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mmchat
from mmchat import calibrate as module
from mmchat.calibrate import Report, calibrate
from mmchat.cli import app
from mmchat.engine import Done, Piece, Sampling, Tokens
from mmchat.errors import ContextFull
from mmchat.llm_proc import LlmClient, Rkllm
from mmchat.model_dir import open_model
from mmchat.profile import Profile
from mmchat.store import Store
from tests.conversation import talk
from tests.fakes import never
from tests.rkllm_standin.__main__ import LIBRARY, write_board_folder
from tests.rkllm_standin.build import library


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in made:
            library(family)  # skips where there is no compiler
            made[family] = write_board_folder(tmp_path_factory.mktemp("board"), family)
        return made[family]

    return write


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def board(written: Callable[[str], Path]) -> Callable[[str], Path]:
    """family -> its folder, without a profile."""

    def fresh(family: str = "1.3.0") -> Path:
        folder = written(family)
        (folder / "profile.json").unlink(missing_ok=True)
        return folder

    return fresh


def run(folder: Path, **options: Any) -> Report:
    return calibrate(open_model(folder), folder / LIBRARY, **options)


@pytest.fixture
def short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rungs", lambda longest: [64, 129])
    monkeypatch.setattr(module, "_TRIALS", 2)
    monkeypatch.setattr(module, "_MEMORY_RUNS", 2)


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
    found = (report.strategy, report.rewinds, report.probes["append"].get("end_in_kv"))
    why = report.probes["append"].get("why") or report.probes["prefix"].get("why") or ""
    print(f"{family:12} {json.dumps(switches):46} {found[0]:7} rewinds {found[1]!s:5} end kept {found[2]!s:5} {why}")
    assert found == expected
    assert report.safe_rows is None
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    assert (profile.strategy, profile.rewinds, profile.end_in_kv) == expected
    assert report.probes["repeats"]["good"]
    assert report.probes["files"]["good"]
    assert report.probes["abort"]["usable"]


@pytest.mark.parametrize(("family", "rule"), [("1.1", "none"), ("1.2.1-1.2.3", "append"), ("1.3.0", "stale-prefix")])
@pytest.mark.usefixtures("short_ladder")
def test_the_next_chat_prefills_what_is_new(
    family: str, rule: str, board: Any, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_KV", rule)
    folder = board(family)
    strategy = run(folder).strategy
    with mmchat.open(folder, store=store, n_threads=1) as runtime:
        _, n_prefilled, n_new = talk(runtime)
    print(f"{family:12} {rule:13} {strategy:7} {n_prefilled:5} rows prefilled, {n_new} new: {n_prefilled / n_new:.2f}")
    assert (n_prefilled == n_new) == (strategy != "resend")


@pytest.mark.usefixtures("short_ladder")
def test_the_ladder_finds_the_length_that_crashes(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "300")
    monkeypatch.setattr(module, "_rungs", lambda longest: [64, 128, 256, 512, longest])
    report = run(board())
    assert report.safe_rows is not None
    assert 300 - 512 // 64 <= report.safe_rows <= 300
    assert min(report.probes["ladder"]["crashed"]) > 300
    assert any("longer runs than" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_it_goes_on_where_it_was(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was under way when the board went down counts as crashed."""
    folder, said = board(), list[str]()

    def interrupt(text: str) -> None:
        said.append(text)
        if text.strip() == "129 rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, say=interrupt)
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    profile.update(probes={**profile.probes, "ladder": {"begun": 1, "worked": [64], "crashed": [], "trying": 129}})
    said.clear()
    report = run(folder, say=said.append)
    assert not any("[4/8]" in text for text in said)
    assert report.probes["ladder"]["crashed"] == [129]
    assert 125 <= (report.safe_rows or 0) < 129
    said.clear()
    run(folder, say=said.append)
    assert said == ["loading the model"]


@pytest.mark.usefixtures("short_ladder")
def test_a_probe_that_crashes_is_a_result(board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("RKLLM_STANDIN_CRASH", "7")  # in the probe of append
    report = run(board())
    assert "SIGSEGV" in report.probes["append"]["crashed"]
    assert report.strategy == "prefix"
    assert any("'append' crashed" in text for text in report.advice)


@pytest.mark.usefixtures("short_ladder")
def test_the_command_prints_a_report_or_json(board: Any) -> None:
    folder = board()
    told = CliRunner().invoke(app, ["calibrate", "--model", str(folder)])
    assert told.exit_code == 0
    assert "strategy      prefix, written to" in told.stdout
    assert "RKLLM 1.3.0 (ABI 1.3.0)" in told.stdout
    as_json = CliRunner().invoke(app, ["calibrate", "--model", str(folder), "--json"])
    assert json.loads(as_json.stdout)["strategy"] == "prefix"
    refused = CliRunner().invoke(app, ["calibrate", "--model", "demo"])
    assert refused.exit_code == 1


@pytest.fixture(scope="module")
def capped(
    written: Callable[[str], Path], store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmClient]:
    """A client whose library segfaults above 512 rows, which calibration has found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "512")
        patch.setenv("RKLLM_STANDIN_SEGFAULT_CONTEXT", "1")
        spec = open_model(written("1.2.1-1.2.3"))
        profile = Profile(tmp_path_factory.mktemp("profile") / "profile.json", "key")
        profile.update(strategy="prefix", rewinds=True, safe_rows=512, worked_rows=512, crashed_rows=[513])
        client = LlmClient(
            spec,
            Store(store),
            context_rows=spec.context_rows,
            rkllm=Rkllm(spec.folder / LIBRARY, profile),
        )
        yield client
        client.worker.close()


TURN = st.tuples(st.integers(1, 260), st.integers(0, 3))


@pytest.mark.timeout(3600)  # the deep profile's 5,000 examples
@given(turns=st.lists(TURN, min_size=1, max_size=4), n_new=st.integers(1, 12), cut=st.integers(0, 3))
def test_no_conversation_kills_a_calibrated_worker(
    capped: LlmClient, turns: list[tuple[int, int]], n_new: int, cut: int
) -> None:
    """Prompts of any length, edited anywhere, are answered or refused; the worker lives on."""
    capped.worker.ready()
    pid, pieces = capped.worker.pid, list[Piece]()
    sampling = Sampling(max_new_tokens=n_new)
    for n_rows, seed in turns:
        pieces = [*pieces[: len(pieces) - cut], Tokens(tuple((seed * 7 + i) % 250 for i in range(n_rows)))]
        n_prompt = sum(piece.n_rows for piece in pieces)
        try:
            done = list(capped.generate(pieces, sampling, never))[-1]
        except ContextFull:
            assert n_prompt > 512
            pieces = []
            continue
        assert n_prompt <= 512
        assert isinstance(done, Done)
        pieces.append(Tokens(done.ids))
    assert capped.worker.pid == pid
