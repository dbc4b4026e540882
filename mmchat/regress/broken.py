"""What can be wrong: one kind of error per property, so that a failure does not shrink into another one."""

from __future__ import annotations

PROPERTIES = {
    "crash": "no run crashes, hangs or fails",
    "counts": "counts add up",
    "cap": "nothing longer than the context reaches the engine, and nothing that fits is refused",
    "answers": "the same record gets the same greedy answer",
    "pictures": "cached and fresh pictures agree",
    "strategies": "every way to use the KV cache gives the same answers",
}


class Broken(AssertionError):
    """A property does not hold.  property: key of PROPERTIES.  rows: of the request that crashed, else 0."""

    property = ""

    def __init__(self, what: str, rows: int = 0) -> None:
        self.rows = rows
        super().__init__(" ".join(what.split()))


class Crashed(Broken):
    property = "crash"


class CountsWrong(Broken):
    property = "counts"


class CapExceeded(Broken):
    property = "cap"


class AnswersDiffer(Broken):
    property = "answers"


class PicturesDiffer(Broken):
    property = "pictures"


class StrategiesDiffer(Broken):
    property = "strategies"
