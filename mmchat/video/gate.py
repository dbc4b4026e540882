"""Whether a picture differs from the last one that was asked about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmchat.errors import VideoError

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 32
# A cell is the mean of many pixels: sensor noise and compression stay below this, in any lit scene.
_LEVELS = 24


class Gate:
    """Lets pictures through of which enough has changed.

    changed: the share of the picture, from 0 (all go through) to 1.  The picture is laid out in 32 x 32 cells; a cell
        has changed where the mean of a colour channel moved by more than 24 of 255 levels.  Pictures are compared
        with the last one that went through, not with their neighbour, so slow changes add up.
    """

    def __init__(self, changed: float) -> None:
        """Raises VideoError."""
        if not 0 <= changed <= 1:
            raise VideoError(f"changed is {changed:g}; it must be a share of the picture, from 0 to 1")
        self._changed = changed
        self._last: tuple[tuple[int, int], NDArray[np.int16]] | None = None

    def lets(self, image: Image) -> bool:
        """Whether the picture goes through; the next ones are then compared with it."""
        if not self._changed:
            return True
        seen = image.size, _cells(image)
        if self._last is not None and self._last[0] == seen[0]:
            moved = np.abs(seen[1] - self._last[1]).max(axis=2) > _LEVELS
            if moved.mean() < self._changed:
                return False
        self._last = seen
        return True


def _cells(image: Image) -> NDArray[np.int16]:
    """(32, 32, 3) mean levels."""
    from PIL import Image as pil

    return np.asarray(image.resize((_SIDE, _SIDE), pil.Resampling.BOX), np.int16)
