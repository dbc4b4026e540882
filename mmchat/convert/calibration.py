"""What conversions are calibrated and checked with: pictures, cut as a chat would cut them, and prompts with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmchat.embed_table import EmbedTable
from mmchat.embedding import assemble
from mmchat.errors import ModelDirError
from mmchat.images import is_picture_name, read_image
from mmchat.model_dir import ModelSpec
from mmchat.prompt import ChatTokenizer, Message, Picture, Text, render
from mmchat.slicing import plan_slices, slice_image

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "Describe the image in detail."
# Width and height of pictures that are drawn where none are given: square, wide, tall, small; as shares of a view.
_DRAWN = ((1.0, 1.0), (3.1, 1.7), (0.9, 2.6), (0.4, 0.3))


def pictures_in(folder: Path) -> list[Path]:
    """Raises ModelDirError: no folder, or no pictures in it."""
    try:
        found = sorted(path for path in folder.iterdir() if is_picture_name(path))
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


@dataclass(frozen=True)
class Talk:
    """One question about one picture.  answer: "" where nobody knows it."""

    picture: Path
    question: str = QUESTION
    answer: str = ""


def talks_in(source: Path) -> list[Talk]:
    """A folder of pictures, each asked about with QUESTION; or a JSON file as the vendor's demo has one.

    That is a list of {"image", "input"} and, where known, "image_path" (a folder) and "target"; pictures lie in that
    folder or beside the file.

    Raises ModelDirError: neither, nothing in it, or a picture is missing.
    """
    if source.is_dir():
        return [Talk(path) for path in pictures_in(source)]
    try:
        told = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelDirError(f"{source}: cannot be read ({error.strerror or error}); give pictures or JSON") from None
    except (ValueError, RecursionError) as error:
        raise ModelDirError(f"{source}: not JSON ({error})") from None
    if not isinstance(told, list) or not told:
        raise ModelDirError(f'{source}: must be a list of {{"image", "input", "target"}}')
    return [_talk(source, number, one) for number, one in enumerate(told)]


def _talk(source: Path, number: int, told: object) -> Talk:
    if not isinstance(told, dict) or not isinstance(told.get("image"), str):
        raise ModelDirError(f'{source}: entry {number} has no "image"')
    words = [told.get(name, default) for name, default in (("image_path", ""), ("input", QUESTION), ("target", ""))]
    if not all(isinstance(word, str) for word in words):
        raise ModelDirError(f'{source}: in entry {number}, "image_path", "input" and "target" must be texts')
    folder, question, answer = words
    places = [source.parent / folder, Path(folder), source.parent]
    found = next((place / told["image"] for place in places if (place / told["image"]).is_file()), None)
    if found is None:
        raise ModelDirError(f"{source}: entry {number}: {told['image']} is in none of {', '.join(map(str, places))}")
    return Talk(found, question, answer)


class Embedder:
    """Prompts -> the rows that an engine is fed, by the pipeline of a chat, on the CPU."""

    def __init__(self, spec: ModelSpec) -> None:
        """spec: of a checkpoint folder.  Raises ModelDirError: tensors are missing."""
        from mmchat.openvino_vision import open_encoder

        self._spec = spec
        self._tokenizer = ChatTokenizer(spec.tokenizer_path)
        self._table = EmbedTable.open(spec.embed_table_path)
        self._encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]] = open_encoder(spec, None).encode

    def rows(self, talk: Talk) -> NDArray[np.float32]:
        """(n, hidden_size): a conversation that begins with this question, up to where the answer begins.

        Raises ImageError: the picture cannot be read.
        """
        image = read_image(talk.picture)
        plan = self._spec.slices.plan(image.size)
        embeddings = {f"view {i}": self._encode(view) for i, view in enumerate(slice_image(image, plan))}
        prompt = render(
            [Message("user", (Picture(plan, tuple(embeddings)), Text(talk.question)))],
            self._tokenizer,
            query_num=self._spec.vision.query_num,
            use_image_id=self._spec.use_image_id,
        )
        return assemble(prompt.pieces, self._table, embeddings.get)
