"""What the workers of test_worker.py run: a child that does what its request asks, however rude."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from mmchat import errors
from mmchat.child import Handler

Request = dict[str, Any]
ShouldStop = Callable[[], bool]

FOREVER_S = 600


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    print(config.get("say", "loading"), file=sys.stderr, flush=True)
    match config.get("start"):
        case "no model":
            raise errors.ModelDirError("/models/x: no weights here")
        case "bug":
            raise KeyError("oops")
        case "exit":
            os._exit(42)
        case "slow":
            time.sleep(FOREVER_S)
        case "raw":
            write_raw(config["data"])
    return {"pid": os.getpid(), "config": config}, handle


def handle(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    yield from globals()[f"do_{request['do']}"](request, should_stop)


def do_count(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    for i in range(request["n"]):
        yield {"i": i, "pid": os.getpid()}


def do_modules(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    yield {"modules": sorted(sys.modules)}


def do_raise(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    yield {"i": 0}
    kinds: dict[str, Callable[[], BaseException]] = {
        "ContextFull": lambda: errors.ContextFull(1900, 200, 2048),
        "MissingEmbeddings": lambda: errors.MissingEmbeddings(["a" * 64, "b" * 64]),
        "PromptError": lambda: errors.PromptError("token id -1 is not in the table"),
        "unknown": lambda: ZeroDivisionError("division\nby zero"),
        "surrogate": lambda: OSError("caf\udce9.png"),
        "SystemExit": lambda: SystemExit(3),
    }
    raise kinds[request["kind"]]()


def do_exit(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    yield {"i": 0}
    print("last words", file=sys.stderr, flush=True)
    os._exit(42)


def do_print_and_crash(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """As vendor code prints, which flushes nothing."""
    ctypes.CDLL(None).printf(b"E rkllm: words of a C library\n")
    print("words of its Python")
    yield {"i": 0}
    os.kill(os.getpid(), signal.SIGSEGV)


def do_talk(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """Until it is stopped."""
    i = 0
    while not should_stop():
        yield {"i": i}
        i += 1
        time.sleep(0.002)
    yield {"stopped": True}


def do_chatter(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """On and on, whatever it is told."""
    while True:
        yield {"pid": os.getpid()}
        time.sleep(0.01)


def do_wait(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """One event, then silence until it is stopped."""
    yield {"pid": os.getpid()}
    while not should_stop():
        time.sleep(0.002)
    yield {"stopped": True}


def do_sleep(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """One event, then a long call that hears nothing."""
    yield {"pid": os.getpid()}
    time.sleep(FOREVER_S)


def do_burn(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """One event, then a long computation in C."""
    yield {"pid": os.getpid()}
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)


def do_hog(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """One event, then a long computation in C that no other thread gets a word in: it holds the interpreter's lock."""
    yield {"pid": os.getpid()}
    sum(iter(int, 1))


_KEPT: list[bytes] = []


def do_holes(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """Much memory, and free again but for a little here and there."""
    blocks = []
    for _ in range(500):
        blocks.append(b"x" * 100_000)
        _KEPT.append(os.urandom(1_000))
    yield {"i": 0}


def do_raw(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """Bytes that are no event, straight into the channel."""
    yield {"i": 0}
    write_raw(request["data"])
    time.sleep(FOREVER_S)


def do_flood(request: Request, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    """An event over the bound of a frame."""
    yield {"data": bytes(request["n_bytes"])}


def write_raw(data: bytes) -> None:
    os.write(int(sys.argv[1]), data)


def frame(message: object) -> bytes:
    data: bytes = msgpack.packb(message)
    return struct.pack(">I", len(data)) + data
