"""One supervised child process: vendor code runs there and nowhere else.

The contract:

* A request goes out, events come back, then the end or an error.  One request at a time; other threads wait and get
  their turns in the order in which they came, the same thread gets EngineBusy.
* A dead child is an ordinary event: WorkerDied, with its exit code and the tail of its stderr.  The next request
  starts a new child.  Whether to ask again is the caller's decision.
* A child that is silent for longer than its request allows is killed: WorkerTimeout.  (No heartbeats: a hung C call
  may well answer them from another thread.)
* Cancel asks the child to end the request early; it still ends it properly.  One that does not within
  CANCEL_GRACE_S is killed.
* The child is in a session of its own, so that Ctrl-C reaches the parent alone, and ends when the parent does, even
  by kill -9: its end of the channel closes.

This module knows no models and imports no vendor code.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmchat import errors
from mmchat.frames import Channel, FrameError, PeerGone, pack

CANCEL_GRACE_S = 30.0
_EXIT_GRACE_S = 2.0
LOG_FILE_BYTES = 1 << 20  # then it is renamed to *.1, over the one before
_LOG_LINES = 200
_STEP_S = 0.1
_DRAIN_S = 1.0  # to read what fits into a channel: some thousand tokens

_PROGRAM = """
import sys
sys.path[:] = sys.argv[4:]
from mmchat.child import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""


class Exclusive:
    """A lock that threads get in the order in which they came.

    So who asks again at once goes behind those who wait.  The thread that holds it is told, instead of letting it wait
    for itself.  busy: what it is told.
    """

    def __init__(self, busy: str) -> None:
        self._busy = busy
        self._changed = threading.Condition()
        self._threads: collections.deque[int] = collections.deque()  # the first holds it

    @contextlib.contextmanager
    def held(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """False where should_stop ended the waiting; then it is not held.  Raises EngineBusy."""
        me = threading.get_ident()
        with self._changed:
            if me in self._threads:
                raise errors.EngineBusy(f"{self._busy}: finish or close that first")
            self._threads.append(me)
        is_mine = False
        try:
            with self._changed:
                while self._threads[0] != me and not should_stop():
                    self._changed.wait(_STEP_S)
                is_mine = self._threads[0] == me
            yield is_mine
        finally:
            with self._changed:
                self._threads.remove(me)
                self._changed.notify_all()


class Worker:
    """A child that runs module.serve(config); see mmchat.child for that side.

    name: how messages call it.  start_timeout_s: how long loading may take.
    log_file: where to keep all that the child writes, with the one before; log_tail has the last lines in any case.
    """

    def __init__(
        self,
        module: str,
        config: dict[str, Any],
        *,
        name: str,
        start_timeout_s: float = 600.0,
        log_file: Path | None = None,
    ) -> None:
        self.name = name
        self._log_file = log_file
        self._module, self._config, self._start_timeout_s = module, config, start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._facts: dict[str, Any] | None = None
        self._lifeline: int | None = None  # writing end of a pipe: the child dies when it closes
        self._log: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._log_reader: threading.Thread | None = None
        self._exclusive = Exclusive(f"the {name} worker is still streaming another answer in this thread").held
        self._last_id = 0
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the running child; None where there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def log_tail(self) -> str:
        """The last lines that the child wrote to stderr (or stdout)."""
        return "\n".join(self._log)

    def start(self) -> None:
        """Begin to start the child, without waiting for it; nothing where it runs."""
        with self._exclusive():
            self._spawn()

    def ready(self) -> dict[str, Any]:
        """Wait until the child has loaded; what it tells about itself.

        Raises what serve() raised (ModelDirError, ...), WorkerDied, WorkerTimeout.
        """
        with self._exclusive():
            facts = self._ready(lambda: False)
            assert facts is not None
            return facts

    def call(
        self, request: dict[str, Any], *, silence_s: float, should_stop: Callable[[], bool] = lambda: False
    ) -> Call:
        """Prepare a request; iterating over it sends it.

        silence_s: the longest wait for the next event.  should_stop: asked while waiting; True cancels the request.
        """
        return Call(self, request, silence_s, should_stop)

    def kill(self) -> None:
        """End the child now; the next request starts another."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_GRACE_S)  # else a request sent at once would reach the dying one

    def reload(self, config: dict[str, Any]) -> None:
        """End the child; the next one is given this configuration."""
        with self._exclusive():
            self.kill()
            self._reap()
            self._config = config

    def close(self) -> None:
        """End the child for good.  Idempotent; never waits longer than a few seconds."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()
        if self._facts is None:
            self.kill()  # still loading: it would not notice that we are gone before it is done
        self._reap()

    def _spawn(self) -> None:
        self._check_open()
        if self._process is not None and self._process.poll() is None and self._channel is not None:
            return
        self._reap()
        ours, theirs = socket.socketpair()
        their_lifeline, self._lifeline = os.pipe()
        try:
            descriptors = (theirs.fileno(), their_lifeline)
            process = subprocess.Popen(
                # -u: C's stdout too, so that nothing that was printed is lost in a buffer when the child crashes.
                # The name is for people who look at a list of processes.
                [sys.executable, "-u", "-c", _PROGRAM, *map(str, descriptors), f"mmchat-{self.name}-worker", *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(their_lifeline)
        self._process, self._channel, self._facts = process, Channel(ours), None
        self._log.clear()
        self._log_reader = threading.Thread(target=self._read_log, args=(process,), daemon=True)
        self._log_reader.start()
        self._check_open()  # another thread may have closed it meanwhile, and have seen no process yet
        self._send({"module": self._module, "config": self._config})

    def _check_open(self) -> None:
        if self._closed:
            self.kill()
            self._reap()
            raise errors.EngineError(f"the {self.name} worker is closed")

    def _send(self, message: dict[str, Any] | bytes, may_wait: Callable[[], bool] | None = None) -> None:
        """A peer that is gone is noticed, and explained, by the next receive.

        may_wait: asked while the child does not read; where it says no, the child is ended: WorkerTimeout.
        """
        deadline = time.monotonic() + CANCEL_GRACE_S
        if self._channel is not None:
            data = message if isinstance(message, bytes) else pack(message)
            try:
                self._channel.send_packed(data, may_wait or (lambda: time.monotonic() < deadline))
            except PeerGone:
                pass
            except TimeoutError:
                self._time_out("took no message in time")

    def _time_out(self, problem: str) -> NoReturn:
        """Raises WorkerTimeout; ends the child first."""
        self.kill()
        log = self._reap()[1]
        raise errors.WorkerTimeout(f"the {self.name} worker {problem} and was ended", name=self.name, log=log) from None

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                text = line.decode(errors="replace").rstrip()
                self._log.append(text)
                if self._log_file is not None:
                    _append(self._log_file, text)
                if os.environ.get("MMCHAT_WORKER_LOG"):
                    print(f"[{self.name}] {text}", file=sys.stderr)

    def _ready(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """The child's facts, once it has loaded; None where should_stop ended the waiting (the child goes on)."""
        self._spawn()
        deadline = time.monotonic() + self._start_timeout_s
        while self._facts is None:
            if should_stop():
                return None
            left_s = max(0.0, deadline - time.monotonic())
            message = self._receive(left_s, self._start_timeout_s)
            if message is None:
                continue
            if told := _from_wire(message.get("failed")):
                self._reap()
                raise told
            if not isinstance(message.get("ready"), dict):
                self._fail("sent something else than that it is ready")
            self._facts = message["ready"]
        return self._facts

    def _receive(self, left_s: float, allowed_s: float) -> dict[str, Any] | None:
        """The next message; None where a short step brought none and there is time left (left_s of allowed_s).

        Raises WorkerDied or WorkerTimeout; either way the child is then gone.
        """
        if self._channel is None:
            raise errors.EngineError(f"the {self.name} worker was closed while it had work to do")
        try:
            message = self._channel.receive(min(left_s, _STEP_S))
        except TimeoutError:
            if left_s > _STEP_S:
                return None
            self._time_out(f"was silent for {allowed_s:g} s")
        except PeerGone:
            if self._closed:
                raise errors.EngineError(f"the {self.name} worker was closed while it had work to do") from None
            self._fail("")
        except (FrameError, ValueError) as error:  # ValueError: closed by another thread
            self._fail(str(error))
        if not isinstance(message, dict):
            self._fail("sent what is no message")
        return message

    def _fail(self, problem: str) -> NoReturn:
        """Raises WorkerDied; ends the child first where it is not dead yet (problem: what it did)."""
        if problem:
            self.kill()
        exit_code, log = self._reap()
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        raise errors.WorkerDied(
            f"the {self.name} worker died ({problem or _describe_exit(exit_code)}){': ' + last if last else ''}",
            name=self.name,
            log=log,
            exit_code=exit_code,
        )

    def _reap(self) -> tuple[int | None, str]:
        """Leave no process, pipe or thread behind; the exit code and the log of the one that was there."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        process, self._process = self._process, None
        if process is None:
            return None, ""
        try:
            exit_code = process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            exit_code = process.wait()
        if self._log_reader is not None:
            self._log_reader.join(_EXIT_GRACE_S)
        return exit_code, self.log_tail


class Call:
    """One request: an iterator over its events, to be run once."""

    def __init__(
        self, worker: Worker, request: dict[str, Any], silence_s: float, should_stop: Callable[[], bool]
    ) -> None:
        self._worker, self._request = worker, request
        self._silence_s, self._should_stop = silence_s, should_stop
        self._id = 0
        self._cancelled_at: float | None = None
        self._said: collections.deque[dict[str, Any]] = collections.deque()  # and not yet read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises what the handler raised, WorkerDied, WorkerTimeout, EngineBusy.

        Leaving the iteration early cancels the request and waits for its end.
        """
        worker = self._worker
        with worker._exclusive(self._should_stop) as is_mine:
            if not is_mine:  # cancelled while others had their turns
                return
            worker._last_id += 1
            self._id = worker._last_id
            try:
                request = pack({"id": self._id, "request": self._request})
            except FrameError as error:
                raise errors.EngineError(f"not sent to the {worker.name} worker: {error}") from None
            if worker._ready(self._should_stop) is None:
                return
            ended = False
            try:
                self._hand_over(request)
                for message in self._messages():
                    if isinstance(message.get("event"), dict):
                        yield message["event"]
                        continue
                    ended = True
                    if message.get("end") is True:
                        return
                    if told := _from_wire(message.get("error")):
                        raise told
                    worker._fail("sent neither an event, nor an end, nor an error")
            except errors.EngineError:
                ended = True
                raise
            finally:
                if not ended:
                    self._abandon()

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            message = self._next()
            if message.get("id") == self._id:
                yield message

    def _hand_over(self, request: bytes) -> None:
        """Send the request; a cancel meanwhile follows it."""
        since = time.monotonic()
        cancelled_at: float | None = None

        def may_wait() -> bool:
            nonlocal cancelled_at
            now = time.monotonic()
            if cancelled_at is None and self._should_stop():
                cancelled_at = now
            return now < since + self._silence_s and (cancelled_at is None or now < cancelled_at + CANCEL_GRACE_S)

        self._worker._send(request, may_wait)

    def _next(self) -> dict[str, Any]:
        """The next message; waits in short steps, for a cancel starts a clock of its own."""
        silent_since = time.monotonic()
        while not self._said:
            if self._cancelled_at is None and self._should_stop():
                self._cancel()
            allowed_s = self._silence_s
            if self._cancelled_at is not None:
                allowed_s = min(allowed_s, max(0.0, self._cancelled_at - silent_since) + CANCEL_GRACE_S)
            message = self._worker._receive(max(0.0, silent_since + allowed_s - time.monotonic()), allowed_s)
            if message is None:
                continue
            if self._cancelled_at is not None and time.monotonic() > self._cancelled_at + CANCEL_GRACE_S:
                self._said.append(message)
                self._hear_the_end()
                continue
            return message
        return self._said.popleft()

    def _hear_the_end(self) -> None:
        """It should have stopped by now.  A slow reader may have all that was said before it, the end too.

        Raises WorkerTimeout.
        """
        deadline = time.monotonic() + _DRAIN_S
        while "event" in self._said[-1]:
            message = self._worker._receive(2 * _STEP_S, 0.0) if time.monotonic() < deadline else None
            if message is None:
                self._worker._time_out(f"did not stop within {CANCEL_GRACE_S:g} s")
            self._said.append(message)

    def _cancel(self) -> None:
        self._cancelled_at = time.monotonic()
        self._worker._send({"cancel": self._id})

    def _abandon(self) -> None:
        """The reader left (or was interrupted): bring the child back to rest, or end it."""
        try:
            if self._cancelled_at is None:
                self._cancel()
            for message in self._messages():
                if "event" not in message:
                    return
        except errors.EngineError:
            pass
        except BaseException:  # a second Ctrl-C: do not wait
            self._worker.kill()
            raise


def _append(path: Path, line: str) -> None:
    """Write a line to a file of bounded size.  A disk that is full, or a folder that cannot be written, loses it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_FILE_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        hint = ", often for lack of memory" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} {name}{hint}"
    return f"exit code {code}"


def _from_wire(error: Any) -> errors.MmchatError | None:
    """The error that the child meant; None where it is none."""
    try:
        made = getattr(errors, error["kind"])(*error["arguments"])
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
    return made if isinstance(made, errors.MmchatError) else None
