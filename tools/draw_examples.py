"""Draw the pictures in examples/pictures.

    python tools/draw_examples.py [FOLDER]

Shapes in plain colours, which the demo model knows, and one large picture whose print is too small to be read from
the overview alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def shapes() -> Image.Image:
    image = Image.new("RGB", (224, 224), (45, 75, 215))
    draw = ImageDraw.Draw(image)
    draw.ellipse((78, 78, 146, 146), fill=(215, 40, 40))
    draw.rectangle((10, 10, 66, 66), fill=(240, 220, 50))
    return image


def garden() -> Image.Image:
    image = Image.new("RGB", (200, 150), (40, 160, 60))
    draw = ImageDraw.Draw(image)
    draw.polygon([(165, 8), (190, 42), (140, 42)], fill=(245, 245, 245))
    draw.polygon([(33, 104), (52, 125), (33, 146), (14, 125)], fill=(140, 50, 170))
    return image


def sign() -> Image.Image:
    """1008 x 672 with one word 32 pixels high: 11 in the grid's cells, 4 in the overview."""
    image = Image.new("RGB", (1008, 672), (245, 245, 245))
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 420, 260, 620), fill=(215, 40, 40))
    draw.rectangle((740, 60, 940, 260), fill=(45, 75, 215))
    font = ImageFont.load_default(44)
    draw.text((420, 100), "EXIT", font=font, fill=(20, 20, 20))
    return image


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "examples/pictures")
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (shapes, garden, sign):
        draw().save(folder / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
