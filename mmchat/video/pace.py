"""Which frames of a source are taken."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mmchat.errors import VideoError
from mmchat.video.values import Frame, Notice, Shot, Source

OFFICIAL_FRAMES = 64
_SLACK = 1e-6  # times are sums of fractions
_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Pace:
    """every: seconds from one frame to the next, 0 for all: the first frame at or after each multiple is taken.

    max_frames: at most so many: spread evenly over a source whose times are known, else the first ones.
    official: the published recipe for a video: one frame per second by counting frames, at most 64, spread evenly;
        every is not used then.
    """

    every: float = 1.0
    max_frames: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        """Raises VideoError."""
        if not (math.isfinite(self.every) and self.every >= 0):
            raise VideoError(f"every is {self.every:g} s; it must be 0 (every frame) or more")
        if self.max_frames is not None and self.max_frames < 1:
            raise VideoError(f"max_frames is {self.max_frames}; it must be at least 1")

    @property
    def most(self) -> int | None:
        """Frames taken, at most."""
        return self.max_frames or (OFFICIAL_FRAMES if self.official else None)

    def shots(self, items: Iterator[Frame | Notice], source: Source) -> Iterator[Shot | Notice]:
        """The frames that are taken of a source's; notices pass."""
        plan = None if source.live else self._plan(source)
        due = _on_grid(self.every) if plan is None else _on_list(plan)
        if source.live:
            return _live(items, due, self.every)
        return _looking_ahead(items, due, self.most if plan is None else None)

    def _plan(self, source: Source) -> list[float] | None:
        """The times of the frames to take, where all times can be known beforehand and matter."""
        times = source.times() if self.official or self.max_frames else None
        if times is None:
            return None
        due = _on_grid(self.every)
        taken = official_times(times, source.rate) if self.official else [time for time in times if due(time)]
        return spread(taken, self.most or len(taken))


def official_times(times: Sequence[float], rate: float | None) -> list[float]:
    """Every n-th frame's, where n is the rate rounded half to even, as the published example counts."""
    return list(times[:: max(1, round(rate or 1.0))])


def spread(times: Sequence[float], most: int) -> list[float]:
    """At most so many of them: the middles of equal parts, as the published example takes them."""
    if len(times) <= most:
        return list(times)
    gap = len(times) / most
    return [times[int(i * gap + gap / 2)] for i in range(most)]


def seconds_of(text: str) -> float:
    """ "2", "2s", "500ms", "1.5m", "1h" in seconds.  Raises VideoError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|min|m|h|)\s*", text, re.ASCII)
    if not found:
        raise VideoError(f"{text!r} is no time; write 2s, 500ms or 1m")
    return float(found[1]) * _UNITS[found[2]]


_Due = Callable[[float], bool]  # asked of growing times: whether one that is wanted has come


def _on_grid(every: float) -> _Due:
    number = 0

    def due(time: float) -> bool:
        nonlocal number
        if every == 0:
            return True
        if time < number * every - _SLACK:
            return False
        number = math.floor((time + _SLACK) / every) + 1
        return True

    return due


def _on_list(wanted: Sequence[float]) -> _Due:
    place = 0

    def due(time: float) -> bool:
        nonlocal place
        reached = bisect.bisect_right(wanted, time + _SLACK)
        fresh, place = reached > place, max(place, reached)
        return fresh

    return due


def _live(items: Iterator[Frame | Notice], due: _Due, every: float) -> Iterator[Shot | Notice]:
    for item in items:
        if isinstance(item, Notice):
            yield item
        elif due(item.time):
            yield Shot(item, item.time + max(every, item.duration))


def _looking_ahead(items: Iterator[Frame | Notice], due: _Due, most: int | None) -> Iterator[Shot | Notice]:
    """A frame goes on when the next one that is taken is known."""
    held: Frame | None = None
    end, taken = 0.0, 0
    for item in items:
        if isinstance(item, Notice):
            yield item
            continue
        if due(item.time):
            if held is not None:
                yield Shot(held, max(item.time, held.time))
                held = None
            if taken == most:
                return
            held, taken = item, taken + 1
        end = item.time + item.duration
    if held is not None:
        yield Shot(held, max(end, held.time))
