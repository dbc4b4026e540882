"""Conversations on board folders, through mmchat.open: the answers are OpenVINO's, whatever the library is or does.

The library is the stand-in (tests/rkllm_standin): no board was at hand.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmchat
from mmchat import llm_proc
from mmchat.errors import ContextFull, EngineBusy, EngineError, ModelDirError, WorkerDied, WorkerTimeout
from mmchat.llm_proc import Rkllm
from mmchat.model_dir import open_model
from mmchat.profile import Profile
from mmchat.runtime import Runtime
from mmchat.store import Store
from mmchat.worker import Exclusive
from tests.conversation import GREEDY, picture, talk
from tests.fakes import eventually, is_gone
from tests.rkllm_standin.__main__ import LIBRARY, LLM, write_board_folder
from tests.rkllm_standin.build import library


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> its board folder, written once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            library(family)  # skips where there is no compiler
            made[family] = write_board_folder(tmp_path_factory.mktemp("board"), family)
        return made[family]

    return folder


@pytest.fixture
def board(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of its own for a test, with links to the large files."""

    def copy(family: str = "1.3.0") -> Path:
        target = tmp_path / f"board {family}"
        target.mkdir()
        for path in folders(family).iterdir():
            if path.name == "profile.json":
                continue
            if path.suffix == ".json":
                shutil.copy(path, target)
            else:
                os.link(path, target / path.name)
        return target

    return copy


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: what OpenVINO's conversation encoded is there for the boards', for their encoder is the same."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def open_board(board: Callable[[str], Path], store: Path) -> Iterator[Callable[..., Runtime]]:
    opened: list[Runtime] = []

    def open_(family: str = "1.3.0", folder: Path | None = None, **profile: Any) -> Runtime:
        folder = folder or board(family)
        if profile:
            Profile.open(open_model(folder), folder / LIBRARY).update(**profile)
        opened.append(mmchat.open(folder, store=store, n_threads=1))
        return opened[-1]

    yield open_
    pids = [runtime.llm.worker.pid for runtime in opened]
    for runtime in opened:
        runtime.close()
    for pid in filter(None, pids):
        eventually(lambda pid=pid: is_gone(pid))  # type: ignore[misc]


@pytest.fixture(scope="module")
def wanted(store: Path) -> tuple[list[tuple[int, ...]], int]:
    """OpenVINO's answers, and the rows that are new over the conversation."""
    with mmchat.open("demo", store=store, n_threads=1) as runtime:
        answers, _, n_new = talk(runtime)
    return answers, n_new


@pytest.mark.parametrize(
    ("family", "strategy", "rule"),
    [
        ("1.1", "resend", "none"),
        ("1.2.0", "resend", "broken-append"),
        ("1.2.1b1", "resend", "append"),
        ("1.2.1-1.2.3", "append", "append"),
        ("1.3.0", "prefix", "prefix"),
        ("1.3.0", "resend", "stale-prefix"),
    ],
)
def test_a_conversation_is_openvinos_in_every_family(
    family: str, strategy: str, rule: str, open_board: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with append and prefix only what is new is prefilled."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", rule)
    answers, n_prefilled, n_new = talk(open_board(family, strategy=strategy))
    print(f"{family:12} {strategy:7} {n_prefilled:5} rows prefilled, {n_new} new: {n_prefilled / n_new:.2f}")
    assert (answers, n_new) == wanted
    assert (n_prefilled == n_new) == (strategy != "resend")


# Faults: (switches, what the first question gives); after each the library is well again, and so is the session.
FAULTS: dict[str, tuple[dict[str, str], Any]] = {
    "crashes within the answer": ({"CRASH": "1", "CRASH_TOKENS": "2"}, "right, 1 restart"),
    "crashes on a short run": ({"CRASH": "1"}, "right, 1 restart"),
    "crashes always": ({"CRASH": "1+"}, (WorkerDied, "SIGSEGV")),
    "hangs once": ({"HANG": "1"}, "right, 1 restart"),
    "hangs always": ({"HANG": "1+"}, (WorkerTimeout, "silent for")),
    "fails a run": ({"ERROR": "1", "ERROR_TOKENS": "1"}, (EngineError, "rkllm_run failed")),
    "does not load": ({"INIT": "fail"}, (EngineError, "rkllm_init returned -1")),
    "loads without a handle": ({"INIT": "null"}, (EngineError, "rkllm_init returned 0 and no handle")),
    "has no default parameters": ({"PROBE": "zero"}, "right"),
    "crashes when asked for them": ({"PROBE": "crash"}, (WorkerDied, "SIGSEGV")),
    "crashes beside librknnrt": ({"SEGFAULT_RKNN": "1"}, "right"),
    "loses memory": ({"LEAK_MB": "2"}, "right"),
}
QUESTION = "What colour is the circle?"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_in_a_right_answer_or_one_clear_error(
    fault: str, open_board: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    switches, expected = FAULTS[fault]
    if "HANG" in switches:
        monkeypatch.setattr(llm_proc, "SILENCE_S", 1.5)
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    with monkeypatch.context() as patch:
        for name, value in switches.items():
            patch.setenv(f"RKLLM_STANDIN_{name}", value)
        runtime = open_board()
        session = runtime.session()
        try:
            reply = session.ask(QUESTION, picture(0), **GREEDY)
            assert reply.text
            restarts = reply.usage.restarts
            saw: Any = f"right, {restarts} restart" if restarts else "right"
            assert session.turns[-1].ids == wanted[0][0]
        except EngineError as error:
            saw = error
            assert not session.turns
    print(f"{fault:30} {saw if isinstance(saw, str) else f'{type(saw).__name__}: {saw}'}")
    if isinstance(expected, str):
        assert saw == expected
    else:
        assert type(saw) is expected[0]
        assert expected[1] in str(saw)
        runtime.llm.worker.kill()  # what runs still has the switches
        assert session.ask(QUESTION, picture(0), **GREEDY).text
        assert session.turns[-1].ids == wanted[0][0]
    assert Profile.open(runtime.spec, runtime.spec.folder / LIBRARY).safe_rows is None


def test_a_crash_for_its_length_costs_one_restart_and_is_refused_from_then_on(
    open_board: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "150")
    runtime = open_board()
    session = runtime.session(policy="error")
    session.ask("Short.", **GREEDY).text  # noqa: B018
    long = "What colour is it, 1 2 3 4 5 6 7 8 9? " * 10
    with caplog.at_level(logging.WARNING), pytest.raises(ContextFull) as caught:
        session.ask(long, **GREEDY).text  # noqa: B018
    n_rows = caught.value.n_prompt
    assert caught.value.limit == n_rows - 1
    assert "refused from now on" in caplog.text
    assert len(session.turns) == 1
    profile = Profile.open(runtime.spec, runtime.spec.folder / LIBRARY)
    assert (profile.safe_rows, profile.crashed_rows) == (n_rows - 1, [n_rows])
    assert 0 < profile.worked_rows <= 150
    runtime.llm.worker.ready()
    pid = runtime.llm.worker.pid
    with pytest.raises(ContextFull):
        session.ask(long, **GREEDY).text  # noqa: B018
    assert session.ask("Short.", **GREEDY).text
    assert runtime.llm.worker.pid == pid  # refused before the library saw it


def test_a_killed_worker_is_replaced_and_teaches_nothing(
    open_board: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_DECODE_MS", "100")
    runtime = open_board()
    session = runtime.session()
    reply = session.ask(QUESTION, picture(0), **GREEDY)
    pid = 0
    for _ in reply:
        if not pid:
            pid = runtime.llm.worker.pid
            os.kill(pid, signal.SIGKILL)
    assert reply.usage.restarts == 1
    assert session.turns[-1].ids == wanted[0][0]
    assert Profile.open(runtime.spec, runtime.spec.folder / LIBRARY).safe_rows is None


def test_an_old_library_is_loaded_again_for_other_sampling(open_board: Any, caplog: Any) -> None:
    runtime = open_board("1.1")
    session = runtime.session()
    assert session.ask(QUESTION, picture(0), **GREEDY).text
    pid = runtime.llm.worker.pid
    with caplog.at_level(logging.WARNING):
        assert session.ask(QUESTION, temperature=0.5, top_k=3, max_new_tokens=8).text is not None
    assert "RKLLM 1.1 sets temperature, top_k only when the model is loaded" in caplog.text
    assert runtime.llm.worker.pid != pid
    pid = runtime.llm.worker.pid
    assert session.ask(QUESTION, temperature=0.5, top_k=3, max_new_tokens=8).text is not None
    assert runtime.llm.worker.pid == pid


def test_what_the_library_writes_goes_to_a_log_file_and_never_into_the_parent(open_board: Any) -> None:
    runtime = open_board("1.2.0")
    assert runtime.session().ask(QUESTION, picture(0), **GREEDY).text
    log = Path(os.environ["XDG_STATE_HOME"]) / "mmchat" / "rkllm.log"
    eventually(lambda: "I rkllm: prefill" in log.read_text())  # RKLLM_LOG_LEVEL 1
    assert "rkllm-runtime version: 1.2.0" in log.read_text()
    assert "family 1.2.0: all that was found agrees" in log.read_text()
    maps = Path("/proc/self/maps").read_text()
    assert str(runtime.spec.folder) not in maps
    assert str(runtime.spec.folder / LIBRARY) in Path(f"/proc/{runtime.llm.worker.pid}/maps").read_text()


def test_encoder_and_llm_take_turns_on_one_npu(folders: Callable[[str], Path], store: Path) -> None:
    folder, npu = folders("1.3.0"), Exclusive("the NPU is busy")
    spec = open_model(folder)
    rkllm = Rkllm(folder / LIBRARY, Profile.open(spec, folder / LIBRARY), npu=npu)
    with Runtime(spec, Store(store), context_rows=spec.context_rows, n_threads=1, rkllm=rkllm) as runtime:
        session, unseen = runtime.session(), Image.new("RGB", (50, 60), "red")
        with npu.held():  # as the other worker does in this very thread
            with pytest.raises(EngineBusy, match="the NPU is busy"):
                session.ask("Hello.").text  # noqa: B018
            with pytest.raises(EngineBusy, match="the NPU is busy"):
                session.ask("Hello.", unseen).text  # noqa: B018
        assert session.ask("Hello.", **GREEDY).text


def break_json(folder: Path, **values: Any) -> None:
    path = folder / "mmchat.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_work_is_refused_before_the_library_is_initialised(
    board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setenv("RKLLM_STANDIN_TRACE", str(trace))
    folder = board()

    def refused(message: str, **options: Any) -> None:
        with (
            pytest.raises((ModelDirError, EngineError), match=message),
            mmchat.open(folder, store=tmp_path / "store", **options) as runtime,
        ):
            runtime.llm.worker.ready()

    refused("context_rows is 4000; demo \\(stand-in\\) has 2016", context_rows=4000)
    refused("no weights for OpenVINO", engine="openvino")
    monkeypatch.setenv("MMCHAT_RKLLM_FAMILY", "9")
    refused("RKLLM family '9' is not known")
    monkeypatch.delenv("MMCHAT_RKLLM_FAMILY")
    monkeypatch.setenv("MMCHAT_RKLLM_LIB", str(tmp_path / "none.so"))
    refused("no RKLLM library: .*none.so is not there")
    cut = tmp_path / "cut.so"
    cut.write_bytes((folder / LIBRARY).read_bytes()[:5000])
    monkeypatch.setenv("MMCHAT_RKLLM_LIB", str(cut))
    refused("truncated or damaged")
    monkeypatch.setenv("MMCHAT_RKLLM_LIB", str(library("1.1")))
    monkeypatch.setenv("MMCHAT_RKLLM_FAMILY", "1.3.0")
    refused("cannot be RKLLM 1.3.0, for it lacks")
    monkeypatch.delenv("MMCHAT_RKLLM_FAMILY")
    monkeypatch.delenv("MMCHAT_RKLLM_LIB")
    break_json(folder, stop_ids=[1, 2])
    refused("answers end with .* in mmchat.json")
    (folder / LLM).unlink()
    refused(f"lacks {LLM}")
    assert not trace.exists()
    with pytest.raises(ModelDirError, match=r"no mmchat\.json"):
        mmchat.open("demo", engine="rkllm")
