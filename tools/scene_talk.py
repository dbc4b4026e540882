"""Questions about scenes, their answers, and whole dialogues over many pictures and turns.

Answers are one sentence, the same for every wording of a question, and give the evidence before the verdict ("The
circle is blue, so no."), for a small model that must decide before it has compared decides badly.

Wordings (tools/wordings.py) are many on purpose: synonyms, lower case, no question mark, "please", indirect questions.

This module draws nothing and knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from mmchat.slicing import SlicePlan
from tools import wordings
from tools.render_scenes import (
    COLORS,
    POSITIONS,
    READABLE_PX,
    SHAPES,
    UNREADABLE_PX,
    Scene,
    Shape,
    sample_scene,
    seen_font_px,
    view_plan,
)

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
CANNOT = "I can only answer about shapes, colors, text and positions."
TOO_SMALL = "The text is too small to read."
NO_IMAGE = "There is no image yet."


@dataclass(frozen=True)
class Question:
    """What is asked, before it is worded.

    wordings: any of them asks it.  slots: what their {x}, {y}, {z} and {p} stand for; {w}, {t}, {c} and {i} stay.
    usual: asked in the task's usual form (of one thing, which is there), so that any wording of the task fits.
    """

    task: str
    wordings: tuple[str, ...]
    answer: str
    slots: tuple[tuple[str, str], ...] = ()
    usual: bool = True

    def worded(self, rng: Random) -> str:
        return self.fill(rng.choice(self.wordings))

    def fill(self, wording: str) -> str:
        for name, value in self.slots:
            wording = wording.replace(f"{{{name}}}", value)
        return wording


@dataclass(frozen=True)
class Turn:
    """new: indices of the scenes first shown with this question.  about: indices it asks about.

    distance: turns since the latest of `about` was shown; 0 is the current one.
    notes: what is said before the question, of pictures that are no longer sent.
    question_first: the new pictures stand after the question, not before it.
    taught: whether the answer follows from what is sent; else it is only part of the history.
    """

    question: str
    answer: str
    task: str
    new: tuple[int, ...] = ()
    about: tuple[int, ...] = ()
    distance: int = 0
    notes: tuple[str, ...] = ()
    question_first: bool = False
    taught: bool = True


@dataclass(frozen=True)
class Dialogue:
    """scenes in the order in which they are shown, each with the plan by which it is cut."""

    scenes: tuple[Scene, ...]
    plans: tuple[SlicePlan, ...]
    turns: tuple[Turn, ...]


def make_dialogue(
    rng: Random,
    scenes: Sequence[Scene],
    plans: Sequence[SlicePlan],
    n_turns: int,
    *,
    extras: bool = True,
    emphasis: Mapping[str, float] | None = None,
) -> Dialogue:
    """A conversation in which the scenes are shown one after the other or some together.

    extras: greetings and questions that cannot be answered too.  emphasis: factors on how often tasks are chosen.
    """
    turns: list[Turn] = []
    shown, shown_at, focus = 0, [0] * len(scenes), 0
    together = len(scenes) if rng.random() < 0.35 else 1
    asked: set[str] = set()
    if extras and rng.random() < 0.06:
        turns.append(_chat(rng, shown))
    while len(turns) < n_turns or shown < len(scenes):
        new: tuple[int, ...] = ()
        left = len(scenes) - shown
        if left and (shown == 0 or rng.random() < 0.55 or n_turns - len(turns) <= left):
            count = min(left, together if shown == 0 else (1 if rng.random() < 0.85 else 2))
            new = tuple(range(shown, shown + count))
            for k in new:
                shown_at[k] = len(turns)
            shown += count
            focus = shown - 1
        if extras and rng.random() < 0.05:
            turn = _chat(rng, shown) if not new and rng.random() < 0.3 else _foreign(rng)
            turns.append(Turn(turn.question, turn.answer, turn.task, new))
            continue
        for _ in range(8):
            turn, focus_after = _turn(rng, scenes[:shown], plans[:shown], new, focus, emphasis or {})
            if turn.question not in asked:
                break
        focus = focus_after
        asked.add(turn.question)
        distance = len(turns) - max((shown_at[k] for k in turn.about), default=len(turns))
        turns.append(Turn(turn.question, turn.answer, turn.task, new, turn.about, distance))
    return Dialogue(tuple(scenes), tuple(plans), tuple(turns))


def with_questions_first(rng: Random, dialogue: Dialogue, p: float) -> Dialogue:
    """Some of the questions that come with pictures before them, as "What is this? {{a.png}}" has it."""
    turns = (
        replace(turn, question=turn.question + rng.choice(("", " ", " ", "\n")), question_first=True)
        if turn.new and rng.random() < p
        else turn
        for turn in dialogue.turns
    )
    return replace(dialogue, turns=tuple(turns))


def _turn(
    rng: Random,
    scenes: Sequence[Scene],
    plans: Sequence[SlicePlan],
    new: tuple[int, ...],
    focus: int,
    emphasis: Mapping[str, float],
) -> tuple[Turn, int]:
    """A question about what has been shown, and the image that a question without a place would now mean."""
    n = len(scenes)
    if n == 1 and rng.random() < 0.03:
        text = word(rng, rng.choice(wordings.N_IMAGES), "", "")
        return Turn(text, "There is one image.", "n_images", new, (0,)), focus
    if n > 1 and rng.random() < 0.36:
        question = about_many(rng, scenes, plans, emphasis=emphasis)
        text = word(rng, question.worded(rng), "", "")
        return Turn(text, question.answer, question.task, new, tuple(range(n))), focus
    if n == 1 or (len(new) == 1 and rng.random() < 0.5) or (not new and focus == n - 1 and rng.random() < 0.25):
        k = n - 1
        placed = rng.random() < 0.2
    else:
        k = rng.randrange(n) if rng.random() < 0.8 else n - 1
        placed = True
    question = about_one(rng, scenes[k], plans[k], emphasis=emphasis)
    name = image_name(rng, k, n, new) if placed else ""
    target = name or rng.choice(("the image", "this image"))
    text = word(rng, question.worded(rng), name, f" {target}")
    return Turn(text, question.answer, question.task, new, (k,)), k


def about_one(
    rng: Random,
    scene: Scene,
    plan: SlicePlan,
    task: str | None = None,
    emphasis: Mapping[str, float] | None = None,
) -> Question:
    """A question about one picture; of the given task where the picture allows it."""
    question = _one_of(rng, _ONE, task, emphasis, scene, plan)
    if question is None and task is not None:
        raise ValueError(f"no question of task {task!r} about {scene.facts!r}")
    return question or Question("background", wordings.BACKGROUND, f"The background is {scene.background}.")


def about_many(
    rng: Random,
    scenes: Sequence[Scene],
    plans: Sequence[SlicePlan],
    task: str | None = None,
    emphasis: Mapping[str, float] | None = None,
) -> Question:
    """A question that compares the pictures, of which there are two or more."""
    question = _one_of(rng, _MANY, task, emphasis, scenes, plans)
    if question is None and task is not None:
        raise ValueError(f"no question of task {task!r} about these pictures")
    return question or Question("n_images", wordings.N_IMAGES, f"There are {NUMBERS[len(scenes)]} images.")


def _one_of(
    rng: Random,
    tasks: Sequence[tuple[str, Callable[..., Question | None], float]],
    task: str | None,
    emphasis: Mapping[str, float] | None,
    *shown: Any,
) -> Question | None:
    """None where 30 tries made no question about what is shown."""
    factors = emphasis or {}
    among = [(maker, weight * factors.get(name, 1.0)) for name, maker, weight in tasks if task is None or name == task]
    makers, weights = zip(*among, strict=True)
    for _ in range(30):
        (maker,) = rng.choices(makers, weights)
        question: Question | None = maker(rng, *shown)
        if question is not None:
            return question
    return None


def text_state(scene: Scene, plan: SlicePlan) -> str:
    """Whether the text is "readable" in some view, too "small" in all, in "doubt", or there is "none"."""
    if scene.text is None:
        return "none"
    seen = seen_font_px(scene, plan)
    if seen >= READABLE_PX + 1:
        return "readable"
    return "small" if seen <= UNREADABLE_PX + 0.75 else "doubt"


def describe(scene: Scene, plan: SlicePlan) -> str:
    """All facts of a picture in one sentence."""
    parts = [f"{article(_name(s))} {at(s.position)}" for s in scene.shapes]
    state = text_state(scene, plan)
    if scene.text is not None:
        parts.append(f"the {scene.text.kind} {scene.text.text}" if state == "readable" else "some small text")
    if not parts:
        return f"A plain {scene.background} background."
    return f"{article(scene.background).capitalize()} background with {_joined(parts)}."


def word(rng: Random, wording: str, name: str, target: str) -> str:
    """The question as somebody might type it.

    name: of the image it is about ("the first image"; "" for the current one).  target: the same for slots {t}.
    """
    noun = rng.choices(("image", "picture", "photo", "pic"), (0.5, 0.3, 0.17, 0.03))[0]
    where = f" {rng.choice(('in', 'in', 'in', 'on'))} {name}" if name else ""
    if not name and "{w}" in wording and rng.random() < 0.25:
        where = rng.choice((" in the image", " in this image", " in it", " here"))
    front = ""
    needs_place = "{x}" not in wording and re.search(r"(\b(is|was|are)|'s)\{w\}", wording) is not None
    if name and "{w}" in wording and rng.random() < 0.25:
        front, where = f"{where[1:].capitalize()}, ", ""
        if needs_place:
            wording = wording.replace("{w}", " there{w}")
    elif needs_place and not where:
        where = " in the image"
    if "{t}" in wording and not target:
        target = " the image"
    text = wording.replace("{w}", where).replace("{t}", target).replace("{i}", "image")
    text = text.replace("{c}", rng.choice(("color", "colour")))
    if not name or "{w}" in wording or "{t}" in wording:
        text = front + (text[:1].lower() + text[1:] if front else text)
    else:  # the wording has no place for the image's name
        text = f"In {name}, {text[:1].lower()}{text[1:]}"
    text = re.sub(r"\bimage", noun, re.sub(r"\bImage", noun.capitalize(), text))
    if rng.random() < 0.3:
        text = text.replace("gray", "grey")
    return _typed(rng, text)


def image_name(rng: Random, k: int, n: int, new: tuple[int, ...] = ()) -> str:
    """What to call the k-th of n images shown so far; new: the ones shown with this very question."""
    ordinal = ORDINALS[k]
    names = [f"the {ordinal} image"] * 10 + [f"image {k + 1}"] * 4 + [f"the {ordinal} one", f"image number {k + 1}"] * 2
    names += [f"image {NUMBERS[k + 1]}"] * 2
    names += [f"the {('1st', '2nd', '3rd', '4th', '5th', '6th', '7th', '8th')[k]} image"] * 2
    names += [f"image no. {k + 1}", f"image #{k + 1}", f"my {ordinal} image", f"the {ordinal} image that I sent"]
    names += [f"the {ordinal} image I showed you", f"the {ordinal} of the images", f"number {NUMBERS[k + 1]}"]
    if k == n - 1:
        names += ["the last image", "the latest image"] * 2
        names += ["the newest image", "the most recent image", "the final image", "the last one"]
        if len(new) == 1:
            names += ["this image", "the new image", "the current image"] * 2 + ["this one", "the image I just sent"]
    if k == n - 2 and len(new) == 1:
        names += ["the previous image"] * 4 + ["the image before"] * 2
        names += ["the previous one", "the one before", "the image before this one", "the preceding image"]
    if k == 0 and n > 1:
        names += ["the image I sent first", "the very first image", "the oldest image", "the initial image"]
    if k == 0 and n == 2:
        names += ["the earlier image"] * 2 + ["the other image"] * (len(new) == 1)
    return rng.choice(names)


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def at(position: str) -> str:
    """A position as the end of a sentence."""
    return {"left": "on the left", "right": "on the right", "center": "in the center"}.get(
        position, f"at the {position}"
    )


def plural(noun: str, n: int) -> str:
    return noun if n == 1 else noun + ("es" if noun.endswith("s") else "s")


def train_tokenizer(seed: int, n_dialogues: int = 5000) -> str:
    """tokenizer.json: byte-level BPE over the dialogues' words; printed words stay spelled letter by letter."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = Random(f"tokenizer {seed}")
    lines = ["system", "user", "assistant", "You are a helpful assistant."] * 200
    for _ in range(n_dialogues):
        scenes = [sample_scene(rng, held_out=False) for _ in range(rng.randint(1, 4))]
        dialogue = make_dialogue(rng, scenes, [view_plan(scene.size) for scene in scenes], 6)
        for turn in dialogue.turns:
            lines += [re.sub(r"\b[A-Z]{2,}\b", "", text) for text in (turn.question, turn.answer)]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (
        "<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>",
        "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=800 - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)


def _typed(rng: Random, text: str) -> str:
    r = rng.random()
    if r < 0.05:
        text = f"Please {text[0].lower()}{text[1:]}" if not text.lower().startswith("please") else text
    elif r < 0.08:
        text = f"{text[:-1]}, please{text[-1]}"
    elif r < 0.16:
        opener = rng.choice(wordings.OPENERS)
        text = f"{opener} {text if opener.endswith('.') else text[0].lower() + text[1:]}"
    elif r < 0.18:
        text = f"{text} {rng.choice(wordings.CLOSERS)}"
    if rng.random() < 0.22 and not re.search(r"\b[A-Z]{2,}\b", text):
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    elif rng.random() < 0.06:
        text = text.rstrip("?.!") + rng.choice((" ?", ".", "?", "!"))
    return text


def _chat(rng: Random, shown: int) -> Turn:
    if not shown and rng.random() < 0.25:
        return Turn(_typed(rng, rng.choice(wordings.TOO_EARLY)), NO_IMAGE, "chat")
    questions, answer = rng.choice(wordings.CHAT)
    return Turn(rng.choice(questions), answer, "chat")


def _foreign(rng: Random) -> Turn:
    if rng.random() < 0.5:
        return Turn(_typed(rng, rng.choice(wordings.FOREIGN)), CANNOT, "cannot")
    wording = rng.choice(wordings.FOREIGN_NOUN).replace("{n}", rng.choice(wordings.NOUNS))
    return Turn(_typed(rng, wording), CANNOT, "cannot")


def _name(shape: Shape) -> str:
    return f"{shape.color} {shape.kind}"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _are(n: int, noun: str) -> str:
    return f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {plural(noun, n)}."


def _pick_kind(rng: Random, scene: Scene) -> tuple[str, list[Shape]]:
    """A kind of shape, now and then one that is not there, and the shapes of it."""
    there = bool(scene.shapes) and rng.random() < 0.93
    kind = rng.choice(scene.shapes).kind if there else rng.choice(SHAPES)
    return kind, [s for s in scene.shapes if s.kind == kind]


def _pick_color(rng: Random, scene: Scene) -> tuple[str, list[Shape]]:
    if scene.shapes and rng.random() < 0.93:
        color = rng.choice(scene.shapes).color
    else:
        color = rng.choice([c for c in COLORS if c != scene.background])
    return color, [s for s in scene.shapes if s.color == color]


def _color(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    kind, found = _pick_kind(rng, scene)
    if len(found) > 1:
        answer = f"The {plural(kind, 2)} are {_joined([s.color for s in found])}."
        return Question("color", wordings.COLORS_OF, answer, (("x", plural(kind, 2)),), usual=False)
    answer = f"The {kind} is {found[0].color}." if found else f"There is no {kind}."
    return Question("color", wordings.COLOR, answer, (("x", kind),), usual=bool(found))


def _shape(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    color, found = _pick_color(rng, scene)
    if len(found) > 1:
        answer = f"The {color} shapes are {_joined([article(s.kind) for s in found])}."
    else:
        answer = f"The {color} shape is {article(found[0].kind)}." if found else f"There is no {color} shape."
    return Question("shape", wordings.SHAPE, answer, (("x", color),), usual=len(found) == 1)


def _where(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    kind, found = _pick_kind(rng, scene)
    name = kind
    if found and rng.random() < 0.3:
        shape = rng.choice(found)
        name = _name(shape)
        found = [s for s in found if s.color == shape.color]
    if len(found) > 1:
        return None
    answer = f"The {name} is {at(found[0].position)}." if found else f"There is no {name}."
    return Question("where", wordings.WHERE, answer, (("x", name),), usual=bool(found))


def _count(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    return Question("count", wordings.COUNT, _are(len(scene.shapes), "shape"))


def _count_kind(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    there = bool(scene.shapes) and rng.random() < 0.8
    by_kind = rng.random() < 0.7
    if by_kind:
        name = rng.choice(scene.shapes).kind if there else rng.choice(SHAPES)
        n = sum(s.kind == name for s in scene.shapes)
    else:
        color = rng.choice(scene.shapes).color if there else rng.choice(tuple(COLORS))
        name = f"{color} shape"
        n = sum(s.color == color for s in scene.shapes)
    return Question("count_kind", wordings.COUNT_KIND, _are(n, name), (("x", plural(name, 2)),))


def _at(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    there = bool(scene.shapes) and rng.random() < 0.8
    position = rng.choice(scene.shapes).position if there else rng.choice(POSITIONS)
    place = at(position)
    found = [s for s in scene.shapes if s.position == position]
    if not found and scene.text is not None:
        return None  # whether text counts as a thing there is a matter of taste
    answer = f"{article(_name(found[0])).capitalize()} is {place}." if found else f"There is no shape {place}."
    if rng.random() < 0.25:
        place = {"center": rng.choice(("in the middle", "at the center", "in the centre"))}.get(position, place)
        place = place.replace("at the ", rng.choice(("at the ", "in the ", "on the ")))
    return Question("at", wordings.AT, answer, (("x", place),), usual=bool(found))


def _exists(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    """Balanced: half are there; what is not there shares its colour or its kind with something more often than not."""
    r = rng.random()
    there = rng.random() < 0.36 and bool(scene.shapes)  # what is drawn below is there now and then, too
    shape = rng.choice(scene.shapes) if scene.shapes else None
    color, kind = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
    if shape and there:
        color, kind = shape.color, shape.kind
    elif shape and rng.random() < 0.7:
        color, kind = (shape.color, kind) if rng.random() < 0.4 else (color, shape.kind)
    of_kind = [s for s in scene.shapes if s.kind == kind]
    of_color = [s for s in scene.shapes if s.color == color]
    if r < 0.2:
        found, noun, missing = of_kind, kind, kind
    elif r < 0.35:
        found, noun, missing = (
            of_color,
            f"{color} {rng.choice(('shape', 'shape', 'object', 'thing'))}",
            f"{color} shape",
        )
    else:
        found, noun, missing = [s for s in of_kind if s.color == color], f"{color} {kind}", kind
    if r < 0.35:
        names = [article(_name(s)) for s in found]
        evidence = f"There is {_joined(names)}" if found else f"There is no {missing}"
    elif len(of_kind) > 1:
        evidence = f"The {plural(kind, 2)} are {_joined([s.color for s in of_kind])}"
    else:
        evidence = f"The {kind} is {of_kind[0].color}" if of_kind else f"There is no {missing}"
    slots = (("x", article(noun)), ("y", noun), ("z", plural(noun, 2)))
    return Question("exists", wordings.EXISTS, f"{evidence}, so {'yes' if found else 'no'}.", slots)


def _background(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    return Question("background", wordings.BACKGROUND, f"The background is {scene.background}.")


def _text(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    state = text_state(scene, plan)
    if scene.text is None or state == "doubt":
        return None
    kind = scene.text.kind
    asked = kind if rng.random() < 0.94 else ("word" if kind == "number" else "number")
    among = wordings.KIND_OF_TEXT if rng.random() < 0.55 else wordings.TEXT
    task, answer = (kind, f"The {kind} is {scene.text.text}.") if state == "readable" else ("too_small", TOO_SMALL)
    return Question(task, among, answer, (("x", asked),), usual=asked == kind)


def _no_text(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    if scene.text is not None:
        return None
    among = wordings.TEXT if rng.random() < 0.5 else wordings.KIND_OF_TEXT
    return Question("no_text", among, "There is no text.", (("x", rng.choice(("word", "number"))),))


def _has_text(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    state = text_state(scene, plan)
    if state == "none":
        return Question("has_text", wordings.HAS_TEXT, "There is no text, so no.")
    if scene.text is None or state == "doubt":
        return None
    what = "some small text" if state == "small" else f"the {scene.text.kind} {scene.text.text}"
    return Question("has_text", wordings.HAS_TEXT, f"There is {what}, so yes.")


def _list(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    if not scene.shapes:
        return Question("list", wordings.LIST, "There are no shapes.")
    return Question("list", wordings.LIST, f"{_joined([article(_name(s)) for s in scene.shapes]).capitalize()}.")


def _describe(rng: Random, scene: Scene, plan: SlicePlan) -> Question | None:
    if text_state(scene, plan) == "doubt":
        return None
    return Question("describe", wordings.DESCRIBE, describe(scene, plan))


def _verdicts(holds: Sequence[bool], thing: str) -> str:
    """ "First: no. Second: yes. The second image has a star." """
    evidence = " ".join(f"{ORDINALS[k].capitalize()}: {'yes' if held else 'no'}." for k, held in enumerate(holds))
    which = [ORDINALS[k] for k, held in enumerate(holds) if held]
    if not which:
        return f"{evidence} No image has {thing}."
    return f"{evidence} The {_joined(which)} image{'s have' if len(which) > 1 else ' has'} {thing}."


def _which(rng: Random, scenes: Sequence[Scene], plans: Sequence[SlicePlan]) -> Question | None:
    shapes = [s for scene in scenes for s in scene.shapes]
    if not shapes:
        return None
    r = rng.random()
    if r < 0.15:
        color = rng.choice(scenes).background
        thing = f"{article(color)} background"
        holds = [scene.background == color for scene in scenes]
    else:
        shape = rng.choice(shapes)
        color, kind = shape.color, shape.kind
        if rng.random() < 0.08:
            color, kind = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if r < 0.6:
            thing = article(kind)
            holds = [any(s.kind == kind for s in scene.shapes) for scene in scenes]
        else:
            thing = article(f"{color} {kind}")
            holds = [any(s.kind == kind and s.color == color for s in scene.shapes) for scene in scenes]
    if sum(holds) > 1 and rng.random() < 0.7:
        return None
    return Question("which", wordings.WHICH, _verdicts(holds, thing), (("x", thing),))


def _which_text(rng: Random, scenes: Sequence[Scene], plans: Sequence[SlicePlan]) -> Question | None:
    states = [text_state(scene, plan) for scene, plan in zip(scenes, plans, strict=True)]
    if "doubt" in states or "small" in states or states.count("readable") in (0, len(states)):
        return None
    r = rng.random()
    text = rng.choice([scene.text for scene in scenes if scene.text])
    if r < 0.4:
        thing, holds = "text", [scene.text is not None for scene in scenes]
    elif r < 0.75:
        thing, holds = f"a {text.kind}", [scene.text is not None and scene.text.kind == text.kind for scene in scenes]
    else:
        thing = f"the {text.kind} {text.text}"
        holds = [scene.text is not None and scene.text.text == text.text for scene in scenes]
    return Question("which_text", wordings.WHICH_TEXT, _verdicts(holds, thing), (("x", thing),))


def _some_images(rng: Random, n: int) -> tuple[list[int], str]:
    """Two or all of n images, and what to call them."""
    if n > 2 and rng.random() < 0.5:
        a, b = sorted(rng.sample(range(n), 2))
        names = (f"the {ORDINALS[a]} and the {ORDINALS[b]} image", f"image {a + 1} and image {b + 1}",
                 f"images {a + 1} and {b + 1}", f"the {ORDINALS[a]} and {ORDINALS[b]} images")  # fmt: skip
        return [a, b], rng.choice(names)
    names_all = [f"the {NUMBERS[n]} images", "all images", "the images", "these images"]
    if n == 2:
        names_all += ["both images", "both images", "the first and the second image", "image 1 and image 2"]
    return list(range(n)), rng.choice(names_all)


def _backgrounds_of(scenes: Sequence[Scene], chosen: Sequence[int]) -> str:
    text = _joined([f"the {ORDINALS[k]} is {scenes[k].background}" for k in chosen])
    return text[0].upper() + text[1:]


def _same(rng: Random, scenes: Sequence[Scene], plans: Sequence[SlicePlan]) -> Question | None:
    chosen, names = _some_images(rng, len(scenes))
    same = len({scenes[k].background for k in chosen}) == 1
    if not same and rng.random() < 0.4:
        return None
    answer = f"{_backgrounds_of(scenes, chosen)}, so {'yes' if same else 'no'}."
    return Question("same_background", wordings.SAME, answer, (("p", names),))


def _backgrounds(rng: Random, scenes: Sequence[Scene], plans: Sequence[SlicePlan]) -> Question | None:
    chosen, names = _some_images(rng, len(scenes))
    return Question("backgrounds", wordings.BACKGROUNDS, f"{_backgrounds_of(scenes, chosen)}.", (("p", names),))


def _more(rng: Random, scenes: Sequence[Scene], plans: Sequence[SlicePlan]) -> Question | None:
    counts = [len(scene.shapes) for scene in scenes]
    most = max(counts)
    evidence = _joined([f"the {ORDINALS[k]} has {NUMBERS[n] if n else 'none'}" for k, n in enumerate(counts)])
    which = [ORDINALS[k] for k, n in enumerate(counts) if n == most]
    verdict = f"the {_joined(which)} image{'s' if len(which) > 1 else ''}"
    return Question("more", wordings.MORE, f"{evidence[0].upper()}{evidence[1:]}, so {verdict}.")


def _n_images(rng: Random, scenes: Sequence[Scene], plans: Sequence[SlicePlan]) -> Question | None:
    return Question("n_images", wordings.N_IMAGES, f"There are {NUMBERS[len(scenes)]} images.")


_One = Callable[[Random, Scene, SlicePlan], Question | None]
_Many = Callable[[Random, Sequence[Scene], Sequence[SlicePlan]], Question | None]
_ONE: tuple[tuple[str, _One, float], ...] = (
    ("color", _color, 1.2),
    ("shape", _shape, 1.0),
    ("where", _where, 1.2),
    ("count", _count, 0.9),
    ("count_kind", _count_kind, 0.7),
    ("at", _at, 1.0),
    ("exists", _exists, 1.3),
    ("background", _background, 0.7),
    ("text", _text, 3.0),
    ("no_text", _no_text, 0.6),
    ("has_text", _has_text, 0.6),
    ("list", _list, 0.8),
    ("describe", _describe, 1.4),
)
_MANY: tuple[tuple[str, _Many, float], ...] = (
    ("which", _which, 2.6),
    ("which_text", _which_text, 0.8),
    ("same_background", _same, 1.6),
    ("backgrounds", _backgrounds, 0.8),
    ("more", _more, 1.0),
    ("n_images", _n_images, 0.6),
)
