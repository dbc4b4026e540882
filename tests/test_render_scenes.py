"""tools.render_scenes and tools.scene_talk: reproducible, true to the pixels, and split for evaluation."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tools import wordings
from tools.render_scenes import (
    COLORS,
    DEFAULT_FONT,
    POSITIONS,
    READABLE_PX,
    SHAPES,
    UNREADABLE_PX,
    WORDS,
    Scene,
    Style,
    draw,
    plain_scene,
    random_text,
    render,
    sample_scene,
    seen_font_px,
    view_boxes,
    view_plan,
)
from tools.scene_talk import about_many, about_one, describe, make_dialogue, text_state, with_questions_first

REPHRASINGS = Path(__file__).parent / "data" / "rephrasings.json"


def held_out_scenes(n: int, style: Style | None = None) -> list[Scene]:
    rng = Random(7)
    return [sample_scene(rng, style, held_out=True) for _ in range(n)]


def test_a_seed_gives_the_same_bytes_every_time() -> None:
    for seed in range(20):
        first, first_scene = render(seed)
        second, second_scene = render(seed)
        assert first.tobytes() == second.tobytes()
        assert first_scene == second_scene


def test_seeds_give_different_pictures() -> None:
    digests = {hashlib.sha256(render(seed)[0].tobytes()).digest() for seed in range(40)}
    assert len(digests) == 40


def test_training_never_meets_the_facts_of_a_held_out_scene() -> None:
    rng = Random(1)
    training = {sample_scene(rng, held_out=False).facts for _ in range(300)}
    held_out = {sample_scene(rng, held_out=True).facts for _ in range(100)}
    assert not training & held_out
    assert not any(render(seed, held_out=False)[1].held_out for seed in range(50))
    assert all(render(seed)[1].held_out for seed in range(20))


def test_held_out_pictures_use_only_the_font_that_every_machine_has() -> None:
    fonts = {scene.text.font for scene in held_out_scenes(80) if scene.text}
    assert fonts == {DEFAULT_FONT}


def test_a_style_that_contradicts_the_split_is_refused() -> None:
    held_out = plain_scene((100, 100), "red").held_out
    style = Style(size=(100, 100), background="red", n_shapes=0, text="")
    with pytest.raises(ValueError, match="2000 tries"):
        sample_scene(Random(1), style, held_out=not held_out)


def test_the_pixels_are_what_the_scene_says() -> None:
    for scene in held_out_scenes(120):
        pixels = np.asarray(draw(scene), dtype=np.int64)
        assert pixels.shape == (scene.size[1], scene.size[0], 3)
        tolerance = 5 * scene.noise + 2
        for shape in scene.shapes:
            x, y = (round(v) for v in shape.center)
            assert np.abs(pixels[y, x] - shape.rgb).max() <= tolerance, (scene, shape)
        drawn = [abs(pixels[y, x] - scene.background_rgb).max() for x, y in _free_points(scene)]
        assert max(drawn, default=0) <= tolerance, scene
        if scene.text:
            left, top, right, bottom = (round(v) for v in scene.text.box)
            ink = np.abs(pixels[top:bottom, left:right] - scene.background_rgb).max(axis=2)
            assert (ink > 60).mean() > 0.05, scene


def _free_points(scene: Scene) -> list[tuple[int, int]]:
    """Points well away from everything that is drawn."""
    points = []
    for x in range(2, scene.size[0] - 2, 9):
        for y in range(2, scene.size[1] - 2, 9):
            near = any(np.hypot(x - s.center[0], y - s.center[1]) < s.radius * 1.35 + 3 for s in scene.shapes)
            for printed in scene.texts:
                left, top, right, bottom = printed.box
                near |= left - 4 <= x <= right + 4 and top - 4 <= y <= bottom + 4
            if not near:
                points.append((x, y))
    return points


def test_shapes_lie_in_the_third_that_their_position_names_and_do_not_touch() -> None:
    for scene in held_out_scenes(150):
        width, height = scene.size
        for shape in scene.shapes:
            x, y = shape.center
            assert int(3 * y / height) * 3 + int(3 * x / width) == shape.cell
            assert shape.radius * 0.9 <= x <= width - shape.radius * 0.9
            assert shape.radius * 0.9 <= y <= height - shape.radius * 0.9
            for other in scene.shapes:
                if other is not shape:
                    assert np.hypot(x - other.center[0], y - other.center[1]) > shape.radius + other.radius


def test_shapes_are_like_earlier_ones_as_often_as_wanted() -> None:
    def alike(p_like: float) -> int:
        rng = Random("alike")
        scenes = [sample_scene(rng, Style(n_shapes=3, text="", p_like=p_like), held_out=False) for _ in range(150)]
        return sum(
            len({s.color for s in scene.shapes}) < 3 or len({s.kind for s in scene.shapes}) < 3 for scene in scenes
        )

    assert alike(0.0) < 120 < alike(0.7)


def test_spelling_brings_what_words_and_usual_numbers_do_not_teach() -> None:
    rng = Random("spelling")
    texts = [random_text(rng, spelling=True) for _ in range(1000)]
    numbers = [text for text in texts if text.isdigit()]
    assert all(text in WORDS or text.isdigit() for text in (random_text(rng) for _ in range(200)))
    assert all(str(int(number)) == number and int(number) <= 999 for number in numbers)
    assert sum(any(a == b for a, b in itertools.pairwise(n)) for n in numbers) > len(numbers) / 5
    assert sum(text not in WORDS and text.isalpha() for text in texts) > 100


def test_small_print_is_readable_in_a_cell_and_nowhere_else() -> None:
    for scene in held_out_scenes(60, Style(sliced=True, p_text=1.0, print_size="small")):
        assert scene.text is not None
        assert seen_font_px(scene, view_plan(scene.size)) >= READABLE_PX + 1
        assert seen_font_px(scene, view_plan(scene.size, 1)) <= UNREADABLE_PX + 0.75
        assert text_state(scene, view_plan(scene.size)) == "readable"
        assert text_state(scene, view_plan(scene.size, 1)) == "small"


def test_large_print_is_readable_in_the_whole_view() -> None:
    for scene in held_out_scenes(60, Style(sliced=True, p_text=1.0, print_size="large")):
        assert text_state(scene, view_plan(scene.size, 1)) == "readable"


@pytest.mark.parametrize("size", [(200, 200), (640, 480), (1008, 672), (90, 300)])
def test_the_boxes_of_the_cells_tile_the_picture(size: tuple[int, int]) -> None:
    plan = view_plan(size)
    boxes = view_boxes(plan)
    assert len(boxes) == plan.n_inputs
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes[1:])
    assert area == pytest.approx(size[0] * size[1])


def test_a_plain_scene_is_drawn_in_pure_colours() -> None:
    scene = plain_scene((200, 200), "blue", [("red", "circle", "center")])
    image = draw(scene)
    assert image.getpixel((100, 100)) == (255, 0, 0)
    assert image.getpixel((5, 5)) == (0, 0, 255)
    assert {color for _, color in image.getcolors() or []} == {(255, 0, 0), (0, 0, 255)}
    assert describe(scene, view_plan(scene.size)) == "A blue background with a red circle in the center."


def test_a_plain_scene_prints_where_it_is_told() -> None:
    scene = plain_scene((640, 480), "white", text="EXIT", font_px=40, corner=(30, 50))
    pixels = np.asarray(draw(scene))
    rows, columns = np.nonzero(pixels.min(axis=2) < 128)
    assert scene.text is not None
    left, top, right, bottom = scene.text.box
    assert (left, top) == (30, 50)
    assert left <= columns.min() <= left + 6
    assert right - 6 <= columns.max() < right
    assert rows.min() == top
    assert rows.max() == bottom - 1


def test_answers_follow_from_the_scene() -> None:
    shapes = [("red", "circle", "top left"), ("red", "star", "right"), ("gray", "circle", "bottom")]
    scene = plain_scene((112, 112), "white", shapes)
    plan = view_plan(scene.size)
    answers: dict[str, set[str]] = {}
    rng = Random(3)
    for task in ("background", "count", "list", "describe", "no_text", "color", "shape"):
        answers[task] = {about_one(rng, scene, plan, task).answer for _ in range(200)}
    assert answers["background"] == {"The background is white."}
    assert answers["count"] == {"There are three shapes."}
    assert answers["list"] == {"A red circle, a red star and a gray circle."}
    assert answers["no_text"] == {"There is no text."}
    assert {"The circles are red and gray.", "The star is red."} <= answers["color"]
    assert any(answer.startswith("There is no ") for answer in answers["color"])
    assert {"The red shapes are a circle and a star.", "The gray shape is a circle."} <= answers["shape"]


def test_verdicts_come_after_their_evidence() -> None:
    scenes = [plain_scene((96, 96), "red", [("blue", "star", "left")]), plain_scene((96, 96), "red")]
    plans = [view_plan(scene.size) for scene in scenes]
    rng = Random(3)
    same = {about_many(rng, scenes, plans, "same_background").answer for _ in range(20)}
    more = {about_many(rng, scenes, plans, "more").answer for _ in range(20)}
    which = {about_many(rng, scenes, plans, "which").answer for _ in range(100)}
    exists = {about_one(rng, scenes[0], plans[0], "exists").answer for _ in range(300)}
    assert same == {"The first is red and the second is red, so yes."}
    assert more == {"The first has one and the second has none, so the first image."}
    assert "First: yes. Second: no. The first image has a star." in which
    assert {"The star is blue, so yes.", "The star is blue, so no.", "There is no circle, so no."} <= exists


def test_existence_is_asked_fairly() -> None:
    rng = Random(5)
    answers = [
        about_one(rng, scene, view_plan(scene.size), "exists").answer.endswith("yes.")
        for scene in held_out_scenes(400)
        if scene.shapes
    ]
    assert 0.4 < np.mean(answers) < 0.65


def test_dialogues_show_every_picture_once_and_measure_distance() -> None:
    rng = Random(11)
    for n_images in range(1, 9):
        scenes = held_out_scenes(n_images)
        dialogue = make_dialogue(rng, scenes, [view_plan(s.size) for s in scenes], 12)
        assert [k for turn in dialogue.turns for k in turn.new] == list(range(n_images))
        shown: dict[int, int] = {}
        for number, turn in enumerate(dialogue.turns):
            shown.update(dict.fromkeys(turn.new, number))
            if turn.about:
                assert turn.distance == number - max(shown[k] for k in turn.about)
            assert re.search(r"[{}]", turn.question + turn.answer) is None


def test_only_questions_with_new_pictures_may_stand_before_them() -> None:
    scenes = held_out_scenes(4)
    plans = [view_plan(scene.size) for scene in scenes]
    n_before = n_with_pictures = 0
    for seed in range(20):
        dialogue = make_dialogue(Random(seed), scenes, plans, 8)
        assert with_questions_first(Random(seed), dialogue, 0.0) == dialogue
        n_before += sum(turn.question_first for turn in with_questions_first(Random(seed), dialogue, 0.5).turns)
        for turn, old in zip(with_questions_first(Random(seed), dialogue, 1.0).turns, dialogue.turns, strict=True):
            n_with_pictures += turn.question_first
            assert turn == replace(old, question=turn.question, question_first=bool(old.new))
            assert turn.question.rstrip(" \n") == old.question
    assert 0.3 < n_before / n_with_pictures < 0.7


def test_emphasis_moves_the_choice_of_tasks() -> None:
    scenes = held_out_scenes(3)
    plans = [view_plan(scene.size) for scene in scenes]

    def tasks(emphasis: dict[str, float]) -> Counter[str]:
        dialogue = make_dialogue(Random(5), scenes, plans, 300, extras=False, emphasis=emphasis)
        return Counter(turn.task for turn in dialogue.turns)

    usual, moved = tasks({}), tasks({"which": 0.0, "exists": 5.0})
    assert moved["which"] == 0 < usual["which"]
    assert moved["exists"] > 2 * usual["exists"] > 0


def test_every_name_of_the_language_is_used() -> None:
    scenes = held_out_scenes(400)
    assert {scene.background for scene in scenes} == set(COLORS)
    assert {shape.kind for scene in scenes for shape in scene.shapes} == set(SHAPES)
    assert {shape.position for scene in scenes for shape in scene.shapes} == set(POSITIONS)


def test_the_rephrasings_are_a_hundred_and_not_among_the_wordings_of_training() -> None:
    entries = json.loads(REPHRASINGS.read_text(encoding="utf-8"))
    assert len(entries) == 100
    taught = {
        _bare(wording)
        for name, value in vars(wordings).items()
        if name.isupper() and isinstance(value, tuple)
        for wording in value
        if isinstance(wording, str)
    }
    assert len(taught) > 700
    repeated = [entry["text"] for entry in entries if _bare(entry["text"]) in taught]
    assert repeated == []


def _bare(text: str) -> str:
    """What remains when slots, case, marks and synonyms are taken away."""
    text = re.sub(r"\{[wt]\}", "", text.lower().replace("{c}", "color").replace("{i}", "image"))
    text = re.sub(r"colour", "color", re.sub(r"picture|photo", "image", text))
    text = re.sub(r"^(please|and|so|now) |,? please\W*$", "", text)
    return re.sub(r"[^a-z{} ]", "", text).replace(" in the image", "").strip()
