"""What the history of a long conversation holds beside what can still be seen.

mmchat makes room by sending old pictures without their cells, then as a line of text, and by dropping the oldest
turns (mmchat/context.py).  What was asked about them stays, under the handle ("img7"), with answers that nothing sent
bears out; and some of the model's own earlier answers are wrong.  A model that has never seen such histories believes
them instead of the picture.  Answers of that kind are not taught (Turn.taught).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from mmchat.context import line_of
from mmchat.slicing import SlicePlan
from tools.render_scenes import Scene
from tools.scene_talk import Dialogue, Turn, about_many, about_one, describe, text_state, word

Drawn = tuple[Scene, SlicePlan]


def aged(rng: Random, dialogue: Dialogue, whole: Sequence[SlicePlan], others: Sequence[Drawn], n_lost: int) -> Dialogue:
    """The dialogue with a past: turns about pictures that are gone, answers from before, and wrong ones.

    whole: plans of the dialogue's pictures before any of them lost its cells.  others: what was on the pictures that
    are gone.  n_lost: turns about these; they come early more often than late.
    """
    turns: list[Turn] = []
    p_wrong = rng.choice((0.0, 0.0, 0.08, 0.2))
    for turn in dialogue.turns:
        wrong = _answer_about(rng, rng.choice(others), turn) if rng.random() < p_wrong and not turn.new else None
        turns.append(turn if wrong is None else replace(turn, answer=wrong, taught=False))
        turns += [
            _about(rng, (dialogue.scenes[k], whole[k]), f"image {k + 1}", "text")
            for k in turn.new
            if whole[k] != dialogue.plans[k] and text_state(dialogue.scenes[k], whole[k]) == "readable"
        ]
    newest = rng.randint(1, 60)
    for _ in range(n_lost):
        place = int(len(turns) * rng.random() ** 1.7)
        turns.insert(place, _lost(rng, others, max(1, newest - rng.randrange(6))))
    return Dialogue(dialogue.scenes, dialogue.plans, tuple(turns))


def _lost(rng: Random, others: Sequence[Drawn], number: int) -> Turn:
    """A turn about pictures that are gone; now and then the one with which the picture came."""
    if rng.random() < 0.12:
        few = [rng.choice(others) for _ in range(rng.randint(2, 4))]
        question = about_many(rng, [scene for scene, _ in few], [plan for _, plan in few])
        return Turn(word(rng, question.worded(rng), "", ""), question.answer, question.task, taught=False)
    scene, plan = rng.choice(others)
    if rng.random() < 0.7:
        return _about(rng, (scene, plan), f"img{number}")
    note = line_of(f"img{number}", scene.size, describe(scene, plan) if rng.random() < 0.7 else "")
    return replace(_about(rng, (scene, plan), ""), notes=(note,))


def _about(rng: Random, drawn: Drawn, name: str, task: str | None = None) -> Turn:
    question = about_one(rng, *drawn, task)
    text = word(rng, question.worded(rng), name, f" {name or 'the image'}")
    return Turn(text, question.answer, question.task, taught=False)


def _answer_about(rng: Random, other: Drawn, turn: Turn) -> str | None:
    """What would have been said of another picture; None where that says nothing else, or cannot be said."""
    if len(turn.about) != 1 or turn.task not in ("color", "shape", "where", "count", "at", "background", "list"):
        return None
    try:
        answer = about_one(rng, *other, turn.task).answer
    except ValueError:
        return None
    return answer if answer != turn.answer else None


def cut_plans(rng: Random, plans: Sequence[SlicePlan], p_cut: float) -> list[SlicePlan]:
    """Plans of which some lost their cells."""
    return [plan.overview if plan.n_inputs > 1 and rng.random() < p_cut else plan for plan in plans]
