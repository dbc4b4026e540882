"""The pictures of the standard conversations: a few plain shapes over grain, all of it from one seed.

The grain is there because a plain area would be the same slice many times over, as no photo is.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from mmchat.slicing import Size

_COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "gray")
# In views of 112 pixels, the demo model's: 5, 7, 1, 7, 3, 9 and 5 of them.
_SIZES: tuple[Size, ...] = ((224, 224), (336, 224), (100, 100), (224, 336), (224, 112), (448, 224), (250, 200))


def draw(seed: int, size: Size | None = None) -> Image.Image:
    """The picture of a seed, in the size that goes with it unless one is given."""
    random = Random(seed)
    width, height = size or _SIZES[seed % len(_SIZES)]
    background, *colors = random.sample(_COLORS, 4)
    image = Image.new("RGB", (width, height), background)
    pen = ImageDraw.Draw(image)
    side = min(width, height) / 3
    for color in colors[: random.randint(1, 3)]:
        left, top = random.uniform(0, width - side), random.uniform(0, height - side)
        shape = random.choice((pen.ellipse, pen.rectangle))
        shape((left, top, left + side, top + side), fill=color)
    grain = np.random.default_rng(seed).integers(-6, 7, (height, width, 1))
    return Image.fromarray((np.asarray(image, np.int16) + grain).clip(0, 255).astype(np.uint8))
