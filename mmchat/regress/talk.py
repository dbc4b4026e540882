"""A conversation to be tried, as a small value that a file keeps: what users attach to a report.

Every talk can be played.  What does not apply is left out: taking back a turn that is not there does nothing, editing
one asks.  So a talk stays playable while steps are taken away from it.

The file is JSON: {"format": 1, "talks": [{"policy": "error", "steps": [...]}, ...]}; more than one talk where a failure
needs those before it.  Fields that have their default are left out.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

from mmchat.checkpoint import write_atomic
from mmchat.errors import RegressError

if TYPE_CHECKING:
    from PIL import Image

Do = Literal["ask", "edit", "again", "undo", "branch"]
ASKING = ("ask", "edit", "again")
POLICIES = ("error", "trim")

STORE_BYTES = 256 << 20  # of embeddings in a folder of temporary files, which may be in memory

_FORMAT = 1
_MAX_SIDE = 8192
_COLOURS = ((220, 30, 30), (30, 60, 220), (30, 150, 50), (240, 220, 40), (250, 250, 250), (20, 20, 20))


@dataclass(frozen=True)
class Sketch:
    """A picture by numbers: a ground and an ellipse of another colour, by seed; with noise where the seed is odd.

    png: a picture's file as base64 instead.
    """

    seed: int = 0
    width: int = 64
    height: int = 64
    png: str = ""

    def draw(self) -> Image.Image:
        """Raises RegressError: png is no picture."""
        import numpy as np
        from PIL import Image, ImageDraw

        if self.png:
            try:
                with Image.open(io.BytesIO(base64.b64decode(self.png, validate=True)), formats=("PNG",)) as file:
                    return file.convert("RGB")
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                raise RegressError(f"a picture's png cannot be read ({error})") from None
        ground, shape = self.seed % len(_COLOURS), (self.seed // len(_COLOURS) + self.seed + 1) % len(_COLOURS)
        image = Image.new("RGB", (self.width, self.height), _COLOURS[ground])
        box = (self.width // 4, self.height // 4, 3 * self.width // 4, 3 * self.height // 4)
        ImageDraw.Draw(image).ellipse(box, fill=_COLOURS[shape])
        if self.seed % 2:
            noise = np.random.default_rng(self.seed).integers(-8, 9, (self.height, self.width, 3))
            image = Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8))
        return image


@dataclass(frozen=True)
class Step:
    """One thing that is done.

    do: "ask"; "edit", another question in the place of a turn's; "again", the last question once more; "undo", take
        back `turn` turns; "branch", begin session `to` with the first `turn` turns.
    session: which conversation; a number that is new begins one.
    text: the question.  rows: instead of it, digits, as many as make the whole prompt so many rows, at least one.
    pictures: before the question.  cancel_after: end the answer after so many texts; None: let it end.
    """

    do: Do = "ask"
    session: int = 0
    text: str = "?"
    rows: int = 0
    pictures: tuple[Sketch, ...] = ()
    max_new_tokens: int = 8
    cancel_after: int | None = None
    turn: int = 1
    to: int = 1


@dataclass(frozen=True)
class Talk:
    """policy: what sessions do where the context is full: "error" refuses, "trim" is mmchat's default."""

    steps: tuple[Step, ...]
    policy: str = "error"

    @property
    def n_turns(self) -> int:
        """Questions that are asked."""
        return sum(step.do in ASKING for step in self.steps)

    @property
    def size(self) -> tuple[int, ...]:
        """The smaller, the easier to read."""
        pictures = [picture for step in self.steps for picture in step.pictures]
        return (
            self.n_turns,
            len(self.steps),
            len(pictures),
            int(self.policy != "error"),
            sum(max(step.rows, len(step.text)) for step in self.steps),
            sum(step.max_new_tokens for step in self.steps),
            sum(picture.width * picture.height + picture.seed for picture in pictures),
            sum(step.session + step.turn + (step.do != "ask") + (step.cancel_after is not None) for step in self.steps),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"policy": self.policy, "steps": [_short(step) for step in self.steps]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Any) -> Talk:
        """Raises RegressError, which names the field and its value."""
        given = _object(values, "talk", ("steps", "policy"))
        policy = given.get("policy", "error")
        if policy not in POLICIES:
            raise RegressError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
        return cls(tuple(map(_step, _list(given.get("steps"), "steps"))), policy)


def save(talks: Sequence[Talk], path: str | Path) -> None:
    """Raises OSError."""
    text = json.dumps({"format": _FORMAT, "talks": [talk.to_dict() for talk in talks]}, indent=2, ensure_ascii=False)

    def write(file: IO[bytes]) -> None:
        file.write(text.encode(errors="surrogatepass") + b"\n")

    write_atomic(Path(path), write)


def load(path: str | Path) -> tuple[Talk, ...]:
    """Raises RegressError: there is no such file, or it is none of ours."""
    try:
        values = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise RegressError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise RegressError(f"{path}: is no JSON ({error})") from None
    try:
        given = _object(values, "file", ("format", "talks"))
        if given.get("format") != _FORMAT:
            raise RegressError(f"format is {given.get('format')!r}; this version reads {_FORMAT}")
        talks = tuple(map(Talk.from_dict, _list(given.get("talks"), "talks")))
        if not talks:
            raise RegressError("talks is empty")
        return talks
    except RegressError as error:
        raise RegressError(f"{path}: {error}") from None


def _short(value: Step | Sketch) -> dict[str, Any]:
    """Fields that differ from their defaults."""
    default = asdict(type(value)())
    found = {name: got for name, got in asdict(value).items() if got != default[name]}
    if isinstance(value, Step):
        found = {"do": value.do, **found}
        if value.pictures:
            found["pictures"] = [_short(picture) for picture in value.pictures]
    return found


def _step(values: Any) -> Step:
    given = _object(values, "step", tuple(field.name for field in fields(Step)))
    step = Step(**{**given, "pictures": tuple(map(_sketch, _list(given.get("pictures", []), "pictures")))})
    if step.do not in get_args(Do):
        raise RegressError(f"do is {step.do!r}; it must be one of {', '.join(get_args(Do))}")
    if not isinstance(step.text, str) or not (step.text.strip() or step.rows):
        raise RegressError(f"text is {step.text!r}; it must be a text that is not empty")
    for name, low in (("session", 0), ("rows", 0), ("max_new_tokens", 1), ("turn", 1), ("to", 0)):
        _integer(getattr(step, name), name, low)
    if step.cancel_after is not None:
        _integer(step.cancel_after, "cancel_after", 0)
    return step


def _sketch(values: Any) -> Sketch:
    given = _object(values, "picture", tuple(field.name for field in fields(Sketch)))
    sketch = Sketch(**given)
    _integer(sketch.seed, "seed", 0)
    for name in ("width", "height"):
        _integer(getattr(sketch, name), name, 1, _MAX_SIDE)
    if not isinstance(sketch.png, str):
        raise RegressError(f"png is {sketch.png!r}; it must be a text, base64")
    return sketch


def _object(values: Any, what: str, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RegressError(f"a {what} is {type(values).__name__}; it must be an object")
    if unknown := sorted(set(values) - set(names)):
        raise RegressError(f"a {what} has {', '.join(map(repr, unknown))}; known are {', '.join(names)}")
    return values


def _list(values: Any, name: str) -> list[Any]:
    if not isinstance(values, list):
        raise RegressError(f"{name} is {values!r}; it must be a list")
    return values


def _integer(value: Any, name: str, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RegressError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
