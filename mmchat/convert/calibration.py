"""Pictures that a conversion is calibrated and checked with, cut as a chat would cut them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmchat.errors import ModelDirError
from mmchat.images import read_image
from mmchat.slicing import plan_slices, slice_image

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
# Width and height of pictures that are drawn where none are given: square, wide, tall, small; as shares of a view.
_DRAWN = ((1.0, 1.0), (3.1, 1.7), (0.9, 2.6), (0.4, 0.3))


def pictures_in(folder: Path) -> list[Path]:
    """Raises ModelDirError: no folder, or no pictures in it."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise ModelDirError(
            f"{folder}: cannot be read ({error.strerror or error}); give a folder of pictures"
        ) from None
    if not found:
        raise ModelDirError(f"{folder}: has no pictures; give a folder with some of those that the board will see")
    return found


def drawn_pictures(side: int) -> Iterator[Image]:
    """A few of every shape: soft random colours.  side: of a square view, in pixels."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for width, height in _DRAWN:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        yield coarse.resize((max(1, round(width * side)), max(1, round(height * side))), Image.Resampling.BICUBIC)


def views(picture: Path | Image, *, side: int, patch_size: int, n: int) -> list[NDArray[np.uint8]]:
    """The encoder inputs that a picture is cut into, none above n patches.  side: of a square view, in pixels."""
    image = read_image(picture)
    plan = plan_slices(*image.size, scale_resolution=side, patch_size=patch_size, max_patches=n)
    return slice_image(image, plan)
