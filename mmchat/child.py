"""The child's side of a worker: what `mmchat.worker` starts.

It takes one module and its configuration, calls the module's serve(config), and then answers requests one after the
other.  A second thread reads the channel, so that a cancel arrives while the vendor's code is running, and so that the
child ends when its parent is gone, however the parent went.

serve(config) -> (facts about it, handler); handler(request, should_stop) -> events, each a plain dict.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from mmchat.errors import ContextFull, EngineError, MissingEmbeddings, MmchatError
from mmchat.frames import Channel, FrameError, PeerGone

# Requests after which free memory goes back to the system: takes some milliseconds.
_TRIM_EVERY = 16

Handler = Callable[[dict[str, Any], Callable[[], bool]], Iterator[dict[str, Any]]]
Serve = Callable[[dict[str, Any]], tuple[dict[str, Any], Handler]]


def main(descriptor: int, lifeline: int) -> None:
    """Serve until the parent closes the channel.  Never returns.

    lifeline: the reading end of a pipe that the parent holds open for as long as it lives.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    _die_with(lifeline)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        hello = channel.receive()
        try:
            serve: Serve = importlib.import_module(hello["module"]).serve
            facts, handler = serve(hello["config"])
        except Exception as error:
            channel.send({"failed": _to_wire(error)})
            _exit(1)
        channel.send({"ready": facts})
        _Loop(channel, handler).run()
    except PeerGone:
        _exit(0)
    except BaseException:
        traceback.print_exc()
        _exit(1)


def _die_with(lifeline: int) -> None:
    """Have the kernel end this process when the pipe's other end closes, even while C code holds the interpreter.

    (PR_SET_PDEATHSIG would follow the parent's thread, not its process.)
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # whose default is to terminate
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # closed before we asked
        os._exit(0)


def _trim() -> None:
    """Hand free memory back: buffers that grow row by row leave holes, with the demo model 50 MB over 300 answers.

    (With glibc.  MALLOC_MMAP_THRESHOLD_ would keep the holes from coming, but costs a tenth of the speed.)
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _exit(code: int) -> None:
    sys.stderr.flush()
    os._exit(code)  # not exit(): a vendor library's destructors may crash or hang


class _Loop:
    def __init__(self, channel: Channel, handler: Handler) -> None:
        self._channel, self._handler = channel, handler
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled = 0  # the latest request that was cancelled; their numbers only grow

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            message = self._requests.get()
            number = message["id"]
            try:
                for event in self._handler(message["request"], lambda n=number: self._cancelled >= n):  # type: ignore[misc]
                    self._channel.send({"id": number, "event": event})
                self._channel.send({"id": number, "end": True})
            except PeerGone:
                raise
            except Exception as error:
                self._channel.send({"id": number, "error": _to_wire(error)})
            if number % _TRIM_EVERY == 0:
                _trim()

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if "cancel" in message:
                    self._cancelled = max(self._cancelled, message["cancel"])
                else:
                    self._requests.put(message)
        except (PeerGone, FrameError, TypeError):
            os._exit(0)


# Errors that cross the border as what they are, with what it takes to make them again.
_WITH_ARGUMENTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "ContextFull": lambda error: (error.n_prompt, error.max_new_tokens, error.limit),
    "MissingEmbeddings": lambda error: (list(error.keys),),
}


def _to_wire(error: Exception) -> dict[str, Any]:
    name = type(error).__name__
    if isinstance(error, (ContextFull, MissingEmbeddings)):
        return {"kind": name, "arguments": _WITH_ARGUMENTS[name](error)}
    text = str(error).encode(errors="backslashreplace").decode()  # file names may hold what is no Unicode
    if isinstance(error, MmchatError):
        return {"kind": name, "arguments": [text]}
    traceback.print_exc()
    return {"kind": EngineError.__name__, "arguments": [f"{name}: {' '.join(text.split())}"]}
