"""images: whatever is given becomes an RGB picture by a stated rule, or an ImageError that names it."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Transpose

from mmchat.errors import ImageError
from mmchat.images import open_image, read_image

ORIENTATION = 0x0112
# PIL has more modes; these are the ones its own decoders and converters make.
MODES = [
    *"1LPIF",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16L",
    "I;16B",
]


def gradient(width: int = 9, height: int = 6, mode: str = "RGB") -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x * 37 + y * 91) % 256], axis=-1)
    return Image.fromarray(bands.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: Any, **options: Any) -> Any:
    image = read_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG of this header; its pixel data need not fit."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# --- the reference's rule ---------------------------------------------------------------------------------------


def test_reference_conversion_samples(reference: Path) -> None:
    """reference=True is PIL's convert("RGB"): alpha dropped, deep grey clipped, colours as recorded."""
    samples = json.loads((reference / "pixel_vectors.json").read_text())["mode_conversion_samples"]
    pairs = {name: value for name, value in samples.items() if isinstance(value, list)}
    assert len(pairs) >= 5
    for name, values in pairs.items():
        for given_, wanted in values:
            image = Image.new(name.split("_")[0], (1, 1), tuple(given_))
            assert pixels(image, reference=True) == [[wanted]], (name, given_)


def test_reference_clips_deep_grey() -> None:
    """The recorded samples of I;16, I and F (sentences in the file, numbers here)."""
    deep = Image.fromarray(np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16))
    assert deep.mode == "I;16"
    assert pixels(deep, reference=True) == [grey(0, 255, 255, 255, 255, 255)]
    assert pixels(Image.fromarray(np.array([[-5, 0, 255, 256, 70000]], np.int32)), reference=True) == [
        grey(0, 0, 255, 255, 255)
    ]
    assert pixels(Image.fromarray(np.array([[-5, 0.5, 1.5, 254.9, 300]], np.float32)), reference=True) == [
        grey(0, 0, 1, 254, 255)
    ]


def test_reference_ignores_orientation_and_transparency() -> None:
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert pixels(encoded(image, exif=exif), reference=True) == [[[10, 20, 30]] * 3] * 2


# --- the kinder rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """The picture is stored turned, with the mark that says how; what is read stands upright."""
    turned = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_90,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_270,
    }
    upright = Image.new("RGB", (48, 32), (250, 250, 250))
    upright.paste((200, 0, 0), (0, 0, 16, 16))  # one corner tells all eight apart
    stored = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    careful: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    options = careful.get(kind, {})
    data = encoded(stored, kind, exif=exif, **options)
    for reference_rule in (False, True):
        with open_image(data, reference=reference_rule) as opened:
            assert opened.size == opened.read().size
    seen = read_image(data)
    assert seen.size == upright.size
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(upright)).max() <= (20 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x010E, 11, 1.5), (0x011A, 2, "72"), (0x0128, 2, "inch"), (0x0213, 4, 70000)],
    ids=["ImageDescription", "XResolution", "ResolutionUnit", "YCbCrPositioning"],
)
def test_a_turned_photo_may_have_odd_exif(tag: int, kind: int, value: Any) -> None:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[ORIENTATION] = 6
    tags.tagtype[tag] = kind
    tags[tag] = value
    file = io.BytesIO()
    tags.save(file)
    data = encoded(gradient(30, 20), "JPEG", exif=b"Exif\0\0" + b"II*\0\x08\0\0\0" + tags.tobytes(8))
    with open_image(data) as opened:
        assert opened.size == opened.read().size == (20, 30)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert pixels(encoded(gradient(), exif=exif)) == pixels(gradient())


def test_an_oriented_deep_grey_picture_is_turned_and_scaled() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert pixels(encoded(deep, exif=exif)) == [grey(255, 0)]


def test_transparency_is_laid_over_white() -> None:
    """RGBA, grey with alpha, palette and key colours; half transparent is half white."""
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(10, 20, 30, 0), (10, 20, 30, 255), (0, 0, 0, 128)])
    assert pixels(encoded(rgba)) == [[[255, 255, 255], [10, 20, 30], [127, 127, 127]]]
    la = Image.new("LA", (3, 1))
    la.putdata([(7, 0), (7, 255), (0, 128)])
    assert pixels(encoded(la)) == [grey(255, 7, 127)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, transparency=0)) == [[[255, 255, 255], [40, 50, 60]]]
    assert pixels(encoded(palette, "GIF", transparency=1)) == [[[1, 2, 3], [255, 255, 255]]]
    key = Image.new("RGB", (2, 1), (9, 9, 9))
    key.putpixel((1, 0), (1, 2, 3))
    assert pixels(encoded(key, transparency=(9, 9, 9))) == [[[255, 255, 255], [1, 2, 3]]]


def test_transparency_of_deep_grey_is_laid_over_white() -> None:
    deep = Image.fromarray(np.array([[0, 30000, 65535]], np.uint16))
    assert pixels(encoded(deep, transparency=30000)) == [grey(0, 255, 255)]


def test_an_opaque_picture_is_not_changed_by_its_alpha_channel() -> None:
    image = gradient()
    opaque = image.convert("RGBA")
    assert pixels(encoded(opaque)) == pixels(image)


DEEP = [0, 128, 257, 32896, 65535]
SHALLOW = grey(0, 0, 1, 128, 255)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_files_are_scaled(kind: str, dtype: str) -> None:
    image = Image.fromarray(np.array([DEEP], dtype))
    if kind == "PPM":  # Pillow reads it as "I" and writes it from there
        image = Image.fromarray(np.array([DEEP], np.int32))
    elif kind == "PNG" and dtype == ">u2":
        image = Image.frombytes("I;16", (len(DEEP), 1), np.array([DEEP], "<u2").tobytes())
    assert pixels(encoded(image, kind)) == [SHALLOW]


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_a_dark_sixteen_bit_file_stays_dark(kind: str) -> None:
    """Its format says 16 bits, whatever its largest value is."""
    mode: Any = np.uint16 if kind == "PNG" else np.int32
    data = encoded(Image.fromarray(np.array([[0, 100, 200]], mode)), kind)
    assert pixels(data) == [grey(0, 0, 1)]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-9, 0, 100], [0, 0, 100]),
        ([0, 500_000, 1_000_000], [0, 128, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_thirty_two_bit_grey_is_scaled_by_its_range(values: list[int], wanted: list[int]) -> None:
    assert pixels(Image.fromarray(np.array([values], np.int32))) == [grey(*wanted)]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 1.5, 255.0], [0, 2, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.25, 0.5], [0, 64, 128]),
        ([float("nan"), 0.0, 1.0], [0, 0, 255]),
        ([float("inf"), 0.0, 1.0], [255, 0, 0]),
        ([float("-inf"), 0.0, 1.0], [0, 0, 255]),
    ],
)
def test_float_grey_is_scaled_by_its_range(values: list[float], wanted: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert image.mode == "F"
    assert pixels(image) == [grey(*wanted)]
    assert pixels(encoded(image, "TIFF")) == [grey(*wanted)]
    assert pixels(encoded(image, "PPM")) == [grey(*wanted)]  # that is PFM


@pytest.mark.parametrize("reference_rule", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_but_one_becomes_rgb(mode: str, reference_rule: bool) -> None:
    image = Image.new(mode, (5, 3))
    if mode == "La":  # which Pillow makes nothing of
        with pytest.raises(ImageError):
            read_image(image, reference=reference_rule)
        return
    seen = read_image(image, reference=reference_rule)
    assert (seen.mode, seen.size) == ("RGB", (5, 3))


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_one_pixel_strips_of_every_format(kind: str, size: tuple[int, int]) -> None:
    assert read_image(encoded(Image.new("RGB", size, (1, 2, 3)), kind)).size == size


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    kinds: dict[str, dict[str, Any]] = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}
    for kind, options in kinds.items():
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data) == [[[255, 0, 0]] * 4] * 4, kind


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = gradient()
    data = encoded(image)
    path = tmp_path / "picture with spaces é.bin"  # the content tells the format, not the name
    path.write_bytes(data)
    wanted = np.asarray(image).tolist()
    for source in (path, str(path), data, bytearray(data), memoryview(data), image, np.asarray(image)):
        assert pixels(source) == wanted, type(source)


def test_a_picture_given_as_an_object_is_not_changed() -> None:
    for mode in ("RGB", "RGBA", "P", "I;16"):
        image = Image.new(mode, (3, 2))
        before = image.tobytes()
        read_image(image)
        assert (image.mode, image.tobytes()) == (mode, before)


# --- headers, and JPEGs at a fraction ---------------------------------------------------------------------------


def test_the_size_is_known_before_the_pixels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the picture will stand, turned where EXIF says so; the reference does not turn."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(gradient(30, 20), "JPEG", exif=exif)
    with open_image(data) as opened:
        assert opened.size == (20, 30)
        assert opened.read().size == (20, 30)
    with open_image(data, reference=True) as opened:
        assert opened.size == opened.read().size == (30, 20)
    half = encoded(gradient(300, 200))[:900]
    with open_image(half) as opened:
        assert opened.size == (300, 200)
        with pytest.raises(ImageError, match="truncated or damaged"):
            opened.read()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("at_least", "k"),
    [((400, 300), 1), ((201, 150), 1), ((200, 150), 2), ((100, 76), 2), ((100, 75), 4), ((50, 37), 8), ((1, 1), 8)],
)
def test_a_large_jpeg_is_decoded_at_a_fraction(at_least: tuple[int, int], k: int, orientation: int) -> None:
    """1/k of its size where that leaves twice what is wanted on both sides; about the same picture."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.merge("RGB", [*gradient(800, 600).split()[:2], Image.new("L", (800, 600), 99)])
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    upright = read_image(data)
    wanted = at_least if orientation == 1 else at_least[::-1]
    with open_image(data) as opened:
        assert opened.size == upright.size
        drafted = opened.read(at_least=wanted)
    assert drafted.size == (upright.width // k, upright.height // k)
    assert k == 1 or (drafted.width >= 2 * wanted[0] and drafted.height >= 2 * wanted[1])
    both = [np.asarray(image.resize((40, 30), Image.Resampling.BOX)).astype(int) for image in (drafted, upright)]
    assert np.abs(both[0] - both[1]).max() <= 4
    with open_image(data, reference=True) as opened:
        assert opened.read(at_least=wanted).size == (800, 600)


def test_only_jpegs_are_decoded_at_a_fraction() -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        with open_image(encoded(gradient(160, 120), kind)) as opened:
            assert opened.read(at_least=(10, 10)).size == (160, 120)


def test_an_opened_jpeg_object_is_not_shrunk_for_its_owner() -> None:
    """What the caller goes on using, and what is read again when slices must be made anew, keeps its size."""
    theirs = Image.open(io.BytesIO(encoded(gradient(160, 120), "JPEG")))
    with open_image(theirs) as opened:
        opened.read(at_least=(10, 10))
    assert theirs.size == (160, 120)
    assert read_image(theirs).size == (160, 120)


def test_files_are_closed(tmp_path: Path) -> None:
    """At the end of the with statement, also after an error; ResourceWarnings are errors here."""
    whole, cut = encoded(gradient()), encoded(gradient(90, 90))[:200]
    for name, data in (("whole", whole), ("cut", cut), ("none", b"no"), ("large", encoded(Image.new("1", (400, 300))))):
        (tmp_path / name).write_bytes(data)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name in ("whole", "cut", "none", "large"):
        try:
            read_image(tmp_path / name, max_pixels=100_000)
        except ImageError:
            continue
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


# --- arrays -----------------------------------------------------------------------------------------------------


def test_arrays_of_every_shape() -> None:
    bands = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert pixels(bands) == bands.tolist()
    assert pixels(bands.transpose(2, 0, 1)) == bands.tolist()
    assert pixels(np.asfortranarray(bands)[::-1]) == bands[::-1].tolist()
    single = bands[:, :, 0]
    for array in (single, single[:, :, None], single[None]):
        assert pixels(array) == np.repeat(single[:, :, None], 3, axis=2).tolist()
    rgba = np.dstack([bands, np.full((5, 7), 255, np.uint8)])
    assert pixels(rgba) == bands.tolist()
    rgba[..., 3] = 0
    assert pixels(rgba) == np.full_like(bands, 255).tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0, 1]], bool),
        np.array([[0, 255]], np.uint8),
        np.array([[0, 65535]], np.uint16),
        np.array([[0, 65535]], ">u2"),
        np.array([[0, 1]], np.float16),
        np.array([[0, 1]], np.float32),
        np.array([[0, 1]], np.float64),
        np.array([[0, 1]], ">f4"),
    ],
    ids=lambda array: array.dtype.str,
)
def test_arrays_of_every_type(array: NDArray[Any]) -> None:
    assert pixels(array) == [grey(0, 255)]


@pytest.mark.parametrize("value", range(0, 256, 5))
def test_array_types_agree(value: int) -> None:
    """The same grey, in 8 bits, in 16 and as a fraction."""
    arrays = np.array([[value]], np.uint8), np.array([[value * 257]], np.uint16), np.array([[value / 255]])
    assert [pixels(array) for array in arrays] == [[grey(value)]] * 3


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(()),
        np.zeros(5, np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((2, 4, 5), np.uint8),
        np.zeros((1, 4, 5, 3), np.uint8),
        np.zeros((4, 5), np.int32),
        np.zeros((4, 5), np.complex64),
        np.zeros((4, 5), object),
        np.zeros((4, 5), "U1"),
        np.full((4, 5), 1.001),
        np.full((4, 5), -0.001),
        np.full((4, 5), np.nan),
        np.full((4, 5), np.inf),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}-{array.ravel()[:1]}",
)
def test_other_arrays_are_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="array"):
        read_image(array)


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.png", tmp_path / "letter.png"
    empty.write_bytes(b"")
    text.write_text("Dear Sir or Madam,\n" * 50)
    for path, reason in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "is a folder"),
        (empty, "not a picture"),
        (text, "not a picture"),
        (text / "below.png", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nul\0.png", "surrogate\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ImageError):
        read_image(name)


@pytest.mark.parametrize("source", [None, 3, 2.5, ["a.png"], object()])
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=type(source).__name__):
        read_image(source)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "IM", "MSP", "JPEG2000", "DDS"])
def test_other_formats_are_refused(kind: str) -> None:
    """Whole files of formats that Pillow reads and mmchat does not; the message says which ones it does."""
    data = encoded(gradient(32, 32, "1" if kind == "MSP" else "RGB"), kind)
    with pytest.raises(ImageError, match=r"JPEG, PNG, WEBP.*can be read"):
        read_image(data)
    with pytest.raises(ImageError, match="not a picture"):
        read_image(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2, 2, 8, 3) + bytes(64))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_a_cut_off_file_is_refused_or_read(kind: str) -> None:
    """At every offset of a small file: ImageError, or a picture of the right size; nothing else."""
    data = encoded(gradient(40, 30), kind)
    refused = 0
    for end in range(len(data)):
        try:
            assert read_image(data[:end]).size == (40, 30)
        except ImageError:
            refused += 1
    assert refused > len(data) * 0.4


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_half_a_file_is_refused(kind: str) -> None:
    data = encoded(gradient(200, 150), kind)
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_image(data[: len(data) // 2])


@pytest.mark.parametrize("oriented", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"pHYs"])
def test_what_is_odd_behind_the_pixels_is_no_damage(kind: bytes, oriented: bool) -> None:
    """A workflow of megabytes, say, or half a resolution."""
    body = b"workflow\0\0" + zlib.compress(bytes(2 << 20)) if kind == b"zTXt" else b"\0"
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    data = encoded(gradient(40, 30), "PNG", **({"exif": ORIENTED} if oriented else {}))
    assert pixels(data[:-12] + chunk + data[-12:]) == pixels(data)
    at = data.index(b"IDAT") + 10
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_image(data[:at] + bytes(20) + data[at + 20 : -12] + chunk + data[-12:])


def test_opening_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is opened once to see what it is, and once more to be read."""
    from PIL import ImageFile

    pictures = [encoded(gradient(30, 20), kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    for data in pictures:
        with open_image(data):
            pass


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_png_that_is_damaged_within_is_refused(part: float) -> None:
    rng = np.random.default_rng(1)
    data = bytearray(encoded(Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8))))
    at = int(len(data) * part)
    data[at : at + 20] = bytes(20)
    with open_image(bytes(data)) as opened:
        assert opened.size == (400, 300)
        with pytest.raises(ImageError, match="truncated or damaged"):
            opened.read()


@pytest.mark.parametrize("size", [(50_000, 50_000), (20_000, 10_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_in_the_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Quickly, by name, and before any pixel is asked for."""
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    began = time.monotonic()
    with pytest.raises(ImageError, match="pixels") as caught:
        read_image(png(*size))
    assert time.monotonic() - began < 10
    assert "limit" in str(caught.value)


def test_max_pixels_is_the_callers_choice() -> None:
    data = encoded(Image.new("RGB", (20, 10)))
    assert read_image(data, max_pixels=200).size == (20, 10)
    for source in (data, Image.new("RGB", (20, 10)), np.zeros((10, 20, 3), np.uint8)):
        with pytest.raises(ImageError, match="20x10 is 200 pixels, over the limit of 199"):
            read_image(source, max_pixels=199)


def test_a_header_that_promises_more_than_the_file_has_is_refused() -> None:
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_image(png(3000, 3000, data=b"\0" * 100))


def test_a_picture_object_that_cannot_be_decoded_is_refused() -> None:
    data = encoded(gradient(200, 150))
    lazy = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ImageError, match="the image: truncated or damaged"):
        read_image(lazy)
    closed = Image.open(io.BytesIO(data))
    closed.close()
    with pytest.raises(ImageError):
        read_image(closed)


def test_pillows_warnings_stay_inside() -> None:
    """A picture between Pillow's warning and mmchat's limit, one with broken EXIF, and a palette oddity."""
    broken = Image.new("L", (3, 2))
    broken.info["exif"] = b"Exif\0\0II*\0\xff\xff\xff\xff"
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = b"\0\xff"
    from_jpeg = encoded(gradient(16, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (broken, palette, from_jpeg):
            assert read_image(source).mode == "RGB"
        with pytest.raises(ImageError):
            read_image(png(10_000, 9_000), max_pixels=80_000_000)  # Pillow warns from 89 megapixels


def test_threads_that_read_at_once_leave_the_filters_as_they_were() -> None:
    from mmchat.images import _warnings_kept

    before = list(warnings.filters)
    _warnings_kept.__enter__()
    with ThreadPoolExecutor(1) as other:
        other.submit(_warnings_kept.__enter__).result()
        _warnings_kept.__exit__()
        other.submit(_warnings_kept.__exit__).result()
    assert list(warnings.filters) == before


# --- fuzz -------------------------------------------------------------------------------------------------------

ORIENTED = Image.Exif()
ORIENTED[ORIENTATION] = 6
SEEDS = [
    encoded(gradient(12, 9), "PNG", exif=ORIENTED),
    encoded(gradient(12, 9, "P"), "PNG", transparency=3),
    encoded(Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) * 600), "PNG"),
    encoded(gradient(12, 9), "JPEG", exif=ORIENTED, icc_profile=b"x" * 40),
    encoded(gradient(12, 9, "CMYK"), "JPEG", progressive=True),
    encoded(gradient(12, 9), "TIFF", exif=ORIENTED),
    encoded(gradient(12, 9), "TIFF", compression="tiff_lzw"),
    encoded(gradient(12, 9), "BMP"),
    encoded(gradient(12, 9, "P"), "GIF", save_all=True, append_images=[gradient(12, 9, "P")]),
    encoded(gradient(12, 9, "RGBA"), "WEBP", exif=ORIENTED),
    encoded(gradient(12, 9), "PPM"),
    b"P3 2 1 255 1 2 3 4 5 6\n",
    b"Pf 2 1 -1.0\n" + struct.pack("<ff", 0.5, 1.0),
]
MAGIC = [seed[:n] for seed in SEEDS for n in (4, 12, 30)]


def survives(data: bytes) -> None:
    """Only a picture or an ImageError of one line comes out; a small bound keeps absurd headers cheap."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            assert read_image(data, max_pixels=1_000_000).mode == "RGB"
        except ImageError as error:
            problem = str(error)
        else:
            problem = ""
    assert "\n" not in problem


@given(st.sampled_from([b"", *MAGIC]), st.binary(max_size=200))
def test_random_bytes(head: bytes, tail: bytes) -> None:
    survives(head + tail)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["set", "set32", "cut", "drop", "repeat"])):
            case "set":
                data[at] = draw(st.integers(0, 255))
            case "set32":
                data[at : at + 4] = draw(
                    st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x7f", b"\x7f\0\0\0"])
                )
            case "cut":
                data = data[: max(1, at)]
            case "drop":
                del data[at : min(at + 4, len(data) - 1)]
            case "repeat":
                data[at:at] = data[at : at + 8]
    return bytes(data)


@given(damaged_files())
@settings(max_examples=max(300, settings().max_examples))
@example(b"Pf 2 1 0\n" + bytes(8))
@example(b"Pf 2 1 -1.0\n" + bytes(4) + b"\2\0\x80\x7f")  # a signalling NaN
@example(b"P6 3 3 0\n" + bytes(27))
@example(b"P5 1 1 99999999\n" + bytes(8))
def test_damaged_files(data: bytes) -> None:
    survives(data)


@pytest.mark.parametrize("name", ["/dev/null", "/proc/self/mem"])
def test_files_that_are_no_files(name: str) -> None:
    if not os.path.exists(name):
        pytest.skip(f"{name} is not here")
    with pytest.raises(ImageError):
        read_image(name)
