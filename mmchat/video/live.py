"""Cameras and streams: they do not wait, they break off, and they come back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from mmchat.errors import VideoError
from mmchat.video.decoding import NETWORK, Opened, public, reader
from mmchat.video.values import Frame, Notice

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0


class Stream:
    """A V4L2 camera (/dev/video0), or an RTSP or HTTP address.

    It is opened when it is made, so that a wrong address is an error at once.  From then on whatever happens to it
    is a notice, and it is opened again: after 1 s, 2 s, 4 s ... 30 s.
    """

    live: bool = True
    length: float | None = None

    def __init__(self, place: str, *, opened: Opened | None = None) -> None:
        """opened: it already.  Raises VideoError."""
        self.name = public(place)
        self._place = place
        self._opened: Opened | None = opened or open_live(place)
        self.rate = self._opened.rate

    def times(self) -> list[float] | None:
        return None

    def frames(self, stop: threading.Event) -> Iterator[Frame | Notice]:
        began, index, wait_s = time.monotonic(), 0, FIRST_WAIT_S
        while not stop.is_set():
            why = "it ended"
            try:
                opened, self._opened = self._opened or open_live(self._place), None
                with contextlib.closing(opened.container):
                    for item in opened.frames(stop):
                        wait_s = FIRST_WAIT_S
                        if isinstance(item, str):
                            yield Notice(f"{self.name}: frame {index} skipped: {item}", bad_frame=True)
                        else:
                            read = reader(item, f"{self.name}: frame {index}")
                            yield Frame(index, time.monotonic() - began, 0.0, read, at=time.time())
                        index += 1
            except VideoError as error:
                why = str(error).removeprefix(f"{self.name}: ")
            if stop.is_set():
                return
            yield Notice(f"{self.name}: {why}; trying again in {wait_s:g} s")
            stop.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def open_live(place: str) -> Opened:
    """Raises VideoError."""
    name = public(place)
    if place.startswith("/dev/"):
        return Opened(place, name, format="v4l2", options={})
    # Few frames are enough to know the codec; a camera of one frame per second would keep us for minutes otherwise.
    options = {"protocol_whitelist": NETWORK, "fpsprobesize": "0", "analyzeduration": "2000000"}
    if place.lower().startswith("rtsp"):
        options["rtsp_transport"] = "tcp"
    return Opened(place, name, options=options)
