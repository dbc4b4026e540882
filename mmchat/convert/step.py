"""What one conversion takes, said beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmchat.outputs import describe_bytes, free_bytes

# (what is being written, done, of how many)
Progress = Callable[[str, int, int], None]

# An ordinary SSD, reading and writing the same bytes.  An SD card takes ten times as long.
COPIED_BYTES_PER_S = 300e6


@dataclass(frozen=True)
class Estimate:
    """reads, writes, memory: bytes.  seconds: on an ordinary PC; an order of magnitude, not a promise."""

    reads: int
    writes: int
    memory: int
    seconds: float

    def describe(self, target: Path) -> str:
        """One line; target: where the result goes."""
        return (
            f"reads {describe_bytes(self.reads)}, writes {describe_bytes(self.writes)} "
            f"({describe_bytes(free_bytes(target))} free), takes about {_duration(self.seconds)} "
            f"and {describe_bytes(self.memory)} of memory"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes"
