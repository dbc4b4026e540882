"""The child's side of a worker: what `mmchat.worker` starts.

It takes one module and its configuration, calls the module's serve(config), and then answers requests one after the
other.  A second thread reads the channel, so that a cancel arrives while the vendor's code is running, and so that the
child ends when its parent is gone, however the parent went.

serve(config) -> (facts about it, handler); handler(request, should_stop) -> events, each a plain dict.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from mmchat.errors import ContextFull, EngineError, MissingEmbeddings, MmchatError
from mmchat.frames import Channel, FrameError, PeerGone

Handler = Callable[[dict[str, Any], Callable[[], bool]], Iterator[dict[str, Any]]]
Serve = Callable[[dict[str, Any]], tuple[dict[str, Any], Handler]]


def main(descriptor: int) -> None:
    """Serve until the parent closes the channel.  Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
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
    if isinstance(error, MmchatError):
        return {"kind": name, "arguments": [str(error)]}
    traceback.print_exc()
    return {"kind": EngineError.__name__, "arguments": [f"{name}: {' '.join(str(error).split())}"]}
