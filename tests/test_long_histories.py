"""tools.long_histories: a past is added, and nothing of it is taught."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from mmchat.context import as_sent
from mmchat.prompt import Picture
from mmchat.record import ImageHandle
from mmchat.slicing import SlicePlan
from tools.long_histories import aged, cut_plans
from tools.render_scenes import Scene, Style, sample_scene, view_plan
from tools.scene_talk import Dialogue, make_dialogue

OTHERS = [(scene, view_plan(scene.size)) for scene in (sample_scene(Random(k), held_out=False) for k in range(8))]


def drawn(rng: Random, n: int) -> tuple[list[Scene], list[SlicePlan]]:
    scenes = [sample_scene(rng, Style(sliced=True, text="42"), held_out=False) for _ in range(n)]
    return scenes, [view_plan(scene.size) for scene in scenes]


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 6))
def test_the_dialogue_goes_on_within_its_past(seed: int, n_images: int, n_lost: int) -> None:
    rng = Random(seed)
    scenes, whole = drawn(rng, n_images)
    plans = cut_plans(rng, whole, 0.5)
    dialogue = make_dialogue(rng, scenes, plans, 8)
    made = aged(rng, dialogue, whole, OTHERS, n_lost)
    assert (made.scenes, made.plans) == (dialogue.scenes, dialogue.plans)
    assert [turn for turn in made.turns if turn.taught] == [turn for turn in dialogue.turns if turn in made.turns], (
        "what is taught is the dialogue's own, in its order"
    )
    own = [turn for turn in made.turns if turn.taught or turn.about]
    assert [turn.question for turn in own] == [turn.question for turn in dialogue.turns]
    for turn, before in zip(own, dialogue.turns, strict=True):
        assert turn == before or turn == replace(before, answer=turn.answer, taught=False)
    past = [turn for turn in made.turns if not turn.taught and not turn.about]
    assert len(past) >= n_lost
    assert not any(turn.new for turn in past)
    n_cut = sum(plan != before for plan, before in zip(plans, whole, strict=True))
    assert len(past) == n_lost + n_cut  # what was read in the cells of each that lost them


def test_pictures_that_are_gone_are_named_as_the_program_names_them() -> None:
    rng = Random(5)
    scenes, whole = drawn(rng, 1)
    named, noted = 0, 0
    for _ in range(40):
        for turn in aged(rng, Dialogue(tuple(scenes), tuple(whole), ()), whole, OTHERS, 3).turns:
            named += bool(re.search(r"\bimg\d+\b", turn.question))
            noted += len(turn.notes)
            for note in turn.notes:
                assert re.fullmatch(r"\[img\d+: \d+x\d+ picture, (not shown|described as: .+)\]", note)
    assert min(named, noted) > 10


def test_a_picture_without_cells_is_what_the_program_sends() -> None:
    plan = view_plan((448, 448))
    handle = ImageHandle("img1", plan.size, plan.n_inputs, 0, 1, plan=plan, keys=("",) * plan.n_inputs, pixels=list)
    sent = as_sent(handle, "overview")
    assert isinstance(sent, Picture)
    assert plan.overview == sent.plan
