"""The contract at the top of mmchat/worker.py, clause by clause, with children that break every rule."""

from __future__ import annotations

import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmchat import worker as worker_module
from mmchat.errors import (
    ContextFull,
    EngineBusy,
    EngineError,
    MissingEmbeddings,
    ModelDirError,
    PromptError,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
)
from mmchat.frames import MAX_FRAME_BYTES
from mmchat.worker import Worker
from tests.children import frame
from tests.fakes import eventually, is_gone, workers

Make = Callable[..., Worker]


@pytest.fixture
def make() -> Iterator[Make]:
    """Workers of tests/children.py.  Afterwards none of their processes is left."""
    made: list[Worker] = []
    before = workers()

    def make(start_timeout_s: float = 60.0, **config: Any) -> Worker:
        made.append(Worker("tests.children", config, name="test", start_timeout_s=start_timeout_s))
        return made[-1]

    yield make
    pids = [worker.pid for worker in made]
    for worker in made:
        worker.kill()  # close() alone would wait for those that sleep
        worker.close()
    assert all(pid is None or is_gone(pid) for pid in pids)
    eventually(lambda: workers() <= before)  # those, too, that a test has closed


def ask(worker: Worker, do: str, *, silence_s: float = 60.0, **values: Any) -> list[dict[str, Any]]:
    return list(worker.call({"do": do, **values}, silence_s=silence_s))


def count(worker: Worker, n: int = 2) -> list[int]:
    return [event["i"] for event in ask(worker, "count", n=n)]


def pid_of(worker: Worker) -> int:
    pid: int = worker.ready()["pid"]
    return pid


# Starting


def test_it_starts_when_it_is_first_needed_and_tells_its_facts(make: Make) -> None:
    worker = make(colour="red")
    before = worker.pid
    assert before is None
    assert worker.ready() == {"pid": worker.pid, "config": {"colour": "red"}}
    worker.start()  # nothing: it runs
    assert pid_of(worker) == worker.pid
    assert count(worker, 3) == [0, 1, 2]


def test_what_was_printed_survives_a_crash(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a pipe C and Python print in blocks, and what is in a block is lost with the process."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    worker = make()
    with pytest.raises(WorkerDied, match=r"SIGSEGV\): words of its Python"):
        ask(worker, "print_and_crash")
    assert "E rkllm: words of a C library" in worker.log_tail.splitlines()


def test_start_does_not_wait(make: Make) -> None:
    worker = make(start="slow")
    started = time.monotonic()
    worker.start()
    assert time.monotonic() - started < 5
    assert worker.pid is not None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_free_memory_goes_back_to_the_system(make: Make) -> None:
    worker = make()
    count(worker)
    before = resident_mb(worker)
    ask(worker, "holes")
    assert resident_mb(worker) > before + 20
    for _ in range(20):
        count(worker)
    assert resident_mb(worker) < before + 10


def resident_mb(worker: Worker) -> float:
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def test_what_serve_raises_reaches_the_caller_and_leaves_no_child(make: Make) -> None:
    worker = make(start="no model")
    for _ in range(2):  # and it can be tried again
        with pytest.raises(ModelDirError, match="no weights here"):
            worker.ready()
        assert worker.pid is None


def test_a_bug_in_serve_is_an_engine_error_with_the_traceback_in_the_log(make: Make) -> None:
    worker = make(start="bug")
    with pytest.raises(EngineError, match="KeyError: 'oops'"):
        ask(worker, "count", n=1)
    assert "Traceback" in worker.log_tail


def test_a_child_that_exits_while_it_loads(make: Make) -> None:
    with pytest.raises(WorkerDied, match="exit code 42") as caught:
        make(start="exit", say="no driver found").ready()
    assert (caught.value.exit_code, caught.value.name) == (42, "test")
    assert "no driver found" in caught.value.log
    assert "no driver found" in str(caught.value)


def test_a_child_that_loads_for_too_long_is_killed(make: Make) -> None:
    worker = make(start_timeout_s=0.5, start="slow")
    worker.start()
    pid = worker.pid
    assert pid is not None
    with pytest.raises(WorkerTimeout, match=r"silent for 0\.5 s"):
        worker.ready()
    assert is_gone(pid)


def test_a_request_can_be_cancelled_while_the_child_loads(make: Make) -> None:
    worker = make(start="slow", start_timeout_s=3.0)
    stop_at = time.monotonic() + 0.2
    call = worker.call({"do": "count", "n": 1}, silence_s=60.0, should_stop=lambda: time.monotonic() > stop_at)
    assert list(call) == []


def test_the_child_imports_only_what_it_needs(make: Make) -> None:
    modules = set(ask(make(), "modules")[0]["modules"])
    assert not modules & {"numpy", "openvino", "PIL", "tokenizers", "typer", "rich", "subprocess", "mmchat.worker"}


# Errors


def test_errors_arrive_as_what_they_are_and_the_child_lives_on(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    with pytest.raises(ContextFull) as full:
        ask(worker, "raise", kind="ContextFull")
    assert (full.value.n_prompt, full.value.max_new_tokens, full.value.limit) == (1900, 200, 2048)
    with pytest.raises(MissingEmbeddings) as missing:
        ask(worker, "raise", kind="MissingEmbeddings")
    assert missing.value.keys == ("a" * 64, "b" * 64)
    with pytest.raises(PromptError, match=r"^token id -1 is not in the table$"):
        ask(worker, "raise", kind="PromptError")
    with pytest.raises(EngineError, match=r"^ZeroDivisionError: division by zero$") as unknown:
        ask(worker, "raise", kind="unknown")
    assert not isinstance(unknown.value, WorkerError)
    assert (count(worker), worker.pid) == ([0, 1], pid)


def test_an_error_that_names_an_undecodable_file(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    with pytest.raises(EngineError, match="caf") as caught:
        ask(worker, "raise", kind="surrogate")
    assert not isinstance(caught.value, WorkerError)
    assert worker.pid == pid


def test_events_before_an_error_are_seen(make: Make) -> None:
    events = iter(make().call({"do": "raise", "kind": "PromptError"}, silence_s=60.0))
    assert next(events) == {"i": 0}
    with pytest.raises(PromptError):
        next(events)


def test_an_event_over_the_bound_is_an_error_and_the_child_lives_on(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    with pytest.raises(EngineError, match="over the bound"):
        ask(worker, "flood", n_bytes=MAX_FRAME_BYTES)
    assert (count(worker), worker.pid) == ([0, 1], pid)


@pytest.mark.parametrize("bad", [bytes(MAX_FRAME_BYTES), object()], ids=["too long", "no msgpack"])
def test_a_request_that_cannot_be_sent_is_refused_at_once(
    make: Make, bad: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_GRACE_S", 1.0)
    worker = make()
    pid = pid_of(worker)
    with pytest.raises((EngineError, TypeError)):
        ask(worker, "count", n=1, ballast=bad)
    assert (count(worker), worker.pid) == ([0, 1], pid)


# Death


def test_exit_42(make: Make) -> None:
    worker = make()
    with pytest.raises(WorkerDied, match=r"exit code 42.*last words") as caught:
        ask(worker, "exit")
    assert caught.value.exit_code == 42
    assert "last words" in caught.value.log
    assert worker.pid is None


def test_kill_9_in_mid_request(make: Make) -> None:
    worker = make(say="hello from the child")
    events = iter(worker.call({"do": "talk"}, silence_s=60.0))
    assert next(events) == {"i": 0}
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="killed by signal 9 SIGKILL") as caught:
        list(events)
    assert caught.value.exit_code == -9
    assert "hello from the child" in caught.value.log
    assert is_gone(pid)
    assert count(worker) == [0, 1]
    assert worker.pid not in (None, pid)


def test_a_child_that_died_between_requests_is_replaced(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    worker.kill()
    eventually(lambda: worker.pid is None)
    assert count(worker) == [0, 1]
    assert worker.pid not in (None, pid)


def test_sys_exit_in_a_handler_is_a_death(make: Make) -> None:
    worker = make()
    with pytest.raises(WorkerDied):
        ask(worker, "raise", kind="SystemExit")
    assert count(worker) == [0, 1]


def test_silence_ends_in_a_timeout_and_the_child_is_gone(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    with pytest.raises(WorkerTimeout, match=r"silent for 0\.5 s"):
        ask(worker, "sleep", silence_s=0.5)
    assert is_gone(pid)
    assert count(worker) == [0, 1]


def test_a_child_that_keeps_talking_does_not_time_out(make: Make) -> None:
    worker = make()
    worker.ready()
    stop_at = time.monotonic() + 1.2
    events = list(worker.call({"do": "talk"}, silence_s=0.6, should_stop=lambda: time.monotonic() > stop_at))
    assert events[-1] == {"stopped": True}


GARBAGE = {
    "no msgpack": struct.pack(">I", 1) + b"\xc1",
    "no map": frame([1, 2, 3]),
    "oversized": struct.pack(">I", MAX_FRAME_BYTES + 1),
    "keys that are no text": frame({b"\xff": 1, 3: 4}),
    "neither event nor end": frame({"id": 1, "what": "?"}),
    "an error that is none": frame({"id": 1, "error": "nonsense"}),
    "an error of a strange kind": frame({"id": 1, "error": {"kind": "Iterable", "arguments": [1]}}),
    "an error that lacks arguments": frame({"id": 1, "error": {"kind": "ContextFull", "arguments": [1]}}),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_from_the_child_ends_the_child_not_the_parent(make: Make, data: bytes) -> None:
    worker = make()
    pid = pid_of(worker)
    with pytest.raises(EngineError):
        ask(worker, "raw", data=data, silence_s=5.0)
    assert is_gone(pid)
    assert count(worker) == [0, 1]


@pytest.mark.parametrize("data", [frame({"hello": 1}), frame({"ready": 5}), frame({"failed": "x"}), b"\xff" * 8])
def test_garbage_instead_of_facts(make: Make, data: bytes) -> None:
    with pytest.raises(EngineError):
        make(start="raw", data=data).ready()


# Cancelling


def test_cancel_is_heard_and_leaves_the_child_usable(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    seen: list[dict[str, Any]] = []
    for event in worker.call({"do": "talk"}, silence_s=60.0, should_stop=lambda: len(seen) >= 5):
        seen.append(event)
    assert seen[-1] == {"stopped": True}
    assert (count(worker), worker.pid) == ([0, 1], pid)


def test_cancel_is_heard_while_the_child_is_silent(make: Make) -> None:
    worker = make()
    worker.ready()
    stop_at = time.monotonic() + 0.3
    events = list(worker.call({"do": "wait"}, silence_s=60.0, should_stop=lambda: time.monotonic() > stop_at))
    assert events[-1] == {"stopped": True}


@pytest.mark.parametrize("how", ["close", "break", "raise"])
def test_leaving_the_iteration_early_leaves_the_child_usable(make: Make, how: str) -> None:
    worker = make()
    pid = pid_of(worker)
    events: Any = iter(worker.call({"do": "talk"}, silence_s=60.0))
    assert next(events) == {"i": 0}
    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt)
    elif how == "close":
        events.close()
    else:
        del events
    assert (count(worker), worker.pid) == ([0, 1], pid)


def test_a_child_that_ignores_a_cancel_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_GRACE_S", 0.3)
    worker = make()
    pid = pid_of(worker)
    began: list[dict[str, Any]] = []
    events = iter(worker.call({"do": "sleep"}, silence_s=60.0, should_stop=lambda: bool(began)))
    began.append(next(events))
    with pytest.raises(WorkerTimeout):
        next(events)
    assert is_gone(pid)
    assert count(worker) == [0, 1]


def slowly(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Slower than any child says them."""
    for event in events:
        time.sleep(0.05)
        yield event


def test_a_child_that_talks_on_after_a_cancel_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_GRACE_S", 0.3)
    worker = make()
    pid = pid_of(worker)
    with pytest.raises(WorkerTimeout, match=r"did not stop within 0\.3 s"):
        list(worker.call({"do": "chatter"}, silence_s=60.0, should_stop=lambda: True))
    assert is_gone(pid)
    events: Any = iter(worker.call({"do": "chatter"}, silence_s=60.0))
    pid = next(events)["pid"]
    events.close()
    assert is_gone(pid)
    worker.ready()
    with pytest.raises(WorkerTimeout, match=r"did not stop within 0\.3 s"):
        list(slowly(worker.call({"do": "chatter"}, silence_s=60.0, should_stop=lambda: True)))
    assert count(worker) == [0, 1]


def test_who_reads_slowly_after_a_cancel_gets_all_that_was_said(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_GRACE_S", 0.2)
    worker = make()
    worker.ready()
    seen = list(slowly(worker.call({"do": "count", "n": 20}, silence_s=60.0, should_stop=lambda: True)))
    assert [event["i"] for event in seen] == list(range(20))


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_child_that_takes_no_request_is_killed(
    make: Make, is_cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped, and so the request fills the channel."""
    monkeypatch.setattr(worker_module, "CANCEL_GRACE_S", 0.3)
    worker = make()
    pid = pid_of(worker)
    os.kill(pid, signal.SIGSTOP)
    request = {"do": "count", "n": 2, "ballast": bytes(8 << 20)}
    with pytest.raises(WorkerTimeout, match="took no message in time"):
        list(worker.call(request, silence_s=60.0 if is_cancelled else 0.5, should_stop=lambda: is_cancelled))
    assert is_gone(pid)
    assert count(worker) == [0, 1]


def test_closing_while_another_thread_starts_the_child_leaves_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, started = make(), []

    class Slow(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self.pid)
            worker.close()  # as from another thread

    monkeypatch.setattr(subprocess, "Popen", Slow)
    with pytest.raises(EngineError, match="is closed"):
        worker.ready()
    (pid,) = started
    assert is_gone(pid)


def test_leaving_a_child_that_ignores_it_is_quiet_and_kills_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_GRACE_S", 0.3)
    worker = make()
    events: Any = iter(worker.call({"do": "sleep"}, silence_s=60.0))
    pid = next(events)["pid"]
    events.close()
    assert is_gone(pid)
    assert count(worker) == [0, 1]


def test_a_late_cancel_does_not_hit_the_next_request(make: Make) -> None:
    worker = make()
    seen: list[dict[str, Any]] = []
    for _ in range(20):
        seen.clear()
        for event in worker.call({"do": "count", "n": 2}, silence_s=60.0, should_stop=lambda: len(seen) == 2):
            seen.append(event)
        assert count(worker) == [0, 1]


# Turns


def test_the_same_thread_is_told_that_it_is_busy(make: Make) -> None:
    worker = make()
    events: Any = iter(worker.call({"do": "talk"}, silence_s=60.0))
    next(events)
    with pytest.raises(EngineBusy, match="still streaming another answer"):
        count(worker)
    with pytest.raises(EngineBusy):
        worker.ready()
    assert next(events)["i"] > 0  # the first one is not disturbed
    events.close()
    assert count(worker) == [0, 1]


def test_two_threads_take_turns(make: Make) -> None:
    worker = make()
    worker.ready()
    log: list[tuple[int, int]] = []

    def run(name: int) -> None:
        for _ in range(10):
            for event in ask(worker, "count", n=5):
                log.append((name, event["i"]))

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in range(2):
        assert [i for who, i in log if who == name] == [0, 1, 2, 3, 4] * 10


def test_threads_are_served_in_the_order_in_which_they_came(make: Make) -> None:
    worker = make()
    events: Any = iter(worker.call({"do": "talk"}, silence_s=60.0))
    next(events)
    order: list[str] = []

    def run(name: str, waits: threading.Event) -> None:
        def asked() -> bool:
            waits.set()
            return False

        for _ in worker.call({"do": "count", "n": 2}, silence_s=60.0, should_stop=asked):
            order.append(name)

    threads = []
    for name in "abc":
        waits = threading.Event()
        threads.append(threading.Thread(target=run, args=(name, waits)))
        threads[-1].start()
        assert waits.wait(20)
    events.close()
    for thread in threads:
        thread.join(60)
    assert order == ["a", "a", "b", "b", "c", "c"]


def test_a_second_thread_waits_for_the_first(make: Make) -> None:
    worker = make()
    events: Any = iter(worker.call({"do": "talk"}, silence_s=60.0))
    next(events)
    result: list[list[int]] = []
    second = threading.Thread(target=lambda: result.append(count(worker)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert result == []
    events.close()
    second.join(30)
    assert result == [[0, 1]]


# Closing


def test_close_is_idempotent_and_leaves_nothing(make: Make) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    worker = make()
    pid = pid_of(worker)
    assert len(os.listdir("/proc/self/fd")) > before[0]
    for _ in range(3):
        worker.close()
    assert not Path(f"/proc/{pid}").exists()  # not even a zombie
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    with pytest.raises(EngineError, match="closed"):
        count(worker)
    Worker("tests.children", {}, name="never started").close()


def test_restarts_leave_nothing_either(make: Make) -> None:
    worker = make()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with pytest.raises(WorkerDied):
            ask(worker, "exit")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_closing_a_child_that_hears_nothing_takes_seconds_only(make: Make) -> None:
    worker = make(start="slow")
    worker.start()
    pid = worker.pid
    assert pid is not None
    started = time.monotonic()
    worker.close()
    assert is_gone(pid)
    assert time.monotonic() - started < 10


def test_closing_before_an_answer_was_read_to_its_end(make: Make) -> None:
    """As when an exception leaves `with mmchat.open()` from inside the loop over an answer."""
    worker = make()
    events: Any = iter(worker.call({"do": "talk"}, silence_s=60.0))
    next(events)
    worker.close()
    events.close()
    worker.close()


def test_reading_on_after_close(make: Make) -> None:
    worker = make()
    events = iter(worker.call({"do": "talk"}, silence_s=60.0))
    next(events)
    worker.close()
    with pytest.raises(EngineError):
        list(events)


def test_closing_while_another_thread_waits_for_an_answer(make: Make) -> None:
    worker = make()
    outcome: list[BaseException | None] = []
    began = threading.Event()

    def run() -> None:
        try:
            for _ in worker.call({"do": "wait"}, silence_s=60.0):
                began.set()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert began.wait(30)
    worker.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(outcome[0], EngineError)


# The parent's fate

PARENT = """
import time
from mmchat.worker import Worker
worker = Worker("tests.children", {config}, name="test")
try:
    worker.start()
    while "loading" not in worker.log_tail:
        time.sleep(0.01)
    print(worker.pid, flush=True)
    for event in worker.call({request}, silence_s=60.0):
        print("event", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    facts = worker.ready()
    print(facts["pid"], len(list(worker.call({{"do": "count", "n": 3}}, silence_s=60.0))), flush=True)
    worker.close()
"""


@pytest.fixture
def parent() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Another Python with a worker that serves a request; it and the pid of its child."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def start(do: str, **config: Any) -> tuple[subprocess.Popen[str], int]:
        program = f"import sys; sys.path[:] = {sys.path!r}\n" + PARENT.format(config=config, request={"do": do})
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        child = int(process.stdout.readline())
        started.append((process, child))
        if not config.get("start"):
            assert process.stdout.readline() == "event\n"
        return process, child

    yield start
    for process, child in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        if not is_gone(child):
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("do", ["wait", "talk", "sleep", "burn", "hog"])
def test_a_parent_killed_by_9_leaves_no_orphan(parent: Any, do: str) -> None:
    process, child = parent(do)
    process.kill()
    eventually(lambda: is_gone(child))


def test_a_parent_killed_by_9_leaves_no_orphan_that_is_still_loading(parent: Any) -> None:
    process, child = parent("count", start="slow")
    process.kill()
    eventually(lambda: is_gone(child))


def test_ctrl_c_reaches_the_parent_alone(parent: Any) -> None:
    process, child = parent("talk")
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stdout.read().split("\n")
    at = rest.index("interrupted")
    assert rest[at + 1] == f"{child} 3"  # the same child, and it answers
    assert process.wait(30) == 0


def test_a_child_ignores_ctrl_c_even_when_it_is_sent_to_it(make: Make) -> None:
    worker = make()
    pid = pid_of(worker)
    for _ in range(3):
        os.kill(pid, signal.SIGINT)
    assert (count(worker), worker.pid) == ([0, 1], pid)
