"""Reading pictures: a path, bytes, a PIL image or an array -> an RGB image that slicing can cut.

The reference only calls PIL's convert("RGB").  That turns phone photos on their side, shows what transparency
hides, and clips 16-bit grey to white, so by default (reference=False):

* EXIF orientation is applied;
* transparency is laid over white;
* grey deeper than 8 bits is scaled: 16-bit by 255/65535; "I" (32-bit) and "F" (float) pictures by the range their
  largest value fits into: 1.0 (F only), 255, 65535, or that value itself; negative values become 0;
* a JPEG that is far larger than needed is decoded at a fraction of its size (OpenedImage.read).

reference=True keeps the reference's rule for all four.  Either way a file's size is checked in its header, before
any pixel is decoded, and of an animation the first frame is taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mmchat.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from mmchat.slicing import Size

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[Any]

# What Pillow itself refuses to open; 108-megapixel phone photos pass.
MAX_PIXELS = 178_956_970

# Only plain raster formats: Pillow's others run outside programs (EPS) or are rarely exercised decoders.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
_PLUGINS = ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP")
_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# What every browser shows, and how such files are called.
_SHOWN = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_WEBP_SIDE, _JPEG_SIDE, _JPEG_QUALITY = 16_383, 65_535, 90
# By EXIF orientation, what makes it upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    KeyError,
    IndexError,
    TypeError,
    MemoryError,
    AssertionError,
)


class OpenedImage:
    """A picture whose header was read: its size is known, its pixels are not decoded yet."""

    def __init__(
        self,
        image: Image,
        name: str,
        *,
        reference: bool,
        max_pixels: int,
        file: IO[bytes] | None = None,
        shared: bool = False,
    ) -> None:
        """file: to be closed in the end.  shared: the image is its owner's still.

        Raises ImageError where the size is bad.
        """
        self._image, self._name, self._reference, self._file = image, name, reference, file
        self._may_draft = not reference and not shared and image.format in ("JPEG", "MPO")
        width, height = image.size
        if width < 1 or height < 1:
            raise ImageError(f"{name}: has no pixels ({width}x{height})")
        if width * height > max_pixels:
            raise ImageError(
                f"{name}: {width}x{height} is {width * height:,} pixels, over the limit of {max_pixels:,}; not decoded"
            )
        self._size = width, height
        self._damage: ImageError | None = None

    @property
    def size(self) -> Size:
        """As the picture will stand.  A PNG is decoded for it: what says how it stands may come after the pixels."""
        return self._size[::-1] if self._turned else self._size

    @cached_property
    def _turned(self) -> bool:
        """By 90 degrees, one way or the other."""
        image = self._image
        if self._reference:
            return False
        if image.format == "PNG" and "exif" not in image.info:
            try:  # before Pillow does it for the EXIF: what is damaged here is more than that
                with _damage_told(self._name):
                    _load(image)
            except ImageError as error:
                self._damage = error
                return False
        # Some versions of Pillow tell a TIFF's size as it will stand.
        return _orientation(image) >= 5 and (image.format != "TIFF" or image.size == _stored_size(image))

    @property
    def format(self) -> str:
        """As Pillow calls it; "" for what is no file."""
        return self._image.format or ""

    def read(self, at_least: Size | None = None) -> Image:
        """The picture in RGB, its pixels decoded.

        at_least: (width, height) that it will be scaled down to.  A JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size where that leaves at least twice as many pixels on both sides; never with reference=True, and never
            one that came as a PIL image, for it is its owner's.

        Raises ImageError: truncated or damaged.
        """
        from PIL.Image import Transpose

        image, turned = self._image, self._turned
        if self._damage is not None:
            raise self._damage
        with _damage_told(self._name):
            if at_least is not None and self._may_draft:
                width, height = at_least[::-1] if turned else at_least
                image.draft(None, (min(image.width, 2 * width), min(image.height, 2 * height)))
            _load(image)
            if self._reference:
                return image if image.mode == "RGB" else image.convert("RGB")
            turn = _TURNS.get(_orientation(image))  # not ImageOps.exif_transpose: it writes all the EXIF anew
            image = _to_rgb(image)
            return image if turn is None else image.transpose(Transpose[turn])

    def __enter__(self) -> OpenedImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def open_image(
    source: ImageSource, *, reference: bool = False, max_pixels: int = MAX_PIXELS, name: str = ""
) -> OpenedImage:
    """source, as far as its header: to be used in a with statement.

    source: path of a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file, or such a file's bytes; a PIL image; or an array
        (height, width), (height, width, 1|3|4) or (1|3, height, width): uint8, uint16, bool, or float in 0..1.
    max_pixels: width x height above which a picture is refused before it is decoded.
    name: what errors call a picture that comes as bytes.

    Raises ImageError: no such file, not a picture, too many pixels, or an array of another kind.
    """
    from PIL import Image as pil

    rules: dict[str, Any] = {"reference": reference, "max_pixels": max_pixels}
    if isinstance(source, pil.Image):
        return OpenedImage(source, "the image", **rules, shared=True)
    if isinstance(source, np.ndarray):
        return OpenedImage(_from_array(source), "the array", **rules)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or f"the picture ({len(source)} bytes)"
        return OpenedImage(_header(io.BytesIO(source), name, max_pixels), name, **rules)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise ImageError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise ImageError(f"{path}: is a folder, not a picture") from None
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise ImageError(f"{path}: cannot be read ({error})") from None
        try:
            return OpenedImage(_header(file, str(path), max_pixels), str(path), **rules, file=file)
        except BaseException:
            file.close()
            raise
    raise ImageError(f"a picture is a path, bytes, a PIL image or an array, not {type(source).__name__}")


def is_picture_name(path: Path) -> bool:
    """By its suffix; of a folder's files.  Not what is hidden: macOS puts ._x.png, which is none, beside x.png."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_image(source: ImageSource, *, reference: bool = False, max_pixels: int = MAX_PIXELS) -> Image:
    """source as an RGB image of its full size (open_image and OpenedImage.read in one)."""
    with open_image(source, reference=reference, max_pixels=max_pixels) as opened:
        return opened.read()


def to_file(image: Image, *, lossy: bool = False) -> bytes:
    """An RGB image as a file's content: the same pixels as WebP, or as PNG where it is too large for that.

    lossy: JPEG, much smaller, with other pixels.  No metadata: what Pillow hands on from info differs by version.
    """
    from PIL import features

    image = image.copy()
    image.info = {}
    file = io.BytesIO()
    if lossy and max(image.size) <= _JPEG_SIDE:
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
    elif max(image.size) <= _WEBP_SIDE and features.check("webp"):
        image.save(file, "WEBP", lossless=True, quality=0, method=0)  # quality: here the time to be spent
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def shown_by_browsers(data: bytes, name: str = "") -> tuple[bytes, str]:
    """A picture's file as browsers can show it, and the suffix of such a file's name ("jpg").

    Raises ImageError: not a picture, or it cannot be decoded where it must be.
    """
    with open_image(data, name=name) as opened:
        if opened.format in _SHOWN:
            return data, _SHOWN[opened.format]
        image = opened.read()
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), "png"


def _header(file: Any, name: str, max_pixels: int) -> Image:
    from importlib import import_module

    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    for plugin in _PLUGINS:  # these only: Image.open would otherwise import every plug-in there is
        import_module(f"PIL.{plugin}ImagePlugin")
    try:
        with _damage_told(name):
            return pil.open(file, formats=_FORMATS)
    except pil.DecompressionBombError as error:
        told = re.search(r"\d+ pixels", str(error))
        n_pixels = f"{told[0]} are" if told else "that is"
        raise ImageError(f"{name}: {n_pixels} more than is safe to decode (limit {max_pixels:,})") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture ({', '.join(_FORMATS)} can be read)") from None


@contextlib.contextmanager
def _damage_told(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes one ImageError."""
    from PIL import UnidentifiedImageError

    try:
        with _warnings_kept:
            yield
    except (ImageError, UnidentifiedImageError):
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: truncated or damaged picture ({reason})") from None


class _WarningsKept:
    """Pillow warns of sizes (max_pixels decides) and of damaged EXIF (then there is none): nothing for users.

    The filters are the process's: of several threads the first to come changes them, and the last to go puts them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.__exit__(None, None, None)


_warnings_kept = _WarningsKept()


def _orientation(image: Image) -> int:
    """EXIF orientation, 1 (upright) to 8; damaged EXIF counts as none."""
    try:
        with _warnings_kept:
            value = image.getexif().get(0x0112, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _load(image: Image) -> None:
    """Decode the pixels.  What is odd behind a PNG's (a text of megabytes, say) is no damage to them."""
    behind = getattr(image, "load_end", None)
    if image.format != "PNG" or behind is None:
        image.load()
        return

    def load_end() -> None:
        with contextlib.suppress(ValueError):
            behind()

    setattr(image, "load_end", load_end)  # noqa: B010 (Image has none, for mypy)
    try:
        image.load()
    finally:
        delattr(image, "load_end")


def _stored_size(image: Image) -> tuple[Any, Any]:
    """Width and height as a TIFF's tags have them."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(256), tags.get(257)


def _to_rgb(image: Image) -> Image:
    """The kinder rules of the module's docstring, orientation apart."""
    from PIL import Image as pil

    if image.mode in _DEEP_GREY:
        image = _scale_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = pil.new("RGBA", rgba.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_grey(image: Image) -> Image:
    from PIL import Image as pil

    values = np.asarray(image).astype(np.float64)
    clear = image.info.get("transparency")  # the gray that is; anything else is not of this mode
    shows_through = values == clear if isinstance(clear, int) else np.zeros(values.shape, bool)
    values = np.nan_to_num(values, nan=0.0, posinf=np.finfo(np.float32).max).clip(min=0)
    top = float(values.max())
    # PNG and PPM may open as "I" with 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        full = 65535.0
    else:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((limit for limit in ranges if top <= limit), top)
    scaled = np.rint(values * (255.0 / full)).astype(np.uint8)
    scaled[shows_through] = 255
    return pil.fromarray(scaled)


def _from_array(array: NDArray[Any]) -> Image:
    from PIL import Image as pil

    shape = array.shape
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"an array of shape {shape} is not a picture: (height, width[, 1|3|4]) is")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.rint(array * (255.0 / 65535.0))
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError("a float array holds values from 0 to 1; this one has others (or NaN)")
        array = np.rint(array * 255.0)
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is not a picture: uint8, uint16, bool or float (0..1) is")
    return pil.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
