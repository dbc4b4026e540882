"""The stand-in's switches, and where it counts and writes what it did.  README.md lists them."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_own_counts = {"init": 0, "set": 0, "inference": 0}


def knob(name: str) -> str:
    return os.environ.get(f"RKNN_STANDIN_{name}", "")


def is_due(name: str, number: int) -> bool:
    """Whether the switch names this call: "3" the third alone, "3+" it and all later ones."""
    value = knob(name)
    return bool(value) and (number >= int(value[:-1]) if value.endswith("+") else number == int(value))


def count(what: str) -> int:
    """From 1: of this process, or of all that share the file RKNN_STANDIN_COUNT."""
    path = knob("COUNT")
    if not path:
        _own_counts[what] += 1
        return _own_counts[what]
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        counts = {**dict.fromkeys(_own_counts, 0), **json.loads(file.read() or "{}")}
        counts[what] += 1
        file.truncate(0)
        file.write(json.dumps(counts))
        return int(counts[what])


def trace(**what: Any) -> None:
    """One line of JSON to the file RKNN_STANDIN_TRACE: the truth that a test compares with."""
    if path := knob("TRACE"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def on_the_npu(work: Callable[[], object]) -> bool:
    """Do the work; False where another process computes on it meanwhile (RKNN_STANDIN_NPU names a lock file)."""
    path = knob("NPU")
    if not path:
        work()
        return True
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        work()
        return True


def log(level: str, text: str) -> None:
    """Rockchip's package writes errors to stderr; its library and the rest, to stdout."""
    print(f"{level} {text}", flush=True, file=sys.stderr if level == "E" else sys.stdout)


def wait() -> None:
    time.sleep(float(knob("ENCODE_MS") or 0) / 1000)
