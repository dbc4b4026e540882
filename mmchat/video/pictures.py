"""Sources made of single pictures: files, and whatever a program hands over."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmchat.errors import ImageError, VideoError
from mmchat.images import SUFFIXES, read_image
from mmchat.video.values import Frame, Notice

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmchat.images import ImageSource


class Pictures:
    """Picture files, one per second."""

    live: bool = False
    rate: float | None = 1.0
    length: float | None

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        """Raises VideoError where there is none."""
        if not paths:
            raise VideoError(f"{name}: no pictures there ({', '.join(sorted(SUFFIXES))})")
        self.name, self._paths = name, sorted(paths, key=_as_people_count)
        self.length = float(len(paths))

    def times(self) -> list[float] | None:
        return [float(number) for number in range(len(self._paths))]

    def frames(self, stop: threading.Event) -> Iterator[Frame | Notice]:
        for number, path in enumerate(self._paths):
            name = path.name.encode(errors="backslashreplace").decode()
            yield Frame(number, float(number), 1.0, partial(read_image, path), name)


class Arrays:
    """Pictures that an iterator yields: whatever mmchat.images.open_image takes, or (seconds, picture).

    rate: pictures per second where no seconds are given.  live: the iterator does not wait: the newest picture wins,
    and times are those of its coming.
    """

    rate: float | None
    length: float | None = None

    def __init__(
        self, pictures: Iterable[Any], *, rate: float = 1.0, live: bool = False, name: str = "the iterator"
    ) -> None:
        """Raises VideoError: an impossible rate, or one picture where several are needed."""
        if not (math.isfinite(rate) and rate > 0):
            raise VideoError(f"rate is {rate!r}; it must be a number of pictures per second above 0")
        shape: tuple[int, ...] = pictures.shape if isinstance(pictures, np.ndarray) else ()
        if len(shape) == 2 or (len(shape) == 3 and shape[2] <= 4):
            raise VideoError(f"an array of shape {shape} is one picture: give a list of pictures")
        self.name, self.live, self.rate = name, live, rate
        self._pictures, self._shown = pictures, 1 / rate

    def times(self) -> list[float] | None:
        return None

    def frames(self, stop: threading.Event) -> Iterator[Frame | Notice]:
        began = time.monotonic()
        for number, item in enumerate(self._pictures):
            if stop.is_set():
                return
            seconds, picture = _timed(item, number * self._shown)
            if not self.live and not math.isfinite(seconds):
                yield Notice(f"{self.name}: picture {number} skipped: its time is {seconds}", bad_frame=True)
                continue
            read = _reader(picture)
            if self.live:
                yield Frame(number, time.monotonic() - began, 0.0, read, at=time.time())
            else:
                yield Frame(number, seconds, self._shown, read)


def _timed(item: Any, seconds: float) -> tuple[float, ImageSource]:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Real):
        return float(item[0]), item[1]
    return seconds, item


def _reader(picture: Any) -> Callable[[], Image]:
    """Reads it later, when its owner may have the next picture in the same place: so that is copied or read now.

    Not so a picture file that PIL has only opened: it stays what it is, and is decoded if it is wanted.
    """
    from PIL.Image import Image

    if isinstance(picture, (np.ndarray, bytearray)):
        picture = picture.copy()
    elif isinstance(picture, Image) and _may_change(picture):
        try:
            image = read_image(picture)
        except ImageError as error:
            return partial(_refuse, error)
        kept = image.copy() if image is picture else image
        return lambda: kept
    return partial(read_image, picture)


def _may_change(picture: Image) -> bool:
    try:
        return not getattr(picture, "tile", None) or bool(getattr(picture, "is_animated", False))
    except Exception:  # damaged behind the first frame, which is what there is then
        return False


def _refuse(error: ImageError) -> Image:
    raise error


def _as_people_count(path: Path) -> list[tuple[int, int, str]]:
    """frame2 before frame10."""
    parts = re.split(r"(\d+)", os.fspath(path))
    return [(0, int(part), part) if part.isascii() and part.isdecimal() else (1, 0, part) for part in parts]
