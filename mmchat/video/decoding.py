"""Containers that PyAV opens -> frames, with times that only grow; what is damaged becomes a notice."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from mmchat.errors import VideoError
from mmchat.images import MAX_PIXELS
from mmchat.video.values import Frame, Notice

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

# A playlist or a container may name further addresses: it is kept to the kind it came by itself.
NETWORK = "http,https,tcp,tls,crypto,hls,rtsp,rtp,udp"
_USUAL_RATE = 25.0
OPEN_S, SILENCE_S = 20.0, 10.0
# Packets whose times fall by more belong to another recording that was put behind the first; by less, to disorder.
_BEGINS_ANEW_S = 1.0


def is_address(text: str) -> bool:
    """Whether it is one of the network addresses that can be opened.  Raises VideoError for another kind of one."""
    scheme, found, _ = text.partition("://")
    if not found:
        return False
    if scheme.lower() not in ("http", "https", "rtsp", "rtsps"):
        raise VideoError(f"{public(text)}: {scheme}:// is not known; rtsp, rtsps, http and https are")
    return True


def public(address: str) -> str:
    """An address without the password that may be in it."""
    try:
        parts = urlsplit(address)
        if not parts.password:
            return address
        return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}"))
    except ValueError:
        return "an address that is none"


class Opened:
    """A container and its first picture track.

    length: seconds, where the container tells.  rate: frames per second on average, likewise.
    """

    def __init__(self, place: str, name: str, *, format: str | None = None, options: dict[str, str]) -> None:
        """place: as FFmpeg names it.  Raises VideoError."""
        av = _av()
        with damage_told(name):
            self.container: InputContainer = av.open(
                place, format=format, options=options, timeout=(OPEN_S, SILENCE_S), metadata_errors="replace"
            )
        tracks = [track for track in self.container.streams.video if track.codec_context]  # None: an unknown codec
        if not tracks:
            self.container.close()
            raise VideoError(f"{name}: holds no moving pictures that can be decoded")
        self.stream: VideoStream = tracks[0]
        self.stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self.rate = float(self.stream.average_rate) if self.stream.average_rate else None
        self.length = self._length()

    def times(self) -> list[float]:
        """The time of every frame in order, as clock() tells it, from the container's packets; nothing is decoded."""
        base, start = self._base()
        gap = 1 / (self.rate or _USUAL_RATE)
        parts: list[list[float]] = [[]]
        decoded = -math.inf  # when, which is in order within a part
        with contextlib.suppress(_av().FFmpegError):
            for packet in self.container.demux(self.stream):
                if packet.pts is None:
                    continue
                if packet.dts is not None:
                    if packet.dts * base < decoded - _BEGINS_ANEW_S:
                        parts.append([])
                    decoded = packet.dts * base
                parts[-1].append((packet.pts - start) * base)
            times: list[float] = []
            shift = 0.0
            for part in map(sorted, filter(None, parts)):
                if times and part[0] + shift < times[-1]:
                    shift = times[-1] + gap - part[0]
                times += [time + shift for time in part]
            return times
        return []

    def frames(self, stop: threading.Event) -> Iterator[VideoFrame | str]:
        """The frames, and in the place of one that cannot be decoded, why.  Raises VideoError where reading fails."""
        av = _av()
        with damage_told("", prefix=False):
            for packet in self.container.demux(self.stream):
                if stop.is_set():
                    return
                try:
                    for frame in packet.decode():
                        yield "damaged" if frame.is_corrupt else frame
                except (av.FFmpegError, ValueError, MemoryError) as error:
                    yield _reason(error)

    def clock(self) -> Callable[[VideoFrame], float]:
        """Says when a frame is shown: seconds from the start, never less than before."""
        base, start = self._base()
        gap = 1 / (self.rate or _USUAL_RATE)
        last, shift = -gap, 0.0

        def time(frame: VideoFrame) -> float:
            nonlocal last, shift
            now = last + gap if frame.pts is None else (frame.pts - start) * base + shift
            if now < last:  # the numbers began anew
                shift += last + gap - now
                now = last + gap
            last = max(0.0, now)
            return last

        return time

    def _base(self) -> tuple[float, int]:
        """Seconds per tick of the track, and the tick it begins with."""
        return float(self.stream.time_base or 0), self.stream.start_time or 0

    def _length(self) -> float | None:
        if self.stream.duration:
            return self.stream.duration * self._base()[0]
        return self.container.duration / 1_000_000 if self.container.duration else None


class Video:
    """A video file, or one at an address."""

    live: bool = False

    def __init__(self, place: str, name: str) -> None:
        """Raises VideoError: missing, not a video, damaged at its head."""
        self.name = name
        self._place = place
        opened = self._open()
        self.length, self.rate = opened.length, opened.rate
        opened.container.close()

    def times(self) -> list[float] | None:
        opened = self._open()
        with contextlib.closing(opened.container):
            return opened.times() or None

    def frames(self, stop: threading.Event) -> Iterator[Frame | Notice]:
        opened = self._open()
        with contextlib.closing(opened.container):
            yield from self._frames(opened, stop)

    def _frames(self, opened: Opened, stop: threading.Event) -> Iterator[Frame | Notice]:
        time_of = opened.clock()
        time = end = 0.0
        index = -1
        try:
            for index, item in enumerate(opened.frames(stop)):
                if isinstance(item, str):
                    yield Notice(f"{self.name}: frame {index} (after {end:.2f} s) skipped: {item}", bad_frame=True)
                    continue
                time = time_of(item)
                shown = duration_of(item, opened.rate)
                end = time + shown
                yield Frame(index, time, shown, reader(item, f"{self.name}: frame {index}"))
        except VideoError as error:
            yield Notice(f"{self.name}: cannot be read on after {end:.2f} s ({error})")
        if opened.stream.duration and opened.length and end < opened.length - 1:
            yield Notice(f"{self.name}: ends after {end:.2f} s of {opened.length:.2f}; it is cut off or damaged")

    def _open(self) -> Opened:
        protocols = "file" if self._place.startswith("file:") else NETWORK
        return Opened(self._place, self.name, options={"protocol_whitelist": protocols})


def duration_of(frame: VideoFrame, rate: float | None) -> float:
    """Seconds that a frame is shown."""
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    return 1 / (rate or _USUAL_RATE)


def reader(frame: VideoFrame, name: str) -> Callable[[], Image]:
    """Makes the picture of a decoded frame, upright.  Calling it raises VideoError."""

    def read() -> Image:
        from PIL import Image as pil

        if frame.width * frame.height > MAX_PIXELS:
            raise VideoError(f"{name}: {frame.width}x{frame.height} is over the limit of {MAX_PIXELS:,} pixels")
        with damage_told(name):
            image = pil.fromarray(frame.to_ndarray(format="rgb24"))
        turns = (None, pil.Transpose.ROTATE_90, pil.Transpose.ROTATE_180, pil.Transpose.ROTATE_270)
        turn = turns[round(frame.rotation / 90) % 4]  # counter-clockwise, as PIL counts too
        return image if turn is None else image.transpose(turn)

    return read


@contextlib.contextmanager
def damage_told(name: str, *, prefix: bool = True) -> Iterator[None]:
    """Whatever FFmpeg or PyAV raises becomes one VideoError."""
    av = _av()
    try:
        yield
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError, IndexError) as error:
        raise VideoError(f"{name}: {_reason(error)}" if prefix else _reason(error)) from None


def _reason(error: BaseException) -> str:
    """In words, without the address, which may hold a password."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return {"Immediate exit requested": "no answer in time"}.get(text, text)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise VideoError("videos and cameras need the package av: pip install av") from None
    return av
