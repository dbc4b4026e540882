"""What a conversation consists of: turns, the pictures in them, and what each answer took."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmchat.engine import StopReason
from mmchat.images import open_image, to_file
from mmchat.slicing import Size, SlicePlan, slice_image

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels above which a picture that came without a file is kept packed (1 s for 12 megapixels), not as they are.
_PLAIN_PX = 4_000_000


@dataclass(frozen=True)
class Usage:
    """What an answer took.  Also readable as usage["n_prompt"].

    n_prompt = n_reused + n_prefilled: rows of the prompt, those found in the KV cache, those computed.
    n_new: tokens generated.  slices_encoded, slices_cached: encoder inputs computed for this answer, and those of
    its new pictures that the store had.  restarts: workers that died and were replaced meanwhile.
    encode_s, prefill_s, generate_s: seconds of work; total_s: of waiting, the loading of models included.
    """

    n_prompt: int = 0
    n_reused: int = 0
    n_prefilled: int = 0
    n_new: int = 0
    slices_encoded: int = 0
    slices_cached: int = 0
    restarts: int = 0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    generate_s: float = 0.0
    total_s: float = 0.0

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Original:
    """What a picture was made of, so that it can be cut again and saved.

    read: gives the content of its file; may raise MmchatError.  keys: of its slices, by their pixels.
    max_slice_nums, reference: how it was cut and read (mmchat.slicing, mmchat.images).
    embedding: the embedding that came with it under a key of its handle, where one did (mmchat.saving).
    """

    def __init__(
        self,
        read: Callable[[], bytes],
        keys: tuple[str, ...],
        *,
        max_slice_nums: int,
        reference: bool,
        digest: Callable[[], str] | None = None,
        embedding: Callable[[str], NDArray[np.float32] | None] = lambda key: None,
    ) -> None:
        """digest: a name of the content, where there is a cheaper one than its SHA-256."""
        self.read, self.keys, self.embedding = read, keys, embedding
        self.max_slice_nums, self.reference = max_slice_nums, reference
        self._digest = digest

    @cached_property
    def digest(self) -> str:
        return self._digest() if self._digest else hashlib.sha256(self.read()).hexdigest()

    def image(self, plan: SlicePlan, name: str = "") -> Image:
        """In RGB, as large as the plan needs it.  Raises ImageError, and what read raises."""
        with open_image(self.read(), reference=self.reference, name=name) as opened:
            return opened.read(at_least=plan.refined or plan.source)


@dataclass(frozen=True)
class ImageHandle:
    """A picture of the conversation.

    id: its name in the session ("img1").  size: (width, height) in pixels.  slices: encoder inputs.
    rows: rows of the prompt that its embeddings take.  turn: number of the turn that brought it, from 1.
    name: file name, where it came from a file.
    keys: of its embeddings in the store.
    """

    id: str
    size: Size
    slices: int
    rows: int
    turn: int
    name: str = ""
    plan: SlicePlan = field(repr=False, kw_only=True)
    keys: tuple[str, ...] = field(repr=False, kw_only=True)
    original: Original = field(repr=False, compare=False, kw_only=True)

    def pixels(self) -> list[NDArray[np.uint8]]:
        """Its slices, cut again.  Raises ImageError, and BundleError where the picture is gone."""
        return slice_image(self.original.image(self.plan, self.name or self.id), self.plan)


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as the user saw them.  ids: the answer's tokens."""

    parts: tuple[str | ImageHandle, ...]
    text: str
    ids: tuple[int, ...]
    stop_reason: StopReason
    usage: Usage


def keep(image: Image) -> tuple[Callable[[], bytes], Callable[[], str]]:
    """An RGB image whose owner may draw on it later: what reads it as a file, and a digest (see Original)."""
    from PIL import Image as pil

    size = image.size
    if size[0] * size[1] > _PLAIN_PX:
        data = to_file(image)
        return lambda: data, lambda: hashlib.sha256(data).hexdigest()
    pixels = image.tobytes()
    return (
        lambda: to_file(pil.frombytes("RGB", size, pixels)),
        lambda: hashlib.sha256(f"{size[0]}x{size[1]} ".encode() + pixels).hexdigest(),
    )
