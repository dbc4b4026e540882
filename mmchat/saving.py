"""Conversations <-> bundles: what a session's turns become in a file, and what becomes of them on the way back.

Back on another machine, or with another model:

* Tokens of an answer are used where the tokenizer is the same, they spell the answer's text, and none of them is a
  control token; else they are made again from the text.
* A turn that is lost between others stays as a turn that says so and is not sent, as one that went to make room.
* Keys of pictures are used where encoder and cutting are the same; else the pictures are cut again.  Where there is no
  picture, the handle stays, and a question that needs it fails with a clear error.
* Embeddings from a bundle are never put into the store under the key of a picture, for whoever wrote the file could
  make other conversations see what is not there: they get keys of their own content.  So they serve this conversation
  alone, and only where the store does not have the picture's own.

A bundle may still name the keys of pictures that it does not hold.  What it gains is that its own conversation is
about such a picture, if this store happens to know it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mmchat import prompt
from mmchat.bundle import Bundle, SavedImage, SavedModel, SavedTurn, plain_name
from mmchat.context import Policy
from mmchat.decoding import TextStream
from mmchat.errors import BundleError, ImageError, MmchatError, SessionError
from mmchat.images import open_image, to_file
from mmchat.model_dir import ModelSpec
from mmchat.record import ImageHandle, Marks, Original, Turn, Usage
from mmchat.sections import MAX_DATA_BYTES
from mmchat.slicing import Size, SlicePlan, slice_image
from mmchat.store import PREPROCESSING_VERSION, Store, slice_key

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from mmchat.prompt import ChatTokenizer

# How pictures are kept: their files as they are; the pixels that were used, without loss (no metadata, and what had no
# file is kept so anyway); as JPEG, smaller and with other pixels; not at all.
FORMS = ("original", "reencoded", "jpeg", "none")

# Pixels above which a picture that came without a file is kept packed (1 s for 12 megapixels), not as they are.
_PLAIN_PX = 4_000_000
_GONE = "0" * 16  # how keys of nothing begin
_USAGE: dict[str, type] = {name: type(value) for name, value in Usage().to_dict().items()}
_LOG = logging.getLogger("mmchat")


def saved_model(spec: ModelSpec, tokenizer: ChatTokenizer, *, pictures: bool) -> SavedModel:
    """pictures: whether the encoder matters; to know it takes seconds for a large one."""
    encoder = ""
    if pictures:
        parts = (spec.encoder_digest, PREPROCESSING_VERSION, spec.slices.scale_resolution, spec.slices.patch_size,
                 spec.slices.max_patches, spec.vision.query_num, spec.llm.hidden_size)  # fmt: skip
        encoder = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
    return SavedModel(plain_name(spec.name), encoder, tokenizer.digest, prompt.FORMAT)


def saved_state(marks: Marks) -> dict[str, Any]:
    """Of numbers of turns there may be many, so they are packed."""
    values = marks.to_dict()
    packed = {name: np.asarray(values[name], "<u4").tobytes() for name in _NUMBERS}
    return {**values, **packed, "pinned": tuple(values["pinned"])}


_NUMBERS = ("dropped", "pinned_turns")


def marks_of(state: Mapping[str, Any]) -> Marks:
    """Raises SessionError for what is none."""
    values = dict(state)
    for name in _NUMBERS:
        data = values.get(name, b"")
        if not isinstance(data, bytes) or len(data) % 4:
            raise SessionError(f"its {name} are no numbers")
        values[name] = np.frombuffer(data, "<u4").tolist()
    return Marks.from_dict(values)


def image_of(original: Original, plan: SlicePlan, name: str = "") -> Image:
    """In RGB, as large as the plan needs it.  Raises ImageError, BundleError."""
    with open_image(original.read(), reference=original.reference, name=name) as opened:
        return opened.read(at_least=plan.refined or plan.source)


def cut_again(original: Original, plan: SlicePlan) -> list[NDArray[np.uint8]]:
    """A picture's slices.  Raises ImageError, BundleError."""
    return slice_image(image_of(original, plan), plan)


def keep(image: Image) -> tuple[Callable[[], bytes], Callable[[], str]]:
    """An RGB image whose owner may draw on it later: what reads it as a file, and a digest (see Original)."""
    from PIL import Image as pil

    size = image.size
    if size[0] * size[1] > _PLAIN_PX:
        packed = _packer().submit(to_file, image.copy())  # who asks about a frame of a video does not wait for it
        return packed.result, lambda: hashlib.sha256(packed.result()).hexdigest()
    pixels = image.tobytes()
    return (
        lambda: to_file(pil.frombytes("RGB", size, pixels)),
        lambda: hashlib.sha256(f"{size[0]}x{size[1]} ".encode() + pixels).hexdigest(),
    )


@cache
def _packer() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="mmchat-packer")


class Keeper:
    """Turns -> what a bundle keeps of them, in one form of pictures, with embeddings or without."""

    def __init__(
        self, spec: ModelSpec, store: Store, images: str, embeddings: bool, known: Mapping[Original, str] | None = None
    ) -> None:
        """known: pictures that the bundle has already, and their ids there.  Raises BundleError: no such form."""
        if images not in FORMS:
            raise BundleError(f"images is {images!r}; known are {', '.join(FORMS)}")
        if images == "jpeg" and embeddings:
            raise BundleError('embeddings do not fit the pixels of images="jpeg": use another form, or none of them')
        self._spec, self._store, self.form, self.embeddings = spec, store, images, embeddings
        self._turns: dict[int, tuple[Turn, SavedTurn]] = {}
        self._images: dict[Original, tuple[str, tuple[str, ...]]] = {}  # id of the file, keys
        self._handles: dict[str, ImageHandle] = {}  # by id of the file
        self._keys: dict[str, tuple[str, Original]] = {}  # by key in the file: key in the store
        self._as_they_are = frozenset((known or {}).values())
        for original, name in (known or {}).items():
            self._images[original] = (name, original.keys)

    def turns(self, turns: Sequence[Turn]) -> tuple[SavedTurn, ...]:
        """Where a picture cannot be kept, the log says so and the turn is kept without it."""
        known = {id(turn): self._turns.get(id(turn)) or (turn, self._turn(turn)) for turn in turns}
        self._turns = known
        return tuple(saved for _, saved in known.values())

    def picture(self, name: str) -> bytes:
        """The file that turns named.  Raises BundleError."""
        handle = self._handles[name]
        original = _original(handle)
        try:
            if self.form == "original" or name in self._as_they_are:
                data = original.read()
                if len(data) <= MAX_DATA_BYTES:
                    return data
            image = image_of(original, handle.plan, handle.name)
        except (ImageError, OSError) as error:
            raise BundleError(f"{handle.id} cannot be saved: {error}") from None
        return to_file(image, lossy=self.form == "jpeg")

    def rows(self, key: str) -> NDArray[np.float32] | None:
        """The embedding under a key that turns named; None where it is not to be kept, or nobody has it."""
        if not self.embeddings or key not in self._keys:
            return None
        own_key, original = self._keys[key]
        found = self._store.get(own_key)
        return original.embedding(own_key) if found is None else found

    def _turn(self, turn: Turn) -> SavedTurn:
        parts = tuple(part if isinstance(part, str) else self._image(part) for part in turn.parts)
        return SavedTurn(parts, turn.text, turn.ids, turn.stop_reason, turn.usage.to_dict())

    def _image(self, handle: ImageHandle) -> SavedImage:
        original = _original(handle)
        if original not in self._images:
            try:
                self._images[original] = self._picture(handle)
            except MmchatError as error:
                _LOG.warning("%s is saved without its picture: %s", handle.id, error)
                self._images[original] = ("", original.keys)
        name, keys = self._images[original]
        self._handles[name] = handle
        self._keys.update(zip(keys, ((key, original) for key in handle.keys), strict=True))
        return SavedImage(
            handle.id, handle.size, plain_name(handle.name), original.max_slice_nums, original.reference, keys, name
        )

    def _picture(self, handle: ImageHandle) -> tuple[str, tuple[str, ...]]:
        """Id and keys of the picture as it will be in the bundle."""
        original = _original(handle)
        if self.form == "none":
            return "", original.keys
        name = original.digest
        if self.form == "original":
            return name, original.keys
        # Named after what it is made of, so that it need not be made to be named.
        name = hashlib.sha256(f"{self.form} {name}".encode()).hexdigest()
        if self.form == "reencoded":
            return name, original.keys
        self._handles[name] = handle
        data = self.picture(name)  # and cut as it will be when it is read from the bundle
        again = Original(lambda: data, (), max_slice_nums=original.max_slice_nums, reference=original.reference)
        slices = cut_again(again, handle.plan)
        return name, tuple(slice_key(pixels, self._spec.encoder_digest) for pixels in slices)


def _original(handle: ImageHandle) -> Original:
    assert handle.original is not None
    return handle.original


class Restored:
    """A bundle's conversation for a model.

    turns, marks: as a session has them.  policy: None where it is not known.  known: the bundle's ids of the pictures.
    notes: what was lost or had to be made again, in words.  has_less: for this model a picture is gone, of which the
    bundle names another model's embeddings.
    """

    def __init__(self, bundle: Bundle, spec: ModelSpec, tokenizer: ChatTokenizer, store: Store) -> None:
        self._bundle, self._spec, self._tokenizer, self._store = bundle, spec, tokenizer, store
        self.known: dict[Original, str] = {}
        self.has_less = False
        self.notes = [f"lost: {what}" for what in bundle.lost]
        saved, record = bundle.record.model, bundle.record
        mine = saved_model(spec, tokenizer, pictures=bool(record.images))
        self._same_encoder = saved.encoder == mine.encoder
        self._same_tokenizer = saved.tokenizer == mine.tokenizer
        if record.images and not self._same_encoder:
            self.notes.append(f"the pictures were encoded by another model ({_called(saved)}): they are encoded again")
        if record.turns and not self._same_tokenizer:
            self.notes.append(f"the model had another tokenizer ({_called(saved)}): the answers' tokens are made again")
        self._handles: dict[str, ImageHandle] = {}
        self._cuts: dict[tuple[str, Size, int, bool], tuple[str, ...]] = {}
        self.turns = [self._turn(turn, number) for number, turn in enumerate(record.turns, 1)]
        self.marks, self.policy = Marks(), None
        try:
            self.marks = marks_of(record.state)
        except SessionError as error:
            self.notes.append(f"lost: what was pinned, forgotten and not sent any more ({error})")
        if bundle.gaps:
            self.marks = replace(self.marks, dropped=self.marks.dropped | set(bundle.gaps))
            self.notes.append("the turns after a lost one are kept, and the model does not see the lost one")
        try:
            self.policy = _policy(record.settings.policy)
        except SessionError as error:
            self.notes.append(f"lost: what to do when the context is full ({error})")

    @property
    def options(self) -> dict[str, Any]:
        """What a Session takes."""
        settings = self._bundle.record.settings
        return {
            "system": settings.system,
            "max_slice_nums": settings.max_slice_nums,
            "use_image_id": settings.use_image_id,
            "reference_pixels": settings.reference_pixels,
            "policy": self.policy,
            "sampling": settings.sampling,
            "came_as": (settings.pictures, self.known),
            "turns": self.turns,
            "marks": self.marks,
            "notes": self.notes,
        }

    def _turn(self, saved: SavedTurn, number: int) -> Turn:
        parts = tuple(part if isinstance(part, str) else self._handle(part, number) for part in saved.parts)
        # Counts are whole numbers; what another version knew besides is left out.
        values: dict[str, Any] = {name: kind(saved.usage[name]) for name, kind in _USAGE.items() if name in saved.usage}
        usage = Usage(**values)
        ids = saved.ids
        if not self._same_tokenizer or not spells(ids, saved.text, self._tokenizer):
            ids = tuple(self._tokenizer.encode(saved.text))
            if self._same_tokenizer:
                self.notes.append(f"turn {number}: its tokens are not its text's: they are made again")
        return Turn(parts, saved.text, ids, saved.stop_reason, usage)

    def _handle(self, saved: SavedImage, number: int) -> ImageHandle:
        if saved.id not in self._handles:
            self._handles[saved.id] = self._make(saved, number)
        return self._handles[saved.id]

    def _make(self, saved: SavedImage, number: int) -> ImageHandle:
        plan = self._spec.slices.plan(saved.size, saved.max_slice_nums)
        slice_keys = saved.keys
        if not self._same_encoder or len(slice_keys) != plan.n_inputs:
            slice_keys = self._cut(saved, plan)
        borrowed = self._borrowed(saved.keys) if slice_keys == saved.keys else {}
        bundle, name = self._bundle, saved.name or "the picture"

        def read() -> bytes:
            if not bundle.has_picture(saved):
                raise BundleError(
                    f"{saved.id} ({name}): the picture is not in {bundle.path}, nor are its embeddings in the store; "
                    "take its turn back, or attach it again"
                )
            return bundle.picture(saved.picture)

        original = Original(
            read,
            slice_keys,
            max_slice_nums=saved.max_slice_nums,
            reference=saved.reference,
            digest=(lambda: saved.picture) if bundle.has_picture(saved) else None,
            embedding=lambda key: bundle.rows(borrowed[key]) if key in borrowed else None,
        )
        if bundle.has_picture(saved):
            self.known[original] = saved.picture
        theirs = {key: own for own, key in borrowed.items()}
        return ImageHandle(
            saved.id,
            saved.size,
            plan.n_inputs,
            plan.n_inputs * self._spec.vision.query_num,
            number,
            saved.name,
            plan=plan,
            keys=tuple(theirs.get(key, key) for key in slice_keys),
            pixels=lambda: cut_again(original, plan),
            original=original,
        )

    def _cut(self, saved: SavedImage, plan: SlicePlan) -> tuple[str, ...]:
        """The keys of this model; of nothing where there is no picture."""
        same = saved.picture, saved.size, saved.max_slice_nums, saved.reference
        if same not in self._cuts or not saved.picture:
            self._cuts[same] = self._cut_first(saved, plan)
        return self._cuts[same]

    def _cut_first(self, saved: SavedImage, plan: SlicePlan) -> tuple[str, ...]:
        try:
            if not self._bundle.has_picture(saved):
                raise BundleError("it is not in the file")
            with open_image(self._bundle.picture(saved.picture), reference=saved.reference) as opened:
                slices = slice_image(opened.read(at_least=plan.refined or plan.source), plan)
        except (BundleError, ImageError) as error:
            self.notes.append(f"{saved.id} ({saved.name or 'a picture'}) cannot be seen any more: {error}")
            self.has_less |= not all(key.startswith(_GONE) for key in saved.keys)
            nothing = f"gone {saved.keys} {self._spec.encoder_digest}"
            digests = (hashlib.sha256(f"{nothing} {i}".encode()).hexdigest() for i in range(plan.n_inputs))
            return tuple(_GONE + digest[len(_GONE) :] for digest in digests)
        return tuple(slice_key(pixels, self._spec.encoder_digest) for pixels in slices)

    def _borrowed(self, keys: Sequence[str]) -> dict[str, str]:
        """For embeddings that only the bundle has: a key of their own content -> the key in the bundle."""
        borrowed: dict[str, str] = {}
        shape = self._spec.vision.query_num, self._spec.llm.hidden_size
        for key in keys:
            if key in self._bundle.keys and not self._store.has(key):
                rows = self._bundle.rows(key) if self._bundle.shape(key) == shape else None
                if rows is None or not np.isfinite(rows).all():
                    self.notes.append(f"an embedding of {self._bundle.path.name} is none; it is made again")
                    continue
                digest = hashlib.sha256(f"mmchat rows {self._spec.encoder_digest}\n".encode())
                digest.update(rows.data)
                borrowed[digest.hexdigest()] = key
        return borrowed


def _policy(values: Mapping[str, Any]) -> Policy | None:
    """Raises SessionError."""
    try:
        return Policy(**values) if values else None
    except TypeError:
        raise SessionError(f"it is {ascii(dict(values))[:80]}") from None


def _called(saved: SavedModel) -> str:
    return saved.name or "unknown"


def spells(ids: Sequence[int], text: str, tokenizer: ChatTokenizer) -> bool:
    """Whether these tokens are in the tokenizer, none of them a control token, and text is what an engine shows."""
    if any(number >= tokenizer.n_ids or number in tokenizer.special_ids for number in ids):
        return False
    stream = TextStream(tokenizer.token_bytes)
    try:
        for number in ids:
            stream.push(number)
    except KeyError:  # a token that was added to the tokenizer and is no bytes
        return False
    stream.finish()
    return stream.text == text
