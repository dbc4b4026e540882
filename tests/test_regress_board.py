"""mmchat regress on the stand-in library: what it finds, how small, and that a healthy library passes.

The library is the stand-in (tests/rkllm_standin): no board was at hand.  Under the deep profile every fault is looked
for, for two minutes, and each healthy family tried for ten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import settings

from mmchat.model_dir import open_model
from mmchat.profile import Profile
from mmchat.regress import Step, Talk, hunt, talk
from mmchat.rkllm_abi import FAMILIES
from tests.rkllm_standin.__main__ import LIBRARY
from tests.test_cli import refused, run_here

IS_DEEP = settings().max_examples > 1000
ROOT = Path(__file__).resolve().parents[1]
OLD = "1.2.1-1.2.3"
APPEND, PREFIX = {"strategy": "append"}, {"strategy": "prefix", "rewinds": True}


@dataclass(frozen=True)
class Fault:
    """switches: of the stand-in.  profile: what calibration is taken to have found.  names: properties that break.

    n_turns: that it takes at most.
    """

    switches: dict[str, str]
    names: tuple[str, ...]
    family: str = "1.3.0"
    profile: dict[str, Any] = field(default_factory=dict)
    is_quick: bool = False
    n_turns: int = 2


FAULTS = {
    "crashes at once": Fault({"CRASH": "1"}, ("crash",)),
    "crashes on the third run": Fault({"CRASH": "3"}, ("crash",)),
    "crashes within answers": Fault({"CRASH": "2+", "CRASH_TOKENS": "2"}, ("crash",)),
    "crashes above 150 rows": Fault({"SEGFAULT_ROWS": "150"}, ("crash",)),
    "crashes above 700 rows": Fault({"SEGFAULT_ROWS": "700"}, ("crash",)),
    "hangs at once": Fault({"HANG": "1"}, ("crash",)),
    "hangs on the third run": Fault({"HANG": "3"}, ("crash",)),
    "fails a run": Fault({"ERROR": "1"}, ("crash",)),
    "fails within answers": Fault({"ERROR": "2+", "ERROR_TOKENS": "1"}, ("crash",)),
    "pictures of equal size are one": Fault({"KV": "stale-prefix"}, ("counts", "strategies"), profile=PREFIX),
    "pictures of equal size are one, 1.2": Fault({"KV": "stale-prefix"}, ("counts", "strategies"), OLD, PREFIX),
    "does not see what it keeps": Fault({"KV": "broken-append"}, ("strategies",), profile=APPEND),
    "keeps nothing": Fault({"KV": "none"}, ("strategies",), profile=APPEND),
    "compares instead of appending": Fault({"KV": "prefix"}, ("strategies",), profile=APPEND),
    "counts its cache wrong": Fault({"KV": "append", "KV_COUNT": "7"}, ("strategies",), profile=APPEND, is_quick=True),
    "counts its cache wrong, 1.2": Fault({"KV": "append", "KV_COUNT": "-2"}, ("strategies",), OLD, APPEND),
    "counts its cache wrong, prefix": Fault(
        {"KV_COUNT": "7"},
        ("strategies",),
        profile=PREFIX,
        is_quick=True,
        n_turns=4,  # three that do not add up
    ),
    "counts too few rows": Fault({"PREFILL_COUNT": "-5"}, ("counts", "strategies"), profile=PREFIX),
    "does not load": Fault({"INIT": "fail"}, ("crash",), is_quick=True),
    "loads nothing": Fault({"INIT": "null"}, ("crash",)),
    "crashes while it loads": Fault({"PROBE": "crash"}, ("crash",)),
    "hangs while it loads": Fault({"PROBE": "hang"}, ("crash",)),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if IS_DEEP or fault.is_quick])
def test_a_fault_is_found_and_made_small(
    name: str, open_board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tabulate: Any
) -> None:
    fault = FAULTS[name]
    for switch, value in fault.switches.items():
        monkeypatch.setenv(f"RKLLM_STANDIN_{switch}", value)
    runtime = open_board(fault.family, **fault.profile)
    found = hunt.hunt(runtime, minutes=2, seed=1, database=tmp_path)
    assert found.failure is not None
    assert found.failure.name in fault.names
    (small,) = found.failure.talks
    assert 1 <= small.n_turns <= fault.n_turns
    tabulate(
        "mmchat regress: faults of the library",
        fault=name,
        property=found.failure.name,
        turns=small.n_turns,
        conversations=found.n_talks,
        seconds=found.seconds,
    )
    assert hunt.replay(runtime, (small,)).failure is not None


# What breaks no property, and why.  SEED, COUNT and TRACE are no faults.
HARMLESS = {
    "the end token is kept": Fault({"KV": "append", "EOS_IN_KV": "1"}, (), OLD, APPEND),  # the engine counts it
    "the end token is missed": Fault({"NO_EOS": "1"}, (), profile=PREFIX),  # the engine ends the answer itself
    "it is missed, 1.2": Fault({"KV": "append", "NO_EOS": "1"}, (), OLD, APPEND),
    "aborts late": Fault({"KV": "append", "ABORT_LATE": "3"}, (), OLD, APPEND),  # after an abort all is sent again
    "aborts as if finished": Fault({"KV": "append", "ABORT_STATE": "finish"}, (), OLD, APPEND),
    "aborts with an error": Fault({"KV": "append", "ABORT_STATE": "error"}, (), OLD, APPEND),
    "its own tokens never match": Fault({"GENERATED_MATCH": "0"}, (), profile=PREFIX),  # less is reused
    "all counts as prefilled": Fault({"PREFILL_COUNT": "all"}, (), profile=PREFIX),  # as if nothing were reused
    "too much counts as prefilled": Fault({"PREFILL_COUNT": "5"}, (), profile=PREFIX),
    "characters in parts": Fault({"UTF8": "split"}, (), profile=PREFIX),  # joined again; and the demo model writes none
    "segfaults beyond the context": Fault({"SEGFAULT_CONTEXT": "1"}, ()),  # the cap is below
    "loses 2 MB per run": Fault({"LEAK_MB": "2"}, ()),  # calibrate measures that
    "segfaults beside librknnrt": Fault({"SEGFAULT_RKNN": "1"}, ()),  # the encoder is in another process
    "cannot load twice": Fault({"SECOND_INIT": "segfault"}, ()),  # a process loads once
    "cannot load twice, and says so": Fault({"SECOND_INIT": "fail"}, ()),
    "no default parameters": Fault({"PROBE": "zero"}, ()),  # other witnesses tell the ABI
    "is slow": Fault({"PREFILL_MS": "5", "DECODE_MS": "50"}, ()),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", HARMLESS if IS_DEEP else ["aborts late"])
def test_what_breaks_nothing_passes(
    name: str, open_board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fault = HARMLESS[name]
    for switch, value in fault.switches.items():
        monkeypatch.setenv(f"RKLLM_STANDIN_{switch}", value)
    found = hunt.hunt(
        open_board(fault.family, **fault.profile), minutes=2 if IS_DEEP else 0.05, seed=1, database=tmp_path
    )
    assert found.good, found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES if IS_DEEP else ["1.3.0"])
def test_a_healthy_library_passes(family: str, open_board: Any, tmp_path: Path, tabulate: Any) -> None:
    profile = PREFIX if family in (OLD, "1.3.0") else {}
    found = hunt.hunt(open_board(family, **profile), minutes=10 if IS_DEEP else 0.05, database=tmp_path)
    assert found.good, found
    tabulate(
        "mmchat regress: healthy libraries",
        family=family,
        strategy=found.facts["strategy"],
        conversations=found.n_talks,
        answers=found.n_requests,
        longest=found.longest,
        seconds=found.seconds,
        seed=found.seed,
    )


def test_the_command_finds_a_length_and_teaches_it(board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way: report, JUnit, file, profile, exit codes, and the file played again."""
    folder = board()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "100")
    options = ("--threads", "1", "--context", "300")
    code, out, err = run_here(
        "regress", "--model", folder, *options, "--minutes", "2", "--report", "r.json", "--junit", "r.xml"
    )  # fmt: skip
    assert code == 1, err
    assert "FAILED      no run crashes, hangs or fails; but" in out
    assert "a prompt of 101 rows: the LLM worker died (killed by signal 11 SIGSEGV)" in out
    assert "making it smaller" in err
    assert talk.load("mmchat-regress.json") == (Talk((Step(rows=101, max_new_tokens=1),)),)
    told = json.loads(Path("r.json").read_text())
    assert (told["failure"]["property"], told["failure"]["rows"], told["replay"]) == (
        "crash",
        101,
        "mmchat-regress.json",
    )
    (suite,) = ElementTree.parse("r.xml").getroot()
    assert suite.get("failures") == "1"
    profile = Profile.open(open_model(folder), folder / LIBRARY)
    assert (profile.safe_rows, profile.crashed_rows) == (100, [101])
    (crash,) = profile.probes["regress"]["crashes"]
    assert (crash["rows"], crash["library_sha256"]) == (101, told["library_sha256"])

    again = ("regress", "--model", folder, *options, "--replay", "mmchat-regress.json", "--json")
    code, out, _ = run_here(*again)
    assert (code, json.loads(out)["failure"]["rows"]) == (1, 101)
    assert Profile.open(open_model(folder), folder / LIBRARY).safe_rows == 100
    monkeypatch.delenv("RKLLM_STANDIN_SEGFAULT_ROWS")
    code, out, _ = run_here(*again)
    assert (code, json.loads(out)["passed"]) == (0, True)


def test_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert "--minutes is 0; it must be more than 0" in refused("regress", "--minutes", "0", code=2)
    assert "x.json: format is None" in refused("regress", "--replay", tmp_path / "x.json", code=2)
    assert "there is no such folder" in refused("regress", "--report", tmp_path / "no" / "r.json", code=2)
    assert "nowhere: no such model folder" in refused("regress", "--model", tmp_path / "nowhere")


def test_a_library_that_does_not_load_is_told(board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_INIT", "fail")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_here("regress", "--model", board(), "--minutes", "1", "--json")
    assert code == 1
    told = json.loads(out)["failure"]
    assert (told["property"], told["rows"]) == ("crash", None)
    assert "the model does not load (rkllm_init returned -1" in told["what"]
    assert talk.load("mmchat-regress.json") == (Talk((Step(max_new_tokens=1),)),)


def test_the_pytest_plugin_runs_the_example(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "test_my_board.py").read_text()
    assert len(text.splitlines()) < 30
    assert "max_examples=10," in text
    example = tmp_path / "test_my_board.py"
    example.write_text(text.replace("max_examples=10,", "max_examples=3,"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mmchat.regress", "--mmchat-model", "demo", str(example)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-W", "error"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_pytest_plugin_names_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_x(mmchat_runtime): ...\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "mmchat.regress", "--mmchat-model", "nowhere", "-c", os.devnull],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    assert done.returncode == 1
    assert "nowhere" in done.stdout
