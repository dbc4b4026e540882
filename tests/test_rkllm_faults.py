"""Every fault that the stand-in library can show: what the user sees, what is kept, and that it goes on afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmchat import llm_proc
from mmchat.errors import ContextFull, EngineError, MmchatError, WorkerDied, WorkerTimeout
from mmchat.model_dir import open_model
from mmchat.profile import Profile
from tests.conversation import GREEDY, TURNS, picture
from tests.rkllm_standin.__main__ import LIBRARY

DEADLINE_S = 60.0  # of a question; far above what any of them takes, for the machine may be busy
OLD = "1.2.1-1.2.3"  # ends no run by itself: max_new_tokens is an abort


@dataclass(frozen=True)
class Fault:
    """switches: of the stand-in, on while one question is asked.  seen: "right", or an error and its text."""

    switches: dict[str, str]
    seen: str | tuple[type[MmchatError], str] = "right"
    family: str = "1.3.0"
    profile: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    turn: int = 1  # in which it comes, from 0


ONE_RESTART = "right, 1 restart"
APPEND, PREFIX = {"strategy": "append"}, {"strategy": "prefix", "rewinds": True}
FAULTS = {
    "crashes within the answer": Fault({"CRASH": "1", "CRASH_TOKENS": "2"}, ONE_RESTART),
    "crashes before it": Fault({"CRASH": "1"}, ONE_RESTART),
    "crashes always": Fault({"CRASH": "1+"}, (WorkerDied, "SIGSEGV")),
    "crashes above 70 rows": Fault(
        {"SEGFAULT_ROWS": "70"}, (ContextFull, "but the library crashes on more than"), turn=2
    ),
    "hangs once": Fault({"HANG": "1"}, ONE_RESTART),
    "hangs always": Fault({"HANG": "1+"}, (WorkerTimeout, "silent for")),
    "fails a run": Fault({"ERROR": "1"}, (EngineError, "rkllm_run failed")),
    "fails it after a token": Fault({"ERROR": "1", "ERROR_TOKENS": "1"}, (EngineError, "rkllm_run failed")),
    "does not load": Fault({"INIT": "fail"}, (EngineError, "rkllm_init returned -1")),
    "loads without a handle": Fault({"INIT": "null"}, (EngineError, "rkllm_init returned 0 and no handle")),
    "cannot load twice": Fault({"SECOND_INIT": "segfault"}),
    "no default parameters": Fault({"PROBE": "zero"}),
    "crashes when asked for them": Fault({"PROBE": "crash"}, (WorkerDied, "SIGSEGV")),
    "crashes beside librknnrt": Fault({"SEGFAULT_RKNN": "1"}),
    "never meets its end token": Fault({"NO_EOS": "1"}),
    "never meets it, 1.2": Fault({"NO_EOS": "1"}, family=OLD),
    "aborts late": Fault({"ABORT_LATE": "3"}, family=OLD, max_new_tokens=2),
    "aborts with an error": Fault({"ABORT_STATE": "error"}, family=OLD, max_new_tokens=2),
    "aborts as if finished": Fault(
        {"ABORT_STATE": "finish", "KV": "append"}, family=OLD, profile=APPEND, max_new_tokens=2
    ),
    "append does not work": Fault({"KV": "broken-append"}, profile=PREFIX),
    "cache size is wrong": Fault({"KV": "append", "KV_COUNT": "7"}, profile=APPEND),
    "prefill is miscounted": Fault({"PREFILL_COUNT": "-5"}, profile=PREFIX),
    "all counts as prefilled": Fault({"PREFILL_COUNT": "all"}, profile=PREFIX),
    "loses 2 MB per run": Fault({"LEAK_MB": "2"}),
    "is slow": Fault({"PREFILL_MS": "5", "DECODE_MS": "50"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_in_a_right_answer_or_one_clear_error(
    name: str, open_board: Any, openvino_talk: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tabulate: Any
) -> None:
    fault, wanted = FAULTS[name], openvino_talk[0]
    runtime = open_board(fault.family, **fault.profile)
    session = runtime.session()

    def ask(number: int, **sampling: Any) -> Any:
        question, n_images = TURNS[number]
        first = sum(n for _, n in TURNS[:number])
        reply = session.ask(question, [picture(first + i) for i in range(n_images)], **GREEDY, **sampling)
        assert reply.text
        return reply

    for number in range(fault.turn):
        ask(number)
    if "HANG" in fault.switches:
        monkeypatch.setattr(llm_proc, "SILENCE_S", 1.5)
        monkeypatch.setattr(llm_proc, "SLOWEST_ROWS_PER_S", 1000.0)
    sampling = {"max_new_tokens": fault.max_new_tokens} if fault.max_new_tokens else {}
    with monkeypatch.context() as patch:
        patch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
        for switch, value in fault.switches.items():
            patch.setenv(f"RKLLM_STANDIN_{switch}", value)
        runtime.llm.worker.kill()  # the next one has the switches
        started = time.monotonic()
        try:
            restarts = ask(fault.turn, **sampling).usage.restarts
            seen: str | MmchatError = f"right, {restarts} restart" if restarts else "right"
        except MmchatError as error:
            seen = error
        assert time.monotonic() - started < DEADLINE_S
    kept = [turn.ids for turn in session.turns]
    tabulate(
        "RKLLM: faults of the library",
        fault=name,
        the_user_sees=seen if isinstance(seen, str) else f"{type(seen).__name__}: {str(seen)[:60]}",
        kept=f"{len(kept)} of {fault.turn + 1} turns",
    )
    if isinstance(fault.seen, str):
        assert seen == fault.seen
        assert kept == [*wanted[: fault.turn], wanted[fault.turn][: fault.max_new_tokens]]
    else:
        assert type(seen) is fault.seen[0]
        assert fault.seen[1] in str(seen)
        assert "\n" not in str(seen)
        assert kept == wanted[: fault.turn]
    profile = Profile.open(open_model(runtime.spec.folder), runtime.spec.folder / LIBRARY)
    assert (profile.safe_rows is not None) == ("SEGFAULT_ROWS" in fault.switches)
    runtime.llm.worker.kill()  # what runs still has the switches
    if "SEGFAULT_ROWS" in fault.switches or fault.max_new_tokens:
        assert session.ask("Thank you.", **GREEDY).text
    else:
        ask(len(kept))
        assert session.turns[-1].ids == wanted[len(kept)]
