"""What a conversation consists of: turns, the pictures in them, what each answer took, and how it is sent by now.

The turns are what the user saw, for ever.  What of them still goes to the model, and in which form, is in Marks: a
value of its own, so that a turn never changes once it is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmchat.engine import StopReason
from mmchat.errors import SessionError
from mmchat.slicing import Size, SlicePlan

# How a picture is sent: with its cells; its source view alone; as a line of text that names it, with what the model
# said of it or without.
Form = Literal["whole", "overview", "described", "line"]
SEEN: tuple[Form, ...] = ("whole", "overview")


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

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: value + other[name] for name, value in self.to_dict().items()})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Original:
    """What a picture was made of, so that it can be saved (mmchat.saving).

    read: gives the content of its file; may raise MmchatError.  keys: of its slices, by their pixels.
    max_slice_nums, reference: how it was cut and read (mmchat.slicing, mmchat.images).
    embedding: the embedding that came with it under a key of its handle, where one did.
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


@dataclass(frozen=True)
class ImageHandle:
    """A picture of the conversation.

    id: its name in the session ("img1"), for ever.  size: (width, height) in pixels.  slices: encoder inputs.
    rows: rows of the prompt that its embeddings take when it is sent whole.  turn: number of the turn that brought
    it, from 1.  name: file name, where it came from a file.
    keys: of its embeddings in the store, the source view's first.  pixels: cuts it again.  original: for saving it;
    None only where there is no picture but its size.
    """

    id: str
    size: Size
    slices: int
    rows: int
    turn: int
    name: str = ""
    plan: SlicePlan = field(repr=False, kw_only=True)
    keys: tuple[str, ...] = field(repr=False, kw_only=True)
    pixels: Callable[[], list[NDArray[np.uint8]]] = field(repr=False, compare=False, kw_only=True)
    original: Original | None = field(default=None, repr=False, compare=False, kw_only=True)


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as the user saw them.  ids: the answer's tokens."""

    parts: tuple[str | ImageHandle, ...]
    text: str
    ids: tuple[int, ...]
    stop_reason: StopReason
    usage: Usage

    @property
    def images(self) -> list[ImageHandle]:
        return images_in(self.parts)


@dataclass(frozen=True)
class Marks:
    """What of the turns is sent otherwise than it was said, and what must stay as it is.

    forms: by picture id; a picture that is not named is whole.  dropped: numbers (from 1) of turns that are not sent.
    pinned: picture ids.  pinned_turns: numbers.
    returned: by picture id, the number of the turn that came next when the user asked for it back: it is as
    new as that.
    """

    forms: Mapping[str, Form] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()
    pinned: frozenset[str] = frozenset()
    pinned_turns: frozenset[int] = frozenset()
    returned: Mapping[str, int] = field(default_factory=dict)

    def form(self, image: ImageHandle) -> Form:
        return self.forms.get(image.id, "whole")

    def of(self, turns: Sequence[Turn]) -> Marks:
        """Those about these turns, which are the first of the conversation."""
        n, ids = len(turns), {image.id for turn in turns for image in turn.images}
        return Marks(
            {name: form for name, form in self.forms.items() if name in ids},
            frozenset(number for number in self.dropped if number <= n),
            self.pinned & ids,
            frozenset(number for number in self.pinned_turns if number <= n),
            {name: min(at, n + 1) for name, at in self.returned.items() if name in ids},
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON and msgpack take it."""
        return {
            "forms": dict(self.forms),
            "dropped": sorted(self.dropped),
            "pinned": sorted(self.pinned),
            "pinned_turns": sorted(self.pinned_turns),
            "returned": dict(self.returned),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Marks:
        """Back from to_dict; what a later version may have added is left out.  Raises SessionError for other values."""
        found = {name: values.get(name) for name in ("forms", "dropped", "pinned", "pinned_turns", "returned")}
        checks = {
            "forms": lambda value: _is_map(value, lambda form: form in get_args(Form)),
            "dropped": lambda value: _is_list(value, _is_number),
            "pinned": lambda value: _is_list(value, _is_id),
            "pinned_turns": lambda value: _is_list(value, _is_number),
            "returned": lambda value: _is_map(value, _is_number),
        }
        for name, value in found.items():
            if value is not None and not checks[name](value):
                raise SessionError(f"the saved {name} of a conversation are {value!r:.80}; they cannot be that")
        return cls(
            dict(found["forms"] or {}),
            frozenset(found["dropped"] or ()),
            frozenset(found["pinned"] or ()),
            frozenset(found["pinned_turns"] or ()),
            dict(found["returned"] or {}),
        )


_ID = re.compile(r"img[1-9][0-9]{0,8}")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_map(value: Any, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(_is_id(key) and is_good(inner) for key, inner in value.items())


def _is_list(value: Any, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_good, value))


def images_in(parts: Sequence[str | ImageHandle]) -> list[ImageHandle]:
    return [part for part in parts if isinstance(part, ImageHandle)]
