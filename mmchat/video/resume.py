"""What an earlier run made of a source: known captions are not made again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from mmchat.errors import VideoError
from mmchat.video.values import Caption, clock


class Before:
    """What an earlier run made of a source that can be read again."""

    def __init__(self, captions: Iterable[Caption]) -> None:
        self._captions = iter(captions)
        self._next = next(self._captions, None)

    @property
    def left(self) -> bool:
        """Whether the source has not been read up to the last of them."""
        return self._next is not None

    def look_up(self, index: int, digest: str) -> tuple[bool, Caption | None]:
        """Whether the earlier run passed here, and the caption that it kept.  Raises VideoError."""
        known = self._next
        if known is None:
            return False, None
        if index < known.index:
            return True, None
        if index > known.index or digest != known.digest:
            raise VideoError(
                f"there is a caption of frame {known.index} ({clock(known.time)}), which this source does not have: "
                "it was made of another source, or with other settings"
            )
        self._next = next(self._captions, None)
        return True, known

    def shifted(self, caption: Caption) -> Caption:
        """As a part of the whole."""
        return caption

    def check_reached(self, name: str) -> None:
        """Raises VideoError where the source ended before the last of them."""
        if self._next is not None:
            raise VideoError(f"{name}: ends before frame {self._next.index}, of which there is a caption already")


class BeforeLive(Before):
    """A live source is not read again: times and numbers go on."""

    def __init__(self, captions: Iterable[Caption]) -> None:
        super().__init__(())
        last = deque(captions, maxlen=1)
        self._index, self._time = 0, 0.0
        if last:
            since = time.time() - (last[0].at or time.time())
            self._index, self._time = last[0].index + 1, max(last[0].end, last[0].time + since)

    def shifted(self, caption: Caption) -> Caption:
        return replace(
            caption,
            index=caption.index + self._index,
            time=round(caption.time + self._time, 6),
            end=round(caption.end + self._time, 6),
        )
