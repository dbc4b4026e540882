"""Reading pictures: a path, bytes, a PIL image or an array -> an RGB image that slicing can cut.

The reference only calls PIL's convert("RGB").  That turns phone photos on their side, shows what transparency
hides, and clips 16-bit grey to white, so by default (reference=False):

* EXIF orientation is applied;
* transparency is laid over white;
* grey deeper than 8 bits is scaled: 16-bit by 255/65535; "I" (32-bit) and "F" (float) pictures by the range their
  largest value fits into: 1.0 (F only), 255, 65535, or that value itself; negative values become 0.

reference=True keeps the reference's rule for all three.  Either way a file's size is checked in its header, before
any pixel is decoded, and of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmchat.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[Any]

# What Pillow itself refuses to open; 108-megapixel phone photos pass.
MAX_PIXELS = 178_956_970

# Only plain raster formats: Pillow's others run outside programs (EPS) or are rarely exercised decoders.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_PLUGINS = ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP")
_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError, TypeError, MemoryError)


def read_image(source: ImageSource, *, reference: bool = False, max_pixels: int = MAX_PIXELS) -> Image:
    """source as an RGB image, its pixels decoded.

    source: path of a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file, or such a file's bytes; a PIL image; or an array
        (height, width), (height, width, 1|3|4) or (1|3, height, width): uint8, uint16, bool, or float in 0..1.
    max_pixels: width x height above which a picture is refused before it is decoded.

    Raises ImageError: no such file, not a picture, truncated, damaged, too many pixels, or an array of another kind.
    """
    from PIL import Image as pil

    if isinstance(source, pil.Image):
        return _to_rgb(source, "the image", reference, max_pixels)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array", reference, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"the picture ({len(source)} bytes)", reference, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            with path.open("rb") as file:
                return _decode(file, str(path), reference, max_pixels)
        except FileNotFoundError:
            raise ImageError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise ImageError(f"{path}: is a folder, not a picture") from None
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise ImageError(f"a picture is a path, bytes, a PIL image or an array, not {type(source).__name__}")


def _decode(file: Any, name: str, reference: bool, max_pixels: int) -> Image:
    from importlib import import_module

    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    for plugin in _PLUGINS:  # these only: Image.open would otherwise import every plug-in there is
        import_module(f"PIL.{plugin}ImagePlugin")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: max_pixels below decides
            with pil.open(file, formats=_FORMATS) as image:
                return _to_rgb(image, name, reference, max_pixels)
    except ImageError:
        raise
    except pil.DecompressionBombError:
        raise ImageError(f"{name}: has more pixels than are safe to decode (limit {max_pixels:,})") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture ({', '.join(_FORMATS)} can be read)") from None
    except _BROKEN as error:
        raise ImageError(f"{name}: truncated or damaged picture ({_one_line(error)})") from None


def _to_rgb(image: Image, name: str, reference: bool, max_pixels: int) -> Image:
    """Raises ImageError before the pixels are touched where the size is bad."""
    from PIL import Image as pil
    from PIL import ImageOps

    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} is {width * height:,} pixels, over the limit of {max_pixels:,}; not decoded"
        )
    try:
        image.load()
    except _BROKEN as error:
        raise ImageError(f"{name}: truncated or damaged picture ({_one_line(error)})") from None
    if reference:
        return image if image.mode == "RGB" else image.convert("RGB")
    oriented = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    image = image if oriented is None else oriented
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
    values = np.nan_to_num(values, nan=0.0, posinf=np.finfo(np.float32).max).clip(min=0)
    top = float(values.max())
    if image.mode.startswith("I;16") or image.format == "PNG":  # older Pillows open 16-bit PNG as "I"
        full = 65535.0
    else:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((limit for limit in ranges if top <= limit), top)
    return pil.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8))


def _from_array(array: NDArray[Any]) -> Image:
    from PIL import Image as pil

    shape = array.shape
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
