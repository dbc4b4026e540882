"""What passes through the loop: frames of a source, notices about it, captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mmchat.record import Usage

if TYPE_CHECKING:
    import threading

    from PIL.Image import Image


@dataclass(frozen=True)
class Frame:
    """One picture of a source, not read yet.

    index: its number in the source, from 0.  time, duration: seconds from the source's start; how long it is shown.
    read: the picture in RGB, upright; raises ImageError or VideoError.  name: of a picture's file.
    at: when a live source delivered it (Unix time, s); None for others.
    """

    index: int
    time: float
    duration: float
    read: Callable[[], Image] = field(repr=False, compare=False)
    name: str = ""
    at: float | None = None


@dataclass(frozen=True)
class Shot:
    """A frame that was taken, and when the next one comes (s)."""

    frame: Frame
    end: float


@dataclass(frozen=True)
class Notice:
    """Something about a source that a user should know.  bad_frame: a frame was lost."""

    text: str
    bad_frame: bool = False


@runtime_checkable
class Source(Protocol):
    """Where frames come from; mmchat.video.sources.open_source makes one of a path or an address.

    name: for messages.  live: it does not wait for its reader, nor end.  length: seconds, where they are known.
    rate: frames per second on average, where it is known.
    """

    name: str
    live: bool
    length: float | None
    rate: float | None

    def times(self) -> list[float] | None:
        """The time of every frame in order, found without decoding; None where that is not possible."""

    def frames(self, stop: threading.Event) -> Iterator[Frame | Notice]:
        """The frames in order.  stop: ends the waiting of a source that waits."""


@dataclass(frozen=True)
class Caption:
    """What the model said about a frame, or about a window of frames.

    time, end: seconds from the source's start; end is the next sampled frame's time (of a live source, which nobody
        can look ahead in: the sampling interval later).
    index: number of the (first) frame in the source.  frames: frames in the window.  name: of a picture's file.
    carried: the picture is like the last one that was asked about; nothing was computed and text is that one's.
    digest: SHA-256 of the pixels.  drops: sampled frames of a live source that were passed over since the last
        caption.  skipped: bad frames since then.  at: Unix time of a live frame.
    thumbnail: a JPEG file, where it was asked for.
    """

    time: float
    end: float
    index: int
    text: str
    carried: bool
    digest: str
    drops: int = 0
    skipped: int = 0
    frames: int = 1
    name: str = ""
    stop_reason: str = "stop"
    at: float | None = None
    usage: Usage = field(default_factory=Usage)
    thumbnail: bytes | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the text is called "caption" there."""
        values = asdict(self)
        del values["thumbnail"]
        return {"caption" if name == "text" else name: value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Caption:
        """The opposite of to_dict.  Raises KeyError, TypeError or ValueError for what is none."""
        given = {"text" if name == "caption" else name: value for name, value in values.items()}
        known = {f.name for f in fields(cls)}
        usage = {f.name: given["usage"][f.name] for f in fields(Usage) if f.name in given["usage"]}
        made = cls(**{**{name: given[name] for name in known & set(given)}, "usage": Usage(**usage)})
        if not (isinstance(made.index, int) and isinstance(made.text, str) and isinstance(made.digest, str)):
            raise ValueError("not a caption")
        if not all(isinstance(seconds, (int, float)) for seconds in (made.time, made.end)):
            raise ValueError("not a caption")
        return made


def clock(seconds: float, *, decimal: str = ".") -> str:
    """00:01:02.500"""
    ms = max(0, round(seconds * 1000))
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{decimal}{ms % 1000:03}"
