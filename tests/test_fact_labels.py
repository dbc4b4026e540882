"""tools.fact_labels: what each row could know follows from the pictures shown and the words said before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mmchat
from mmchat.prompt import ChatTokenizer, Message, Picture, Text, render
from tools.fact_labels import (
    ABOUT,
    ASKED,
    BACKGROUND,
    BOTH,
    HAS,
    IMAGE,
    IN_ANSWER,
    IN_TURN,
    NAMES,
    SAID,
    WHOLE,
    fact_labels,
)
from tools.render_scenes import plain_scene, view_plan
from tools.scene_talk import Dialogue, Turn
from tools.scene_views import IGNORED

QUERY_NUM = 4
SCENES = (
    plain_scene((112, 112), "white", [("red", "circle", "left"), ("blue", "star", "right")]),
    plain_scene((336, 224), "red", [("red", "star", "center")], text="CAT"),
)
TURNS = (
    Turn("Is there a red star?", "The star is blue, so no.", "exists", (0,), (0,)),
    Turn("Which image has a word?", "First: no. Second: yes. The second image has a word.", "which_text", (1,), (0, 1)),
    Turn("Compare the backgrounds of objects with grey", "Red and red.", "backgrounds", (), (0, 1)),
    Turn("What is in the first image?", "A red circle.", "list", (), (0,), 2),
)


class Labelled:
    """The dialogue above as rows: token texts beside their labels."""

    def __init__(self) -> None:
        tokenizer = ChatTokenizer(Path(mmchat.__file__).parent / "demo" / "tokenizer.json")
        plans = tuple(view_plan(scene.size) for scene in SCENES)
        messages: list[Message] = []
        for turn in TURNS:
            parts: list[Text | Picture] = [Picture(plans[k]) for k in turn.new]
            messages.append(Message("user", (*parts, Text(turn.question))))
            messages.append(Message("assistant", ids=tuple(tokenizer.encode(turn.answer))))
        self.ids = render(messages, tokenizer, query_num=QUERY_NUM, generation_prompt=False).ids
        said = [IGNORED] * len(self.ids)
        header = [tokenizer.special["<|im_start|>"], *tokenizer.encode("assistant\n")]
        end = tokenizer.special["<|im_end|>"]
        for i in range(len(self.ids)):
            if self.ids[i : i + len(header)] == header:
                stop = self.ids.index(end, i) + 1
                said[i + len(header) : stop] = self.ids[i + len(header) : stop]
        self.said = np.array(said) != IGNORED
        self.words = [tokenizer.token_bytes(i).decode("utf-8", errors="replace").strip() for i in self.ids]
        self.image_rows = np.array(self.ids) == tokenizer.special["<unk>"]
        self.labels = fact_labels(self.ids, said, Dialogue(SCENES, plans, TURNS), tokenizer)

    def row(self, word: str, nth: int = 0) -> int:
        return [i for i, found in enumerate(self.words) if found == word][nth]


@pytest.fixture(scope="module")
def rows() -> Labelled:
    return Labelled()


def test_image_rows_know_their_picture_and_whether_they_show_all_of_it(rows: Labelled) -> None:
    images, whole = rows.labels[rows.image_rows, IMAGE], rows.labels[rows.image_rows, WHOLE]
    n_views = [view_plan(scene.size).n_inputs for scene in SCENES]
    assert n_views[0] == 1
    assert n_views[1] > 2
    assert images.tolist() == [0] * n_views[0] * QUERY_NUM + [1] * n_views[1] * QUERY_NUM
    assert whole.tolist() == [1] * 2 * QUERY_NUM + [0] * (n_views[1] - 1) * QUERY_NUM
    assert (rows.labels[~rows.image_rows][:, [IMAGE, WHOLE]] == IGNORED).all()


def test_rows_before_an_answers_tokens_know_the_one_picture_it_is_about(rows: Labelled) -> None:
    speaking = np.append(rows.said[1:], False)
    about = rows.labels[:, ABOUT]
    assert (about[~speaking] == IGNORED).all()
    assert about[rows.row("blue") - 1] == 0
    assert about[rows.row("First")] == IGNORED  # about two
    assert about[rows.row("circle")] == 0


def test_a_named_thing_knows_the_pictures_that_have_it_and_were_shown(rows: Labelled) -> None:
    red, star = rows.labels[rows.row("red")], rows.labels[rows.row("star")]
    assert red[HAS : HAS + 5].tolist() == [1, 0, 0, 0, IGNORED]  # the second picture comes later
    assert red[BACKGROUND : BACKGROUND + 2].tolist() == [0, IGNORED]
    assert star[HAS] == 1
    assert star[BOTH] == 0  # "red star": there is a blue one
    word = rows.labels[rows.row("word")]
    assert word[[HAS, HAS + 4, HAS + 8]].tolist() == [0, 1, IGNORED]
    second_red = rows.labels[rows.row("red", 1)]
    assert second_red[[HAS, HAS + 4]].tolist() == [1, 1]
    assert second_red[BACKGROUND : BACKGROUND + 2].tolist() == [0, 1]
    assert rows.labels[rows.row("circle")][BOTH : BOTH + 4].tolist() == [1, 0, 0, 0]


def test_a_kind_or_shapes_at_large_know_how_many_there_are(rows: Labelled) -> None:
    objects = rows.labels[rows.row("objects")]
    assert objects[HAS : HAS + 8].tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert objects[BOTH] == IGNORED


def test_a_named_thing_knows_whether_it_was_named_before(rows: Labelled) -> None:
    asked, answered = rows.row("star"), rows.row("star", 1)
    assert rows.labels[asked, [IN_TURN, IN_ANSWER]].tolist() == [0, IGNORED]
    assert rows.labels[answered, [IN_TURN, IN_ANSWER]].tolist() == [1, 0]
    assert rows.labels[rows.row("blue"), IN_TURN] == 0
    assert rows.labels[rows.row("circle"), IN_TURN] == 0  # another turn does not count


def test_rows_of_a_turn_hold_the_names_of_its_question_and_answer_so_far(rows: Labelled) -> None:
    def names(row: int, start: int) -> set[str]:
        return {name for k, name in enumerate(NAMES) if rows.labels[row, start + k] == 1}

    verdict = rows.row("no")
    assert names(verdict, ASKED) == {"red", "star"}
    assert names(verdict, SAID) == {"star", "blue"}
    assert names(rows.row("Compare"), ASKED) == set()
    assert names(rows.row("grey") + 1, ASKED) == {"gray", "shape"}
    assert (rows.labels[: rows.row("user") - 1, ASKED:] == IGNORED).all()
