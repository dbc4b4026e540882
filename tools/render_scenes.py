"""Pictures with known content: a background, up to four shapes, and a printed word or number.

The demo model is trained on these, and tests, evaluations, benchmarks and video tools draw from them.  A `Scene` is
the whole truth about a picture; `draw` makes the picture from it and from nothing else, so equal scenes give equal
pixels.  `sample_scene` invents scenes, `plain_scene` makes one to order.  tools.scene_talk asks about them.

Held out: a scene belongs to evaluation when the CRC-32 of its facts (background, shapes with positions, text) is
divisible by 16.  `sample_scene` draws from one side of that line only, whatever the seed, so training never meets
the facts of a held-out scene.  Held-out scenes print in Pillow's built-in font alone, to look the same everywhere
(Pillow with FreeType, which all wheels have).

This module knows no model and no tokenizer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmchat.slicing import SlicePlan, plan_slices

RGB = tuple[int, int, int]
Size = tuple[int, int]
Box = tuple[float, float, float, float]

# The first value is what plain_scene uses; people who draw their own test pictures use the others.
COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (215, 40, 40), (220, 20, 60), (200, 0, 0)),
    "green": ((0, 128, 0), (40, 160, 60), (0, 255, 0), (34, 139, 34), (0, 200, 0)),
    "blue": ((0, 0, 255), (45, 75, 215), (30, 60, 200), (65, 105, 225)),
    "yellow": ((255, 255, 0), (240, 220, 50), (255, 235, 0)),
    "orange": ((255, 165, 0), (245, 140, 30), (255, 140, 0)),
    "purple": ((128, 0, 128), (140, 50, 170), (160, 32, 240)),
    "black": ((0, 0, 0), (20, 20, 20)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "gray": ((128, 128, 128), (140, 140, 140), (110, 110, 110), (169, 169, 169)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
_LEXICON = (
    "STOP GO EXIT OPEN CAT DOG SUN MOON FISH BIRD TREE HOME CAR BUS TAXI HELLO YES NO HOT COLD MILK TEA CAKE "
    "SALE SHOP BANK PARK HOTEL CAFE NEWS TIME LOVE KEY BOX ZERO QUIZ JAZZ FOX WAVE VOTE "
    "BREAD APPLE WATER HOUSE GREEN LIGHT MUSIC PIZZA RIVER STAR WORLD PUSH PULL CLOSED FREE MENU"
)
WORDS = tuple(_LEXICON.split())
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The encoder's view that the demo model was made for (config.json of the demo model).
SCALE_RESOLUTION = 112
PATCH_SIZE = 14
# Font sizes in a view's pixels: training asks for text from the first on, and calls it too small up to the second.
# Chosen, not measured; nothing is asked about what lies between.
READABLE_PX = 11.0
UNREADABLE_PX = 8.5

DEFAULT_FONT = "default"
_DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
_OTHER_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf")
_SINGLE_SIZES: tuple[Size, ...] = (
    (112, 112), (112, 112), (100, 100), (96, 96), (128, 96), (96, 128), (140, 84), (84, 140), (104, 112), (90, 120),
    (64, 64), (100, 120),
)  # fmt: skip
_COMMON_SIZES: tuple[Size, ...] = (
    (200, 200), (224, 224), (256, 256), (300, 200), (200, 300), (300, 300), (320, 240), (240, 320), (400, 300),
    (336, 336), (336, 224), (224, 336), (200, 150), (150, 150), (448, 448), (400, 400), (512, 512), (480, 320),
    (640, 480), (800, 600), (1008, 672), (256, 128), (128, 256), (448, 224),
)  # fmt: skip
_HELD_OUT_SHARE = 16
_MAX_SAMPLED_TURN = 0.12  # radians


@dataclass(frozen=True)
class Shape:
    """center and radius in pixels (the radius of the circle that the shape about fills); turn in radians."""

    kind: str
    color: str
    cell: int
    center: tuple[float, float]
    radius: float
    rgb: RGB
    turn: float = 0.0

    @property
    def position(self) -> str:
        """Where it is, as a name in POSITIONS."""
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Print:
    """A printed word or number.  corner: left and top edge of its ink box in pixels; font_px as fonts are named."""

    text: str
    corner: tuple[int, int]
    font_px: int
    rgb: RGB
    font: str = DEFAULT_FONT

    @property
    def kind(self) -> str:
        return "number" if self.text.isdigit() else "word"

    @property
    def box(self) -> Box:
        """Left, top, right, bottom of the ink, in pixels."""
        width, height, _ = _ink(self.font, self.font_px, self.text)
        left, top = self.corner
        return float(left), float(top), left + width, top + height

    @property
    def letters(self) -> list[tuple[str, float, float]]:
        """Every character with its centre (x, y) in pixels."""
        left, top, _, bottom = self.box
        edges = _edges(self.font, self.font_px, self.text)
        return [(c, left + (edges[i] + edges[i + 1]) / 2, (top + bottom) / 2) for i, c in enumerate(self.text)]


@dataclass(frozen=True)
class Scene:
    """All that is in a picture.

    noise: standard deviation in gray levels; noise_seed says which noise.  more_text: further prints, for teaching
    the tower to read; no question is asked about a scene that has them.
    """

    size: Size
    background: str
    background_rgb: RGB
    shapes: tuple[Shape, ...] = ()
    text: Print | None = None
    smooth: bool = False
    noise: int = 0
    noise_seed: int = field(default=0, compare=False)
    more_text: tuple[Print, ...] = ()

    @property
    def texts(self) -> tuple[Print, ...]:
        return ((self.text,) if self.text else ()) + self.more_text

    @property
    def facts(self) -> str:
        """What can be asked about, as one line; equal lines are the same question paper."""
        shapes = sorted(f"{s.color} {s.kind} {s.position}" for s in self.shapes)
        return "; ".join([self.background, *shapes, self.text.text if self.text else "-"])

    @property
    def held_out(self) -> bool:
        """Whether the scene belongs to evaluation (see the module's text)."""
        return zlib.crc32(self.facts.encode()) % _HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Style:
    """What sample_scene draws from.

    size: of the picture; None: any.  sliced: only pictures that are cut (True) or never (False); None: both.
    text: what is printed ("" for nothing); None: chance decides with p_text.  print_size: "small" is read in a cell
    only, "large" in the whole view as well; None: both.  spelling: random letters and digits too, not only WORDS and
    numbers as they come.  p_more_text: how often further texts fill the picture.  p_like: how often a shape has the
    colour or the kind of an earlier one, on top of what chance gives.
    """

    size: Size | None = None
    sliced: bool | None = None
    n_shapes: int | None = None
    max_shapes: int = 4
    background: str | None = None
    text: str | None = None
    p_text: float = 0.55
    p_sliced: float = 0.65
    print_size: str | None = None
    spelling: bool = False
    p_more_text: float = 0.0
    p_like: float = 0.0


def render(seed: int | Random, style: Style | None = None, *, held_out: bool = True) -> tuple[Image.Image, Scene]:
    """A picture and its scene; the same seed gives the same bytes."""
    rng = seed if isinstance(seed, Random) else Random(f"scene {held_out} {seed}")
    scene = sample_scene(rng, style, held_out=held_out)
    return draw(scene), scene


def sample_scene(rng: Random, style: Style | None = None, *, held_out: bool) -> Scene:
    """A scene of one side of the held-out line; where the style fixes all facts, give held_out=scene.held_out."""
    style = style or Style()
    for _ in range(2000):
        scene = _invent(rng, style, held_out)
        if scene is not None and scene.held_out == held_out:
            return scene
    raise ValueError(f"no {'held-out' if held_out else 'training'} scene in 2000 tries fits {style}")


def plain_scene(
    size: Size,
    background: str,
    shapes: Sequence[tuple[str, str, str]] = (),
    *,
    text: str = "",
    font_px: int = 16,
    corner: Size | None = None,
    radius: float | None = None,
) -> Scene:
    """A scene to order: no noise, first colours of COLORS, shapes as (colour, kind, position).

    radius: of the shapes, in parts of the shorter side (a lone shape in the center: 0.3, else 0.13).
    corner: of the text's ink; by default it is centred near the bottom, or in the middle where no shape is.
    """
    width, height = size
    side = min(size)
    placed = []
    for color, kind, position in shapes:
        cell = POSITIONS.index(position)
        part = radius if radius is not None else (0.3 if len(shapes) == 1 and position == "center" else 0.13)
        center = (width * (1 + 2 * (cell % 3)) / 6, height * (1 + 2 * (cell // 3)) / 6)
        placed.append(Shape(kind, color, cell, center, part * side, COLORS[color][0]))
    printed = None
    if text:
        black = luminance(COLORS[background][0]) > 127
        printed = Print(text, (0, 0), font_px, (0, 0, 0) if black else (255, 255, 255))
        _, _, text_w, text_h = printed.box
        if corner is None:
            corner = (round((width - text_w) / 2), round(height * (0.8 if shapes else 0.5) - text_h / 2))
        printed = Print(text, corner, font_px, printed.rgb)
    ordered = tuple(sorted(placed, key=lambda s: s.cell))
    return Scene(size, background, COLORS[background][0], ordered, printed)


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB."""
    scale = 2 if scene.smooth else 1
    width, height = scene.size
    image = Image.new("RGB", (width * scale, height * scale), scene.background_rgb)
    pen = ImageDraw.Draw(image)
    for printed in scene.texts:
        font = _font(printed.font, printed.font_px * scale)
        _, _, top = _ink(printed.font, printed.font_px * scale, printed.text)
        x, y = printed.corner
        pen.text((x * scale, y * scale - top), printed.text, font=font, fill=printed.rgb)
    for shape in scene.shapes:
        _draw_shape(pen, shape, scale)
    if scene.smooth:
        image = image.resize(scene.size, Image.Resampling.BOX)
    if scene.noise:
        grain = np.random.default_rng(scene.noise_seed).standard_normal((height, width, 1), dtype=np.float32)
        noisy = np.asarray(image, dtype=np.float32) + grain * scene.noise
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    return image


def view_plan(size: Size, max_slice_nums: int = 9) -> SlicePlan:
    """How the demo model cuts a picture of that size."""
    return plan_slices(*size, max_slice_nums=max_slice_nums, scale_resolution=SCALE_RESOLUTION, patch_size=PATCH_SIZE)


def view_boxes(plan: SlicePlan) -> list[Box]:
    """What part of the picture each encoder input shows: left, top, right, bottom in the picture's pixels."""
    width, height = plan.size
    boxes: list[Box] = [(0.0, 0.0, float(width), float(height))]
    columns, rows = plan.grid or (0, 0)
    for row in range(rows):
        for column in range(columns):
            left, top = width * column / columns, height * row / rows
            boxes.append((left, top, left + width / columns, top + height / rows))
    return boxes


def seen_font_px(scene: Scene, plan: SlicePlan) -> float:
    """Font size of the text in the view that shows it whole and largest; 0 where there is no text."""
    if scene.text is None:
        return 0.0
    best = 0.0
    left, top, right, bottom = scene.text.box
    for box, size in zip(view_boxes(plan), plan.input_sizes, strict=True):
        if left >= box[0] - 1 and top >= box[1] - 1 and right <= box[2] + 1 and bottom <= box[3] + 1:
            scale = min(size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1]))
            best = max(best, scene.text.font_px * scale)
    return best


def luminance(rgb: RGB) -> float:
    """0 (black) to 255 (white), as the eye weighs the channels."""
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def random_text(rng: Random, spelling: bool = False) -> str:
    """A word of WORDS or a number of one to three digits; with spelling, mostly what words do not teach.

    That is random letters, and numbers in which digits repeat: 43, 433 and 443 are told apart late.
    """
    drawn = rng.random() if spelling else 1.0
    if drawn < 0.2:
        return "".join(rng.choice(CHARACTERS[10:]) for _ in range(rng.randint(2, 5)))
    if drawn < 0.6:
        digits = rng.choice(CHARACTERS[1:10])
        for _ in range(rng.choice((1, 2, 2))):
            digits += digits[-1] if rng.random() < 0.25 else rng.choice(CHARACTERS[:10])
        return digits
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    n_digits = rng.choice((1, 2, 2, 3, 3, 3))
    return str(rng.randint(10 ** (n_digits - 1) if n_digits > 1 else 0, 10**n_digits - 1))


@lru_cache(maxsize=512)
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px) if name == DEFAULT_FONT else ImageFont.truetype(_DEJAVU / name, size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow has no FreeType: install a wheel from PyPI")
    return font


@lru_cache(maxsize=20000)
def _ink(name: str, size_px: int, text: str) -> tuple[float, float, float]:
    """Advance width, height of the ink, and how far the ink lies below the point where the text is drawn."""
    font = _font(name, size_px)
    _, top, _, bottom = font.getbbox(text)
    return float(font.getlength(text)), float(bottom - top), float(top)


@lru_cache(maxsize=20000)
def _edges(name: str, size_px: int, text: str) -> tuple[float, ...]:
    """Where each character begins and the last one ends, from the left edge."""
    font = _font(name, size_px)
    return tuple(float(font.getlength(text[:i])) for i in range(len(text) + 1))


@lru_cache(maxsize=1)
def _fonts() -> tuple[str, ...]:
    return tuple(name for name in _OTHER_FONTS if (_DEJAVU / name).exists())


def _invent(rng: Random, style: Style, held_out: bool) -> Scene | None:
    """One try; None where the text does not fit."""
    sliced = style.sliced if style.sliced is not None else rng.random() < style.p_sliced
    size = style.size or _size(rng, sliced)
    plan = view_plan(size)
    background = style.background or rng.choice(tuple(COLORS))
    background_rgb = _shade(rng, background)
    text = style.text
    if text is None:
        text = random_text(rng, style.spelling) if rng.random() < style.p_text else ""
    printed = None
    if text:
        printed = _place_text(rng, text, plan, background_rgb, style, held_out)
        if printed is None:
            return None
    prints = [printed] if printed else []
    if printed and rng.random() < style.p_more_text:
        small = replace(style, print_size="small")
        for _ in range(rng.randint(3, 5) * plan.n_inputs):
            content = random_text(rng, style.spelling)
            another = _place_text(rng, content, plan, background_rgb, small, held_out)
            if another and not any(_touch(another.box, other.box) for other in prints):
                prints.append(another)
    shapes = _place_shapes(rng, size, background, prints, style)
    return Scene(
        size,
        background,
        background_rgb,
        tuple(sorted(shapes, key=lambda s: s.cell)),
        printed,
        smooth=rng.random() < 0.4,
        noise=rng.choice((3, 6, 12)) if rng.random() < 0.25 else 0,
        noise_seed=rng.randrange(1 << 30),
        more_text=tuple(prints[1:]),
    )


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] + 3 and b[0] < a[2] + 3 and a[1] < b[3] + 3 and b[1] < a[3] + 3


def _size(rng: Random, sliced: bool) -> Size:
    if not sliced:
        return rng.choice(_SINGLE_SIZES)
    if rng.random() < 0.5:
        return rng.choice(_COMMON_SIZES)
    shorter = rng.randint(114, 240) if rng.random() < 0.75 else rng.randint(240, 420)
    longer = round(shorter * rng.uniform(1, 1.9))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def _shade(rng: Random, color: str) -> RGB:
    red, green, blue = rng.choice(COLORS[color])
    if rng.random() < 0.45:
        return red, green, blue
    spread = 8 if color in ("gray", "orange") else 16

    def moved(value: int) -> int:
        return max(0, min(255, value + rng.randint(-spread, spread)))

    return moved(red), moved(green), moved(blue)


def _text_rgb(rng: Random, background_rgb: RGB) -> RGB:
    light = luminance(background_rgb)
    if rng.random() < 0.6:
        return (255, 255, 255) if light < 120 else (0, 0, 0)
    shades = [_shade(rng, color) for color in COLORS]
    clear = [rgb for rgb in shades if abs(luminance(rgb) - light) > 90]
    return rng.choice(clear or [(255, 255, 255) if light < 128 else (0, 0, 0)])


def _place_text(
    rng: Random, text: str, plan: SlicePlan, background_rgb: RGB, style: Style, held_out: bool
) -> Print | None:
    """The print at a readable size: within one cell, or large enough for the whole view and then anywhere."""
    width, height = plan.size
    overview_scale = min(plan.source[0] / width, plan.source[1] / height)
    small = bool(plan.grid) and (style.print_size or ("small" if rng.random() < 0.65 else "large")) == "small"
    boxes = view_boxes(plan)
    area = rng.choice(boxes[1:]) if small else boxes[0]
    scale = plan.cell[0] / (area[2] - area[0]) if small and plan.cell else overview_scale
    others = _fonts()
    font = DEFAULT_FONT if held_out or not others or rng.random() < 0.72 else rng.choice(others)
    rgb = _text_rgb(rng, background_rgb)
    for _ in range(5):
        if small:
            # Unreadable in the whole view: below UNREADABLE_PX there.
            largest = min(28.0, UNREADABLE_PX / overview_scale * scale)
            seen_px = rng.uniform(13.5, max(13.6, largest))
        else:
            seen_px = rng.uniform(13.0, 36.0)
        font_px = max(6, math.ceil(seen_px / scale))
        shape = Print(text, (0, 0), font_px, rgb, font)
        _, _, text_w, text_h = shape.box
        room_x, room_y = area[2] - area[0] - text_w - 4, area[3] - area[1] - text_h - 4
        if room_x >= 0 and room_y >= 0:
            if small and font_px * overview_scale > UNREADABLE_PX + 0.7:
                return None
            centred = not small and rng.random() < 0.3
            x = area[0] + 2 + room_x * (0.5 if centred else rng.random())
            y = area[1] + 2 + room_y * (0.5 if centred else rng.random())
            return Print(text, (round(x), round(y)), font_px, rgb, font)
    return None


def _place_shapes(rng: Random, size: Size, background: str, prints: Sequence[Print], style: Style) -> list[Shape]:
    width, height = size
    side = min(size)
    n = style.n_shapes
    if n is None:
        n = min(style.max_shapes, rng.choices((0, 1, 2, 3, 4), (0.05, 0.33, 0.28, 0.2, 0.14))[0])
    same_kind = rng.choice(SHAPES) if rng.random() < 0.2 else None
    same_color = rng.choice(tuple(COLORS)) if rng.random() < 0.1 else None
    colors = [color for color in COLORS if not _alike(color, background)]
    shapes: list[Shape] = []
    for _ in range(n * 12):
        if len(shapes) == n:
            break
        cell = rng.randrange(9)
        if n == 1 and rng.random() < 0.45:
            cell = 4
        if any(other.cell == cell for other in shapes):
            continue
        if n == 1:
            part = rng.uniform(0.12, 0.46) if cell == 4 else rng.uniform(0.1, 0.28)
        else:
            part = rng.uniform(0.1, 0.25 if n == 2 else 0.17)
        radius = part * side
        exact = rng.random() < 0.3
        center = (
            _coordinate(rng, cell % 3, width, radius, exact),
            _coordinate(rng, cell // 3, height, radius, exact),
        )
        if not _fits(center, radius, size, cell, shapes, prints):
            continue
        kind = same_kind or rng.choice(SHAPES)
        color = same_color if same_color in colors else rng.choice(colors)
        assert color is not None
        if shapes and style.p_like and rng.random() < style.p_like:
            other = rng.choice(shapes)
            kind, color = (kind, other.color) if rng.random() < 0.6 else (other.kind, color)
        turn = 0.0 if rng.random() < 0.5 else rng.uniform(-_MAX_SAMPLED_TURN, _MAX_SAMPLED_TURN)
        shapes.append(Shape(kind, color, cell, center, radius, _shade(rng, color), turn))
    return shapes


def _alike(color: str, background: str) -> bool:
    return color == background or {color, background} in ({"orange", "red"}, {"orange", "yellow"})


def _coordinate(rng: Random, third: int, length: int, radius: float, exact: bool) -> float:
    part = (1 + 2 * third) / 6 if exact else rng.uniform(*((0.08, 0.29), (0.4, 0.6), (0.71, 0.92))[third])
    margin = min(radius * 1.02 + 1, length / 2)
    return max(margin, min(length - margin, part * length))


def _fits(
    center: tuple[float, float], radius: float, size: Size, cell: int, shapes: list[Shape], prints: Sequence[Print]
) -> bool:
    x, y = center
    if _third(x / size[0]) != cell % 3 or _third(y / size[1]) != cell // 3:
        return False
    if any(math.dist(center, other.center) < (radius + other.radius) * 1.12 + 2 for other in shapes):
        return False
    for printed in prints:
        left, top, right, bottom = printed.box
        near_x, near_y = max(left, min(right, x)), max(top, min(bottom, y))
        if math.dist(center, (near_x, near_y)) <= radius * 1.12 + 2:
            return False
    return True


def _third(part: float) -> int:
    """0, 1, 2 where the part is clearly in that third; -1 near a border."""
    if part <= 0.31:
        return 0
    if 0.36 <= part <= 0.64:
        return 1
    return 2 if part >= 0.69 else -1


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    x, y, radius = shape.center[0] * scale, shape.center[1] * scale, shape.radius * scale
    if shape.kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
    elif shape.kind == "square":
        half = radius * 0.9
        pen.rectangle((x - half, y - half, x + half, y + half), fill=shape.rgb)
    else:
        pen.polygon(_corners(shape.kind, x, y, radius, shape.turn), fill=shape.rgb)


def _corners(kind: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    if kind == "diamond":
        return [(x, y - radius), (x + radius * 0.78, y), (x, y + radius), (x - radius * 0.78, y)]
    if kind == "cross":
        arm = radius * 0.32
        path = [(-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm), (arm, radius)]
        path += [(-arm, radius), (-arm, arm), (-radius, arm), (-radius, -arm), (-arm, -arm)]
        return [(x + dx, y + dy) for dx, dy in path]
    n_points = {"triangle": 3, "star": 10}[kind]
    points = []
    for i in range(n_points):
        angle = turn - math.pi / 2 + i * 2 * math.pi / n_points
        length = radius * (0.42 if kind == "star" and i % 2 else 1.0)
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return points
