"""Session bundles: a conversation in one file, with its pictures, that opens on another machine or engine.

A file of sections (mmchat.sections) of these kinds:

    SETT  settings and model; the last one counts
    TURN  n: turns before it; more: turns that are still to come; the turn; with the last one, state
    STAT  n: turns that are left; state
    PICT  id: a SHA-256 of what the picture was made of; the data is its file
    ROWS  key, rows, width; the data is an embedding, float32

A turn replaces the one that had its place and all after it, so taking turns back, asking again and going on are all
added at the end.  What is added together ends with STAT, or with a turn after which no more are to come.

Why a journal: after a turn with a new picture only that picture and a few KB are written, whatever the conversation
holds already (writing it anew would be 300 MB a turn with sixty photos, on an SD card); every prefix of whole sections
is a conversation; and a turn comes after its pictures, so it is never there without them.  A kill at any moment loses
at most what was being added.  The price: what was taken back stays in the file until it is written anew, which `save`
does, and so does going on with a file of which more than half is such waste.

What a bundle says is data: numbers are compared with what they may be, names are names only, text stays text.
Whatever is not whole, or not what belongs there, is left out and told in `lost`; all else is there.

A turn that is lost between others leaves a gap: a turn that says so stands in its place (`gaps`), so that turns keep
their numbers, and with them what was pinned, dropped and returned.  Later turns can stand without it: each holds its
own text, tokens and pictures with their names, and a conversation knows turns that are not sent any more, which is what
the gap becomes when it goes on (mmchat.saving).  So going on keeps the later turns; the model does not see the lost
one, as if it had gone to make room.  A new picture is named after the highest name that is there, so no later turn's
picture changes its name; a lost picture's name may be given again where no later one is known.  A picture whose file
is lost costs that file alone.

This module knows files and values: no model, no tokenizer, no session.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mmchat.engine import Sampling, StopReason
from mmchat.errors import BundleError, PromptError
from mmchat.sections import Damage, Section, SectionFile, pack
from mmchat.slicing import Size

# Far more than a conversation has; a hostile file gets no further than this.
MAX_TURNS = 100_000
MAX_RECORD_BYTES = 256 << 20
_MOST_PARTS, _MOST_KEYS, _MOST_SLICES, _LARGEST_SIDE = 4096, 1001, 1000, 1_000_000_000
_LARGEST = 2**31 - 1

_ID = re.compile(r"img[1-9][0-9]{0,8}")
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_OR_NONE = re.compile(r"([0-9a-f]{64})?")
# The shortest turn takes more: a gap is of no more turns than the bytes before it had room for, and a few.
_LEAST_TURN_BYTES, _FEW_TURNS = 88, 256
_MOST_LOSSES = 64  # that one gap can be told to come from
# Below this much a file is not worth writing anew, however much of it is waste.
_SMALL_BYTES = 256 << 10


@dataclass(frozen=True)
class SavedModel:
    """Which model a conversation was held with.

    encoder: what its pictures' keys depend on; tokenizer: SHA-256 of its file; each "" where it is not known.
    prompt: number of the prompt's format.
    """

    name: str = ""
    encoder: str = ""
    tokenizer: str = ""
    prompt: int = 0


@dataclass(frozen=True)
class SavedSettings:
    """What Runtime.session was given; None is the model's own.

    policy: a mmchat.Policy's values, for the session to check; empty where it is not known.
    sampling: values given over the model's own.  pictures, embeddings: how they are kept in the file, for who goes on.
    """

    system: str | None = None
    max_slice_nums: int | None = None
    use_image_id: bool | None = None
    reference_pixels: bool = False
    policy: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    pictures: str = "original"
    embeddings: bool = False


@dataclass(frozen=True)
class SavedImage:
    """A picture of a turn.  max_slice_nums, reference: how it was cut and read.  keys: of its slices in the store.

    picture: id of its file in the bundle; "" where there is none.
    """

    id: str
    size: Size
    name: str
    max_slice_nums: int
    reference: bool
    keys: tuple[str, ...]
    picture: str = ""


@dataclass(frozen=True)
class SavedTurn:
    """A turn as the session has it."""

    parts: tuple[str | SavedImage, ...]
    text: str
    ids: tuple[int, ...]
    stop_reason: StopReason
    usage: Mapping[str, float]

    @property
    def images(self) -> list[SavedImage]:
        return [part for part in self.parts if isinstance(part, SavedImage)]


@dataclass(frozen=True)
class SavedRecord:
    """Everything but pictures and embeddings.  state: what the session knows beyond the turns, for it to check."""

    settings: SavedSettings
    model: SavedModel
    turns: tuple[SavedTurn, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[SavedImage]:
        return [image for turn in self.turns for image in turn.images]


# What stands in the place of one.
LOST_TURN = SavedTurn(("(This turn was lost: the file it was saved in is damaged.)",), "", (), "cancelled", {})


@dataclass(frozen=True)
class _Loss:
    """Something that may have been a turn.  index: of what is told of it, in `lost`."""

    at: int
    kind: str
    why: str
    index: int


@dataclass(frozen=True)
class _Placed:
    """A turn in its place, n.  n_bytes: that it and those before it take.  at: where its section begins.

    losses: since the section of a turn that came before it in the file.
    """

    n: int
    turn: SavedTurn
    n_bytes: int
    at: int
    losses: tuple[_Loss, ...]


class Bundle:
    """A bundle that was read: its record; its pictures and embeddings when they are asked for.

    lost: what could not be read, in words.  gaps: numbers (from 1) of the record's turns that are lost, and are
    LOST_TURN there.  torn: the file ends within a section, as after a kill.  damaged: it is not whole in another way.
    """

    def __init__(self, path: str | Path, *, write: bool = False) -> None:
        """write: it will be gone on with (Journal.resume); nobody else may then.

        Raises BundleError: no such file, not a bundle, of a newer version, or another program writes to it.
        """
        self.file = SectionFile.open(Path(path), write=write)
        self.file.path = Path(os.path.realpath(path))  # whatever becomes of links and of the working folder
        self.torn = self.damaged = False
        self._lost: list[str] = []
        self._pictures: dict[str, Section] = {}
        self._rows: dict[str, Section] = {}
        self._turns: list[_Placed] = []  # in ascending places
        self._losses: list[_Loss] = []
        self._loss_places: list[int] = []
        self._settings: SavedSettings | None = None
        self._model = SavedModel()
        self._state: Mapping[str, Any] = {}
        self._n_foreign = 0
        self._is_complete = False  # nothing was begun that has not been ended
        for found in self.file.scan():
            if isinstance(found, Damage):
                self._note(found)
            else:
                try:
                    self._take(found)
                except _Wrong as error:
                    self._lose_section(found.data_at + found.n_bytes - found.size, found.kind, str(error))
        self._refuse_doubles()
        turns, self.gaps = self._in_order()
        self.record = SavedRecord(self._settings or SavedSettings(), self._model, turns, self._state)
        self._tell()
        self.lost = tuple(dict.fromkeys(self._lost))

    @property
    def path(self) -> Path:
        return self.file.path

    def has_picture(self, image: SavedImage) -> bool:
        return image.picture in self._pictures

    def picture(self, name: str) -> bytes:
        """The file of the picture with that id.  Raises BundleError: none, or changed or damaged meanwhile."""
        if name not in self._pictures:
            raise BundleError(f"{self.path}: does not hold the picture")
        return self.file.data(self._pictures[name])

    def shape(self, key: str) -> tuple[int, int] | None:
        """(rows, width) of an embedding, without a look at it; None where there is none."""
        section = self._rows.get(key)
        return None if section is None else (section.values["rows"], section.values["width"])

    def rows(self, key: str) -> NDArray[np.float32] | None:
        """An embedding (rows, width), read-only; None where there is none.  Raises BundleError: changed, damaged."""
        shape = self.shape(key)
        return None if shape is None else np.frombuffer(self.file.data(self._rows[key]), "<f4").reshape(shape)

    @property
    def pictures(self) -> dict[str, int]:
        """Ids of the pictures, and the bytes that each takes."""
        return {name: section.n_bytes for name, section in self._pictures.items()}

    @property
    def keys(self) -> dict[str, int]:
        """Keys of the embeddings, and the bytes that each takes."""
        return {key: section.n_bytes for key, section in self._rows.items()}

    @property
    def is_mostly_waste(self) -> bool:
        """Whether more than half of the file is what was taken back."""
        images = self.record.images
        pictures = sum(self.pictures.get(name, 0) for name in {image.picture for image in images})
        rows = sum(self.keys.get(key, 0) for key in {key for image in images for key in image.keys})
        needed = pictures + rows + sum(placed.n_bytes for placed in self._turns[-1:])
        return self.file.end > 2 * needed + _SMALL_BYTES

    def _take(self, section: Section) -> None:
        values = _Fields(section.values)
        self._is_complete = section.kind == "STAT" or (section.kind == "TURN" and section.values.get("more") == 0)
        if section.kind == "SETT":
            self._settings, self._model = _settings(values.inner("settings")), _model(values.inner("model"))
        elif section.kind == "TURN":
            n, turn = values.integer("n", 0, MAX_TURNS - 1), _turn(values)
            values.integer("more")
            state = values.inner("state").values if "state" in section.values else None
            self._place(n, turn, section)
            self._state = self._state if state is None else state
        elif section.kind == "STAT":
            n, self._state = values.integer("n", 0, MAX_TURNS), values.inner("state").values
            self._cut(n)
            if n <= self._n_turns:
                self._losses.clear()
        elif section.kind == "PICT":
            self._pictures.setdefault(values.text("id", _DIGEST), section)
        elif section.kind == "ROWS":
            rows, width = values.integer("rows", 1), values.integer("width", 1)
            if 4 * rows * width != section.n_bytes:
                raise _Wrong(f"{section.n_bytes} bytes are not {rows} rows of {width}")
            self._rows.setdefault(values.text("key", _DIGEST), section)
        else:
            self._n_foreign += 1

    @property
    def _n_turns(self) -> int:
        return self._turns[-1].n + 1 if self._turns else 0

    def _cut(self, n: int) -> None:
        """Take back the turns from place n on; what was lost before them is before the next one then."""
        losses: list[tuple[_Loss, ...]] = [tuple(self._losses)]
        while self._turns and self._turns[-1].n >= n:
            losses.append(self._turns.pop().losses)
        self._losses = [loss for some in reversed(losses) for loss in some][:_MOST_LOSSES]

    def _place(self, n: int, turn: SavedTurn, section: Section) -> None:
        """Raises _Wrong, and all is as before."""
        at = section.data_at + section.n_bytes - section.size
        if n - self._n_turns > _FEW_TURNS + at // _LEAST_TURN_BYTES:
            raise _Wrong(f"its n is {n}, after {self._n_turns} turns")
        i = bisect_left(self._turns, n, key=lambda placed: placed.n)
        n_bytes = section.size + (self._turns[i - 1].n_bytes if i else 0)
        if n_bytes > MAX_RECORD_BYTES:
            raise _Wrong(f"the record is over the bound of {MAX_RECORD_BYTES:,} bytes")
        if 0 < n <= self._n_turns:  # what was lost may have replaced the turn before this one
            for loss in self._losses:
                if loss.kind == "TURN" and self._lost[loss.index].endswith(")"):  # not told yet
                    self._lost[loss.index] += f"; turn {n} may be what stood there before"
        self._cut(n)
        self._turns.append(_Placed(n, turn, n_bytes, at, tuple(self._losses)))
        self._losses.clear()

    def _note(self, damage: Damage) -> None:
        if damage.torn:
            self._is_complete = False
        else:
            self._lose_section(damage.at, damage.kind, damage.why, damage.end)

    def _lose_section(self, at: int, kind: str, why: str, end: int | None = None) -> None:
        """end: of what has no kind; None where it is everything."""
        if kind in ("TURN", ""):
            self._losses.append(_Loss(at, kind, f"{why}, byte {at}", len(self._lost)))
            self._loss_places.append(at)
        if kind in ("TURN", "STAT", ""):
            self._is_complete = True  # it may have been the end of what was begun
        if kind:
            self._lose(f"{_KINDS.get(kind, 'something')} ({why}, byte {at})")
        elif end is None:
            self._lose(f"everything from byte {at} on ({why})")
        else:
            self._lose(f"what is between byte {at} and byte {end} ({why})")

    def _refuse_doubles(self) -> None:
        """Every id is one picture.  Of two turns with a loss between them, the lost one may have replaced the first."""
        known: dict[str, tuple[SavedImage, _Placed]] = {}
        replaced: set[int] = set()
        for i, placed in enumerate(self._turns):
            for image in placed.turn.images:
                first, owner = known.setdefault(image.id, (image, placed))
                if first == image:
                    continue
                if bisect_left(self._loss_places, owner.at) == bisect_left(self._loss_places, placed.at):
                    self._lose(f"turn {placed.n + 1} and what comes after it ({image.id} is two pictures)")
                    del self._turns[i:]
                    break
                replaced.add(owner.n)
                known[image.id] = image, placed
            else:
                continue
            break
        self._turns = [placed for placed in self._turns if placed.n not in replaced]

    def _in_order(self) -> tuple[tuple[SavedTurn, ...], tuple[int, ...]]:
        """All turns with what stands for lost ones, and the numbers of those; tells of them."""
        turns: list[SavedTurn] = []
        gaps: list[int] = []
        for placed in self._turns:
            missing = range(len(turns) + 1, placed.n + 1)
            if missing:
                self._tell_gap(missing, placed)
                turns += [LOST_TURN] * len(missing)
                gaps += missing
            turns.append(placed.turn)
        return tuple(turns), tuple(gaps)

    def _tell_gap(self, missing: range, following: _Placed) -> None:
        losses = [loss for loss in following.losses if loss.kind == "TURN"] or following.losses
        if len(losses) == len(missing):
            for number, loss in zip(missing, losses, strict=True):
                self._lost[loss.index] = f"turn {number} ({loss.why})"
            return
        numbers = f"turn {missing[0]}" if len(missing) == 1 else f"turns {missing[0]} to {missing[-1]}"
        if losses:
            self._lost[losses[0].index] = f"{numbers} ({losses[0].why}, and what follows)"
        else:
            self._lose(f"{numbers} (not in the file before byte {following.at})")

    def _tell(self) -> None:
        """What is only known when all was read."""
        if not self._is_complete:
            self.torn = True
            self._lost.append("what was being saved when the file was cut off")
        if self._settings is None:
            self._lose("the settings: the model's own are used")
        for image in self.record.images:
            if image.picture and not self.has_picture(image):
                self._lose(f"the picture {image.id}")
        if self._n_foreign:
            self._lost.append(f"{self._n_foreign} section(s) of kinds that this version does not know")

    def _lose(self, what: str) -> None:
        self.damaged = True
        self._lost.append(what)


_KINDS = {
    "SETT": "settings",
    "TURN": "a turn",
    "STAT": "what was taken back or changed after a turn",
    "PICT": "a picture's file",
    "ROWS": "an embedding",
}

PictureOf = Callable[[str], bytes]
RowsOf = Callable[[str], NDArray[np.float32] | None]


class Journal:
    """A bundle that a conversation is saved to as it goes on.

    picture, rows: what has the files of the record's pictures by id, and embeddings by key (None: it is left out);
    asked for what the file does not hold yet only.
    """

    def __init__(self, file: SectionFile, record: SavedRecord, pictures: set[str], keys: set[str]) -> None:
        """What the file holds already.  Use create and resume."""
        self._file, self._record, self._pictures, self._keys = file, record, pictures, keys

    @classmethod
    def create(
        cls, path: str | Path, record: SavedRecord, picture: PictureOf, rows: RowsOf, *, overwrite: bool = True
    ) -> Journal:
        """A new file, whole or not there at all.

        Raises BundleError: it cannot be written, is taken (overwrite=False), or belongs to another conversation that
        is being saved.
        """
        return cls(*_create(Path(path), record, picture, rows, overwrite, None))

    @classmethod
    def resume(cls, bundle: Bundle) -> Journal:
        """Go on with a bundle that was opened with write=True and is not damaged.  Raises BundleError."""
        assert not bundle.damaged
        try:
            bundle.file.cut()
            if bundle.torn:  # what is left of what was begun is ended
                bundle.file.append(_state(bundle.record))
        except OSError as error:
            raise _unwritable(bundle.path, error) from None
        return cls(bundle.file, bundle.record, set(bundle.pictures), set(bundle.keys))

    @classmethod
    def replace(cls, bundle: Bundle, record: SavedRecord, picture: PictureOf, rows: RowsOf) -> Journal:
        """A new file in the place of a bundle that was opened with write=True.  Raises BundleError."""
        return cls(*_create(bundle.path, record, picture, rows, True, bundle.file))

    @property
    def path(self) -> Path:
        return self._file.path

    def write(self, record: SavedRecord, picture: PictureOf, rows: RowsOf) -> None:
        """Add what has changed since, and return when it is on disk.  All of it is there then, or none.

        Where somebody removed the file, it is made again.

        Raises BundleError: it cannot be written, or another file is in its place.
        """
        if not self._file.is_in_place():
            try:
                os.stat(self.path)
            except FileNotFoundError:
                self.rewrite(record, picture, rows)
                return
            except OSError as error:
                raise _unwritable(self.path, error) from None
            raise BundleError(f"{self.path}: was replaced by another program; save the conversation elsewhere")
        pictures, keys = set(self._pictures), set(self._keys)
        try:
            self._file.append(_added(record, self._record, pictures, keys, picture, rows))
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._record, self._pictures, self._keys = record, pictures, keys

    def rewrite(self, record: SavedRecord, picture: PictureOf, rows: RowsOf) -> None:
        """Write the file anew, without what was taken back.  Raises BundleError, and the old one is there still."""
        made = _create(self.path, record, picture, rows, True, self._file)
        self._file, self._record, self._pictures, self._keys = made

    def close(self) -> None:
        """Others may write to the file from now on."""
        self._file.unlock()


def _create(
    path: Path, record: SavedRecord, picture: PictureOf, rows: RowsOf, overwrite: bool, replaces: SectionFile | None
) -> tuple[SectionFile, SavedRecord, set[str], set[str]]:
    pictures: set[str] = set()
    keys: set[str] = set()
    added = _added(record, _NOTHING, pictures, keys, picture, rows)
    return SectionFile.create(path, added, overwrite=overwrite, replaces=replaces), record, pictures, keys


@contextlib.contextmanager
def set_aside(path: Path, ending: str = "damaged") -> Iterator[Path]:
    """Give a file a name with that ending, for its own will be another's; taken back where that fails.

    Raises BundleError.
    """
    aside = next(
        (
            name
            for n in range(1, 100)
            if not (name := path.with_name(f"{path.name}.{ending}{n if n > 1 else ''}")).exists()
        ),
        None,
    )
    if aside is None:
        raise BundleError(f"{path}: must be kept under another name, and 99 of those are taken: move them away")
    try:
        try:
            os.link(path, aside)
        except OSError:  # no file has two names on an SD card's file system
            os.rename(path, aside)
    except OSError as error:
        raise _unwritable(aside, error) from None
    try:
        yield aside
    except BaseException:
        with contextlib.suppress(OSError):
            os.replace(aside, path)  # nothing happens where both are the same file
            aside.unlink(missing_ok=True)
        raise


def _unwritable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path}: cannot be written ({error.strerror or error})")


_NOTHING = SavedRecord(SavedSettings(), SavedModel(), state={"": None})  # equal to no other


def _added(
    record: SavedRecord, old: SavedRecord, pictures: set[str], keys: set[str], picture: PictureOf, rows: RowsOf
) -> Iterator[bytes]:
    """The sections that make old into record.  pictures, keys: those the file has; grow."""
    if old is _NOTHING or (record.settings, record.model) != (old.settings, old.model):
        yield from pack("SETT", {"settings": asdict(record.settings), "model": asdict(record.model)})
    n_same = next(
        (n for n, (new, known) in enumerate(zip(record.turns, old.turns, strict=False)) if new != known),
        min(len(record.turns), len(old.turns)),
    )
    for n, turn in enumerate(record.turns[n_same:], n_same):
        for image in turn.images:
            if image.picture and image.picture not in pictures:
                yield from pack("PICT", {"id": image.picture}, picture(image.picture))
                pictures.add(image.picture)
            for key in image.keys:
                found = None if key in keys else rows(key)
                if found is not None:
                    yield from _packed_rows(key, found)
                    keys.add(key)
        more = len(record.turns) - 1 - n
        last = {} if more else {"state": dict(record.state)}
        yield from pack("TURN", {"n": n, "more": more, **_turn_to_map(turn), **last})
    if n_same == len(record.turns) and record != old:
        yield from _state(record)


def _state(record: SavedRecord) -> list[bytes]:
    return pack("STAT", {"n": len(record.turns), "state": dict(record.state)})


def _packed_rows(key: str, rows: NDArray[np.float32]) -> list[bytes]:
    data = np.ascontiguousarray(rows, "<f4").tobytes()
    return pack("ROWS", {"key": key, "rows": rows.shape[0], "width": rows.shape[1]}, data)


# Values <-> maps


class _Wrong(Exception):
    """Something is not what belongs there."""


class _Fields:
    """A map whose values are taken by name and type.  Raises _Wrong."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def inner(self, name: str) -> _Fields:
        value = self.values.get(name)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self._wrong(name)
        return _Fields(value)

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
            raise self._wrong(name)
        return value

    def integer(self, name: str, low: int = 0, high: int = _LARGEST) -> int:
        value = self.values.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name)
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if type(value) is not bool:
            raise self._wrong(name)
        return value

    def items(self, name: str, most: int) -> tuple[Any, ...]:
        value = self.values.get(name)
        if not isinstance(value, tuple) or len(value) > most:
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> _Wrong:
        return _Wrong(f"its {name} is {ascii(self.values.get(name))[:60]}")


def _turn_to_map(turn: SavedTurn) -> dict[str, Any]:
    return {
        "parts": [part if isinstance(part, str) else asdict(part) for part in turn.parts],
        "text": turn.text,
        "ids": np.asarray(turn.ids, "<u4").tobytes(),  # a list would be of bounded length
        "stop_reason": turn.stop_reason,
        "usage": dict(turn.usage),
    }


def _turn(values: _Fields) -> SavedTurn:
    parts = tuple(
        part if isinstance(part, str) else _image(_Fields({"part": part}).inner("part"))
        for part in values.items("parts", _MOST_PARTS)
    )
    ids, reason = values.values.get("ids"), values.text("stop_reason")
    if not isinstance(ids, bytes) or len(ids) % 4:
        raise _Wrong("its ids are no numbers")
    if reason not in get_args(StopReason):
        raise _Wrong(f"its stop_reason is {ascii(reason)[:60]}")
    usage = values.inner("usage").values
    for name, value in usage.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise _Wrong(f"its usage has {ascii(name)[:30]} {ascii(value)[:30]}")
    numbers = tuple(np.frombuffer(ids, "<u4").tolist())
    return SavedTurn(parts, values.text("text"), numbers, cast(StopReason, reason), usage)


def _image(values: _Fields) -> SavedImage:
    size = values.items("size", 2)
    if len(size) != 2 or any(type(side) is not int or not 1 <= side <= _LARGEST_SIDE for side in size):
        raise _Wrong(f"the size of a picture is {ascii(size)[:60]}")
    keys = values.items("keys", _MOST_KEYS)
    if not keys or not all(isinstance(key, str) and _DIGEST.fullmatch(key) for key in keys):
        raise _Wrong("the keys of a picture are none")
    return SavedImage(
        values.text("id", _ID),
        (size[0], size[1]),
        plain_name(values.text("name")),
        values.integer("max_slice_nums", 1, _MOST_SLICES),
        values.flag("reference"),
        keys,
        values.text("picture", _DIGEST_OR_NONE),
    )


def plain_name(name: str) -> str:
    """A file's name without folders, and without what a terminal or a file system could take for more than a name."""
    return _COMMANDS.sub("?", re.split(r"[/\\]", name)[-1].replace("\n", "?").replace("\t", "?"))[:255]


def visible(text: str) -> str:
    """Text that commands no terminal and turns no line around: of control characters, only ends of lines and tabs."""
    return _COMMANDS.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


def _settings(values: _Fields) -> SavedSettings:
    def given(name: str) -> bool:
        return values.values.get(name) is not None

    sampling = dict(values.inner("sampling").values)
    try:
        Sampling.from_dict(sampling)
    except (PromptError, TypeError) as error:
        raise _Wrong(ascii(str(error))[:120]) from None
    return SavedSettings(
        values.text("system") if given("system") else None,
        values.integer("max_slice_nums", 1, _MOST_SLICES) if given("max_slice_nums") else None,
        values.flag("use_image_id") if given("use_image_id") else None,
        values.flag("reference_pixels"),
        _plain_values(values.inner("policy").values),
        sampling,
        values.text("pictures", re.compile("original|reencoded|jpeg|none")),
        values.flag("embeddings"),
    )


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a policy: what is neither text, a number, None nor a list of texts becomes text, which is no policy."""
    return {name: value if _is_plain(value) else ascii(value)[:60] for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def _model(values: _Fields) -> SavedModel:
    return SavedModel(
        plain_name(values.text("name")),
        values.text("encoder", _DIGEST_OR_NONE),
        values.text("tokenizer", _DIGEST_OR_NONE),
        values.integer("prompt"),
    )
