"""What of a conversation is sent: the record, the newest question and the cap -> what fits, and what has to go.

Where the conversation does not fit, it is degraded step by step, the oldest first:

    overview   a picture loses its cells: its source view alone is sent, as the template sends a picture that is not
               cut.  The embedding is the one that the store has already.
    line       a picture becomes a line of text with its id, its size and what the model said of it, where that saves
               a third of its rows or more (a small model's view may be as short as the line)
    turns      a whole turn is not sent any more

The system prompt, the newest question, pinned turns and pictures stay, and so do turns with a pinned picture.  Nothing
comes back by itself, so that the rows that are sent stay the same, and an engine finds them in its cache.

A change makes an engine compute all rows after it anew.  So a trim goes on beyond what fits: down the ladder for as
long as at least Policy.keep of the cap stays filled; mmchat.bench.rehearsal counts what that saves.  And it spares the
newest turns, as many as take up to Policy.recent of the cap, for as long as there is something older: the picture
that is talked about now would else become a line before the first greeting goes.  A picture that the question names
counts as new.

Ids of pictures stand for them in texts: @img2 is sent as "image 2", with the number that the picture has in the
conversation as it is sent (from 1, as people and the published examples count; the template's own tags count from 0),
or as "img2", which is what its line calls it, where the model does not see it.

This module does no I/O and knows no engine: it counts rows by a function that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from mmchat.errors import ContextFull, SessionError
from mmchat.prompt import Message, Picture, Text
from mmchat.record import SEEN, Form, ImageHandle, Marks, Turn, images_in
from mmchat.slicing import Size

Step = Literal["overview", "line", "turns"]

# A picture becomes a line only where that saves this part of its rows.
_LINE_SAVES = 1 / 3
_DESCRIPTION_CHARS = 100
# Letters of scripts without spaces between words (Thai to Khmer, Chinese, Japanese): a word begins and ends anywhere.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
HANGUL = r"\u1100-\u11ff\uac00-\ud7ff"  # Korean puts particles at the ends of words
_MENTION = re.compile(
    rf"(?:(?<![\w@])|(?<=[{UNSPACED}{HANGUL}]))@(img[1-9][0-9]{{0,8}})(?:(?!\w)|(?=[{UNSPACED}{HANGUL}]))"
)

Part = str | ImageHandle


class Counter(Protocol):
    """Counts rows; mmchat.prompt.RowCounter is one."""

    @property
    def header(self) -> int:
        """Of the answer to come."""

    def message(self, message: Message, n_images: int = 0) -> int:
        """Of a message with n_images pictures before it."""


@dataclass(frozen=True)
class Policy:
    """What to do where a conversation does not fit.  of() takes what users write.

    steps: of the ladder, in this order; none refuses ("error").
    keep: a trim leaves at least this part of the cap filled, unless less than that is all that fits.  1 trims the
        minimum; below 0.5 an engine that rewinds computes less, and the model forgets more at a time.
    recent: the newest turns that together take up to this part of the cap are spared while something older can go.
    """

    steps: tuple[Step, ...] = ("overview", "line", "turns")
    keep: float = 0.5
    recent: float = 0.25

    def __post_init__(self) -> None:
        known = isinstance(self.steps, (list, tuple)) and all(step in get_args(Step) for step in self.steps)
        if not known or len(set(self.steps)) < len(self.steps):
            raise SessionError(f'policy is {self.steps!r}; it must be "error" or some of {", ".join(get_args(Step))}')
        for name, value in (("keep", self.keep), ("recent", self.recent)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise SessionError(f"{name} is {value!r}; it must be from 0 to 1")

    @classmethod
    def of(cls, value: Policy | str | Sequence[str] | None) -> Policy:
        """None: the default.  "error": refuse.  Else steps, as a sequence or as one text with commas.

        Raises SessionError.
        """
        if isinstance(value, Policy):
            return value
        if value is None:
            return cls()
        if not isinstance(value, (str, list, tuple)):
            raise SessionError(f'policy is {value!r}; it must be "error" or some of {", ".join(get_args(Step))}')
        names = value.split(",") if isinstance(value, str) else list(value)
        steps: tuple[Step, ...] = () if names == ["error"] else tuple(str(name).strip() for name in names)  # type: ignore[misc]
        return cls(steps)

    def __str__(self) -> str:
        return ",".join(self.steps) or "error"


@dataclass(frozen=True)
class Change:
    """One thing that is sent otherwise from now on.  what: "img3" or "turn 4"; form: what it has become."""

    what: str
    form: Literal["whole", "overview", "described", "line", "dropped"]

    def __str__(self) -> str:
        return f"{self.what} {_IN_WORDS[self.form]}"


_IN_WORDS = {
    "whole": "is sent whole",
    "overview": "is sent without its cells",
    "described": "is sent as a line of text, with its description",
    "line": "is sent as a line of text",
    "dropped": "is not sent any more",
}


@dataclass(frozen=True)
class Fitted:
    """What is sent, by marks; changes from the marks before; rows of the prompt."""

    marks: Marks
    changes: tuple[Change, ...]
    rows: int


@dataclass(frozen=True)
class Conversation:
    """system: its message.  turns: of the record.  question: the parts of the newest one; empty where there is none."""

    system: Message
    turns: Sequence[Turn]
    question: Sequence[Part] = ()

    def messages(self, marks: Marks) -> list[Message]:
        """What is sent."""
        names: dict[str, str] = {}  # what a picture is called, by its id
        messages, n_images = [self.system], 0
        for number, turn in enumerate(self.turns, 1):
            if number in marks.dropped:
                names.update((image.id, image.id) for image in turn.images)
                continue
            is_described = any(marks.form(image) == "described" for image in turn.images)
            description = _description(turn) if is_described else ""
            parts, n_images = _said(turn.parts, marks, names, n_images, description)
            messages += [Message("user", parts), Message("assistant", ids=turn.ids)]
        if self.question:
            parts, n_images = _said(self.question, marks, names, n_images, "")
            messages.append(Message("user", parts))
        return messages

    def numbers(self, marks: Marks) -> dict[str, int]:
        """The number of each picture that the model sees, from 1, by its id."""
        seen = [
            image.id
            for number, parts in enumerate([*(turn.parts for turn in self.turns), self.question], 1)
            for image in images_in(parts)
            if number not in marks.dropped and marks.form(image) in SEEN
        ]
        return {name: number for number, name in enumerate(seen, 1)}

    def rows(self, marks: Marks, counter: Counter) -> int:
        """Of the prompt."""
        return sum(message_rows(self.messages(marks), counter)) + counter.header


def message_rows(messages: Sequence[Message], counter: Counter) -> list[int]:
    n_images, rows = 0, []
    for message in messages:
        rows.append(counter.message(message, n_images))
        n_images += sum(isinstance(part, Picture) for part in message.parts)
    return rows


def _said(
    parts: Sequence[Part], marks: Marks, names: dict[str, str], n_images: int, description: str
) -> tuple[tuple[Text | Picture, ...], int]:
    """The parts of a message as they are sent, and how many pictures have then been sent.  Fills in names."""
    for image in images_in(parts):
        is_seen = marks.form(image) in SEEN
        n_images += is_seen
        names[image.id] = f"image {n_images}" if is_seen else image.id
    said = tuple(
        Text(_MENTION.sub(lambda found: names.get(found[1], found[0]), part) if "@img" in part else part)
        if isinstance(part, str)
        else as_sent(part, marks.form(part), description)
        for part in parts
    )
    return said, n_images


def as_sent(image: ImageHandle, form: Form, description: str = "") -> Text | Picture:
    """A picture in a form.  description: what the model said of it."""
    if form == "whole":
        return Picture(image.plan, image.keys)
    if form == "overview":
        return Picture(image.plan.overview, image.keys[:1])
    return Text(line_of(image.id, image.size, description if form == "described" else ""))


def line_of(name: str, size: Size, description: str = "") -> str:
    """What stands for a picture that is not sent."""
    about = f"described as: {description}" if description else "not shown"
    return f"[{name}: {size[0]}x{size[1]} picture, {about}]"


def _description(turn: Turn) -> str:
    """What the model said of the turn's picture, in one line; "" where it said nothing, or there were several."""
    if len(turn.images) != 1 or turn.stop_reason == "cancelled":
        return ""
    text = " ".join(turn.text.split())
    return text if len(text) <= _DESCRIPTION_CHARS else f"{text[:_DESCRIPTION_CHARS].rsplit(' ', 1)[0]} ..."


def mentions(parts: Sequence[Part]) -> list[str]:
    """Ids that texts name, in order, each once."""
    found = (name for part in parts if isinstance(part, str) for name in _MENTION.findall(part))
    return list(dict.fromkeys(found))


def fit(
    conversation: Conversation,
    marks: Marks,
    counter: Counter,
    *,
    cap: int,
    max_new_tokens: int,
    policy: Policy,
    longest: int | None = None,
) -> Fitted:
    """What is sent of a conversation.  The same for the same arguments.

    cap: rows that prompt and answer may take together.  longest: rows that a prompt may have; None: cap is all.

    Raises ContextFull where nothing that may go is left, or the policy is to refuse.
    """
    at = Fitted(marks, (), conversation.rows(marks, counter))
    room = cap - max_new_tokens
    if longest is not None and longest < room:
        cap, max_new_tokens, room = longest, 0, longest
    if at.rows <= room:
        return at
    best: Fitted | None = None
    for less in _descend(conversation, at, counter, cap, policy):
        if best is not None and less.rows < policy.keep * cap:
            break
        at = less
        if at.rows <= room:
            best = at
    if best is None:
        raise ContextFull(at.rows, max_new_tokens, cap, _advice(marks, policy))
    return best


def told(conversation: Conversation, fitted: Fitted) -> tuple[Change, ...]:
    """What the changes come to: each picture once, as it is sent at last; those of a turn that went, went with it."""
    numbers = {int(change.what.removeprefix("turn ")) for change in fitted.changes if change.form == "dropped"}
    gone = [image.id for number in sorted(numbers) for image in conversation.turns[number - 1].images]
    degraded = {
        change.what: change for change in fitted.changes if change.form != "dropped" and change.what not in gone
    }
    turns = (Change(f"turn {number}", "dropped") for number in sorted(numbers))
    return (*degraded.values(), *turns, *(Change(name, "dropped") for name in gone))


def _advice(marks: Marks, policy: Policy) -> str:
    if not policy.steps:
        return 'take turns back, forget pictures, or choose another policy than "error"'
    pinned = len(marks.pinned) + len(marks.pinned_turns)
    return (
        f"nothing else may go (policy {policy}, {pinned} pinned): {'unpin some, ' if pinned else ''}"
        "shorten the question, use fewer slices, or keep less for the answer"
    )


def _descend(conversation: Conversation, at: Fitted, counter: Counter, cap: int, policy: Policy) -> Iterator[Fitted]:
    """One thing less after the other; each has fewer rows than the one before."""
    spared = _first_recent(conversation, at.marks, counter, policy.recent * cap)
    for end in (spared, len(conversation.turns) + 2):  # of a picture that has just come back too
        for step in policy.steps:
            for change in _changes(conversation, at.marks, step, end, counter):
                marks = _apply(at.marks, change)
                rows = _rows_after(conversation, at, change, marks, counter)
                if rows < at.rows:
                    at = Fitted(marks, (*at.changes, change), rows)
                    yield at


def _rows_after(conversation: Conversation, at: Fitted, change: Change, marks: Marks, counter: Counter) -> int:
    """Without a turn that no other can tell from none: a long conversation loses hundreds of them."""
    if change.form == "dropped":
        turn = conversation.turns[int(change.what.removeprefix("turn ")) - 1]
        if not turn.images and not any(isinstance(part, str) and "@img" in part for part in turn.parts):
            said = tuple(Text(part) for part in turn.parts if isinstance(part, str))
            return at.rows - sum(message_rows([Message("user", said), Message("assistant", ids=turn.ids)], counter))
    return conversation.rows(marks, counter)


def _first_recent(conversation: Conversation, marks: Marks, counter: Counter, rows: float) -> int:
    """Number of the first of the newest turns that together take up to so many rows."""
    sent = [number for number in range(1, len(conversation.turns) + 1) if number not in marks.dropped]
    costs = message_rows(conversation.messages(marks), counter)[1:]  # question, answer, question, answer, ...
    first = len(conversation.turns) + 1
    for i in reversed(range(len(sent))):
        rows -= costs[2 * i] + costs[2 * i + 1]
        if rows < 0:
            break
        first = sent[i]
    return first


def _changes(conversation: Conversation, marks: Marks, step: Step, end: int, counter: Counter) -> Iterator[Change]:
    """What a step may change in turns before `end`, the oldest first.

    A picture that came back is as new as its return; one that the question names, as the question.
    """
    named = set(mentions(conversation.question))
    turns = {
        number: turn
        for number, turn in enumerate(conversation.turns, 1)
        if number not in marks.dropped and number not in marks.pinned_turns
    }

    def age(image: ImageHandle) -> int:
        if image.id in named:
            return len(conversation.turns) + 1
        return max(image.turn, marks.returned.get(image.id, 0))

    if step == "turns":
        ages = {
            number: max([number, *map(age, turn.images)])
            for number, turn in turns.items()
            if not any(image.id in marks.pinned for image in turn.images)
        }
        for number in sorted(ages, key=lambda number: (ages[number], number)):
            if ages[number] < end:
                yield Change(f"turn {number}", "dropped")
        return
    images = [
        (age(image), number, image)
        for number, turn in turns.items()
        for image in turn.images
        if image.id not in marks.pinned and age(image) < end and marks.form(image) in SEEN
    ]
    for _, number, image in sorted(images, key=lambda found: found[:2]):
        if step == "overview":
            if marks.form(image) == "whole" and image.plan.grid:
                yield Change(image.id, "overview")
            continue
        description = _description(turns[number])
        rows = _alone(image, marks.form(image), "", counter) * (1 - _LINE_SAVES)
        forms: tuple[Form, ...] = ("described", "line") if description else ("line",)
        for form in forms:
            if _alone(image, form, description, counter) <= rows:
                yield Change(image.id, form)
                break


def _alone(image: ImageHandle, form: Form, description: str, counter: Counter) -> int:
    """Rows of a picture in a form."""
    message = Message("user", (as_sent(image, form, description),))
    return counter.message(message) - counter.message(Message("user"))


def _apply(marks: Marks, change: Change) -> Marks:
    if change.form == "dropped":
        return replace(marks, dropped=marks.dropped | {int(change.what.removeprefix("turn "))})
    return replace(marks, forms={**marks.forms, change.what: change.form})
