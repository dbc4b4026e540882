"""Conversations on board folders, through mmchat.open: the answers are OpenVINO's, whatever the library is or does.

The library is the stand-in (tests/rkllm_standin): no board was at hand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmchat
from mmchat.errors import ContextFull, EngineBusy, WorkerDied
from mmchat.llm_proc import Rkllm
from mmchat.model_dir import open_model
from mmchat.profile import Profile
from mmchat.runtime import Runtime
from mmchat.store import Store
from mmchat.worker import Exclusive
from tests.conversation import GREEDY, picture
from tests.fakes import eventually
from tests.rkllm_standin.__main__ import LIBRARY

QUESTION = "What colour is the circle?"
LONG = "What colour is it, 1 2 3 4 5 6 7 8 9? " * 10


def learned(runtime: Runtime) -> tuple[int | None, list[int]]:
    profile = Profile.open(runtime.spec, runtime.spec.folder / LIBRARY)
    return profile.safe_rows, profile.crashed_rows


def n_inits(count: Path) -> int:
    return int.from_bytes(count.read_bytes()[:8], "little")


def test_a_length_that_crashes_is_tried_once_more_and_refused_from_then_on(
    open_board: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "150")
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    runtime = open_board()
    session = runtime.session(policy="error")
    session.ask("Short.", **GREEDY).text  # noqa: B018
    assert runtime.llm.prompt_rows == runtime.context_rows
    with caplog.at_level(logging.WARNING), pytest.raises(ContextFull) as caught:
        session.ask(LONG, **GREEDY).text  # noqa: B018
    n_rows = caught.value.n_prompt
    assert caught.value.limit == runtime.llm.prompt_rows == n_rows - 1
    assert f"crashed twice on a run of {n_rows} rows, more than ever worked" in caplog.text
    assert n_inits(tmp_path / "count") == 3
    assert len(session.turns) == 1
    assert learned(runtime) == (n_rows - 1, [n_rows])
    pid = runtime.llm.worker.pid
    assert pid is not None
    with pytest.raises(ContextFull):
        session.ask(LONG, **GREEDY).text  # noqa: B018
    assert session.ask("Short.", **GREEDY).text
    assert runtime.llm.worker.pid == pid  # refused before the library saw it


def test_with_append_the_answer_comes_all_the_same(open_board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that crashed twice is fed in parts, and so are longer ones."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    session = open_board(strategy="append", chunks=True).session()
    wanted = [session.ask(LONG, **GREEDY).text, session.ask(LONG + LONG, **GREEDY).text]
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "150")
    runtime = open_board(folder=session._spec.folder, worked_rows=0)
    session = runtime.session()
    first = session.ask(LONG, **GREEDY)
    assert [first.text, session.ask(LONG + LONG, **GREEDY).text] == wanted
    assert first.usage.restarts == 2
    assert first.usage.n_prefilled == first.usage.n_prompt
    assert learned(runtime) == (64, [first.usage.n_prompt])
    assert runtime.llm.prompt_rows == runtime.context_rows


def test_a_run_that_was_cancelled_before_anything_came_has_not_worked(
    open_board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_board()
    session = runtime.session()
    assert session.ask("Short.", **GREEDY).text
    worked = Profile.open(runtime.spec, runtime.spec.folder / LIBRARY).worked_rows
    ended = {"reason": "cancelled", "text": "", "ids": [], "n_prompt": 900, "n_reused": 0, "n_prefilled": 0, "n_new": 0}
    events = [
        {"kind": "prefill", "done": 0, "total": 900},
        {"kind": "done", **ended, "prefill_s": 0.0, "generate_s": 0.0},
    ]
    monkeypatch.setattr(runtime.llm.worker, "call", lambda *given, **options: iter(events))
    assert session.ask(LONG, **GREEDY).stop_reason == "cancelled"
    assert Profile.open(runtime.spec, runtime.spec.folder / LIBRARY).worked_rows == worked


@pytest.mark.parametrize(
    ("crashes", "restarts"), [("2", 1), ("2+", None)], ids=["one crash", "every run crashes from then on"]
)
def test_crashes_that_are_not_for_the_length_teach_nothing(
    crashes: str, restarts: int | None, open_board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though they hit a run that is longer than any before."""
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("RKLLM_STANDIN_CRASH", crashes)
    runtime = open_board()
    session = runtime.session()
    session.ask("Short.", **GREEDY).text  # noqa: B018
    reply = session.ask(LONG, **GREEDY)
    if restarts:
        assert reply.text
        assert reply.usage.restarts == restarts
        assert Profile.open(runtime.spec, runtime.spec.folder / LIBRARY).worked_rows == reply.usage.n_prompt
    else:
        with pytest.raises(WorkerDied, match="SIGSEGV"):
            reply.text  # noqa: B018
        monkeypatch.delenv("RKLLM_STANDIN_CRASH")
        runtime.llm.worker.kill()  # what runs still has the switch
        assert session.ask(LONG, **GREEDY).text
    assert learned(runtime) == (None, [])


def test_a_crash_on_few_new_rows_does_not_hide_that_the_whole_crashes(
    open_board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With append the worker that follows is sent everything: a length of its own, which is tried twice as well."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("RKLLM_STANDIN_CRASH", "4")
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "150")
    runtime = open_board(strategy="append")
    session = runtime.session()
    for question in ("What colour is it, 1 2 3 4 5 6 7 8 9? " * 3, "And this? " * 6, "And that? " * 6):
        assert session.ask(question, **GREEDY).text
    assert session.turns[-1].usage.n_prompt > 150
    n_whole = session.plan("Thank you.", **GREEDY).rows
    reply = session.ask("Thank you.", **GREEDY)
    assert reply.text
    assert learned(runtime) == (n_whole - 1, [n_whole])
    assert "turn 1" in {change.what for change in reply.degraded}
    assert session.ask("And now?", **GREEDY).text


def test_a_chat_that_grew_longer_than_what_the_library_computes_at_once_goes_on(
    open_board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With append, rows are added; after whatever empties the cache the prompt is cut to what may be sent whole."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "150")
    runtime = open_board(strategy="append", safe_rows=150)
    session = runtime.session()
    for question in ("What colour is it, 1 2 3 4 5 6 7 8 9? " * 3, "And this? " * 6, "And that? " * 6):
        assert session.ask(question, **GREEDY).text
    assert session.turns[-1].usage.n_prompt > 150
    runtime.llm.worker.kill()
    reply = session.ask("Thank you.", **GREEDY)
    assert reply.text
    assert reply.degraded
    assert reply.usage.n_prompt <= 150
    assert session.ask("And now?", **GREEDY).usage.n_reused


def test_a_killed_worker_is_replaced_and_teaches_nothing(
    open_board: Any, openvino_talk: Any, monkeypatch: pytest.MonkeyPatch
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
    assert session.turns[-1].ids == openvino_talk[0][0]
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


def test_what_the_library_writes_goes_to_a_log_file(open_board: Any) -> None:
    runtime = open_board("1.2.0")
    assert runtime.session().ask(QUESTION, picture(0), **GREEDY).text
    log = Path(os.environ["XDG_STATE_HOME"]) / "mmchat" / "rkllm.log"
    eventually(lambda: "I rkllm: prefill" in log.read_text())  # RKLLM_LOG_LEVEL 1
    assert "rkllm-runtime version: 1.2.0" in log.read_text()
    assert "family 1.2.0: all that was found agrees" in log.read_text()


_PARENT = """
import sys, re
from pathlib import Path
import mmchat
def loaded(pid):
    return sorted(set(re.findall(r"librk[a-z]*rt[^ /]*[.]so", Path(f"/proc/{pid}/maps").read_text())))
if __name__ == "__main__":
    from PIL import Image
    with mmchat.open(sys.argv[1], store=sys.argv[2], n_threads=1) as runtime:
        session = runtime.session()
        for text in session.ask("What colour is it?", Image.new("RGB", (61, 62), "red"), temperature=0):
            print(*loaded("self"), "|", *loaded(runtime.llm.worker.pid), "|", *loaded(runtime.vision.worker.pid))
        print(*loaded("self"), "|")
"""


def test_the_parent_never_loads_the_vendors_library(board: Any, tmp_path: Path) -> None:
    """Nor does the encoder's worker load the LLM's; looked at while all of them live and answer."""
    program = tmp_path / "parent.py"
    program.write_text(_PARENT)
    command = [sys.executable, str(program), str(board()), str(tmp_path / "store")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=here()).stdout.splitlines()
    assert len(lines) > 1
    assert {line.replace(" ", "") for line in lines[:-1]} == {"|librkllmrt.so|"}
    assert lines[-1].strip() == "|"


def here() -> dict[str, str]:
    """The environment, with this checkout first for the programs that a test starts."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(mmchat.__file__).parents[1]), *sys.path])}


def test_threads_may_ask_with_sampling_of_their_own(board: Any, board_store: Path) -> None:
    """This library takes it only while it loads; a thread's request must find what was loaded for it."""
    folder = board("1.2.1-1.2.3")
    spec = open_model(folder)
    rkllm = Rkllm(folder / LIBRARY, Profile.open(spec, folder / LIBRARY))
    with (
        Runtime(spec, Store(board_store), context_rows=spec.context_rows, n_threads=1, rkllm=rkllm) as runtime,
        ThreadPoolExecutor(3) as threads,
    ):

        def ask(temperature: float) -> str:
            session = runtime.session(sampling={"temperature": temperature, "max_new_tokens": 2, "seed": 1})
            return [session.ask("Hello.").stop_reason for _ in range(2)][-1]

        assert list(threads.map(ask, (0.5, 0.9, 1.3))) == ["length"] * 3


def test_encoder_and_llm_take_turns_on_one_npu(board: Any, board_store: Path) -> None:
    folder, npu = board(), Exclusive("the NPU is busy")
    spec = open_model(folder)
    rkllm = Rkllm(folder / LIBRARY, Profile.open(spec, folder / LIBRARY), npu=npu)
    with Runtime(spec, Store(board_store), context_rows=spec.context_rows, n_threads=1, rkllm=rkllm) as runtime:
        session, unseen = runtime.session(), Image.new("RGB", (50, 60), "red")
        with npu.held():  # as the other worker does in this very thread
            with pytest.raises(EngineBusy, match="the NPU is busy"):
                session.ask("Hello.").text  # noqa: B018
            with pytest.raises(EngineBusy, match="the NPU is busy"):
                session.ask("Hello.", unseen).text  # noqa: B018
        assert session.ask("Hello.", **GREEDY).text
        with held_elsewhere(npu):
            for images in ([], [unseen]):
                reply = session.ask("Hello.", images, **GREEDY)
                threading.Timer(0.2, reply.cancel).start()
                assert (reply.text, reply.stop_reason) == ("", "cancelled")
        assert len(session.turns) == 1


@contextlib.contextmanager
def held_elsewhere(npu: Exclusive) -> Iterator[None]:
    """By another thread, as a session does whose answer is being streamed."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with npu.held():
            taken.set()
            over.wait(100)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(100)
    try:
        yield
    finally:
        over.set()
        thread.join()
