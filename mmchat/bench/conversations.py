"""The standard conversations, as data.  A picture is the seed that mmchat.bench.pictures draws it from."""

from __future__ import annotations

from dataclasses import dataclass

from mmchat.context import Policy
from mmchat.slicing import Size


@dataclass(frozen=True)
class Ask:
    """A question with new pictures.  about: the pictures that it is about, where those are not the new ones."""

    text: str
    new: tuple[int, ...] = ()
    about: tuple[int, ...] = ()
    session: int = 0


@dataclass(frozen=True)
class Rewind:
    """Take back the last turns."""

    n_turns: int
    session: int = 0


Step = Ask | Rewind


@dataclass(frozen=True)
class Conversation:
    """steps, and what is not the default of a session or a model.  size: of all pictures."""

    name: str
    steps: tuple[Step, ...]
    max_slice_nums: int | None = None
    context_rows: int | None = None
    size: Size | None = None
    policy: Policy | None = None


_EIGHT = (
    Ask("What color is the background?", new=(1,)),
    Ask("How many shapes are there?", about=(1,)),
    Ask("Which image has a white background?", new=(2, 3)),
    Ask("What shapes are there in the last image?", about=(3,)),
    Ask("Describe the image.", new=(4,)),
    Ask("What color is the background of the first image?", about=(1,)),
    Ask("Is there any text?", new=(5,)),
    Ask("Are the backgrounds of the first and the second image the same?", about=(1, 2)),
)
_REWINDS = (
    Ask("What color is the background?", new=(11,)),
    Ask("What shapes are there?", new=(12,)),
    Ask("Describe the image.", about=(12,)),
    Rewind(1),
    Ask("How many shapes are there?", about=(12,)),
    Ask("Is there a circle in the first image?", about=(11,)),
    Rewind(2),
    Ask("What is the background color of the second image?", about=(12,)),
    Ask("Describe the image.", new=(13,)),
    Rewind(1),
    Ask("Is there any text?", new=(13,)),
    Ask("Which image has a red background?", about=(11, 12, 13)),
    Rewind(3),
    Ask("Describe the image.", new=(14,)),
    Rewind(3),
    Ask("Describe the image.", new=(12,)),
)
# (question, new pictures, what it is about); the second session has pictures of its own, but for the last.
_FIVE: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("What color is the background?", (0,), ()),
    ("How many shapes are there?", (), (0,)),
    ("Describe the image.", (1,), ()),
    ("Which image has more shapes?", (), (0, 1)),
    ("Is there any text?", (25,), ()),
)


def _own(pictures: tuple[int, ...], first: int) -> tuple[int, ...]:
    return tuple(n if n == 25 else first + n for n in pictures)


_TWO = tuple(
    Ask(text, _own(new, 21 + 2 * session), _own(about, 21 + 2 * session), session)
    for text, new, about in _FIVE
    for session in (0, 1)
)
# A camera that sees the same for a while; each frame is described and forgotten.
_FRAMES = (41, 41, 42, 43, 43, 43, 44, 45, 45, 46, 47, 41)
_VIDEO = tuple(step for seed in _FRAMES for step in (Ask("Describe the image.", new=(seed,)), Rewind(1)))
# 20 pictures of which 1,024 rows hold four to six at a time; every third question is about the picture before it.
_ASKED = ("What color is the background?", "Describe the image.", "How many shapes are there?", "Is there any text?")
_MANY = tuple(
    Ask(_ASKED[number % 4], new=(100 + number,) if number % 3 else (), about=() if number % 3 else (99 + number,))
    for number in range(1, 31)
)

EIGHT = Conversation("8 turns, 5 images", _EIGHT)
STANDARD = (
    EIGHT,
    Conversation("8 turns, 5 images, not cut", _EIGHT, max_slice_nums=1),
    Conversation("rewind-heavy", _REWINDS),
    Conversation("two sessions in turns", _TWO),
    Conversation("video loop", _VIDEO, size=(320, 180)),
)
OVERFLOW = Conversation("30 turns, 20 images, overflowing", _MANY, context_rows=1024)
