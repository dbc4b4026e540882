"""What every row of a dialogue could know: dense labels for throw-away heads inside the language model.

An answer's verdict is one token per question, and a small model finds what it rests on (are these two colours equal?
has any picture a circle?) only after very many of them.  Each of these labels is one such step, at every row where the
step can be taken: which picture a row belongs to, which picture a question means, whether a colour or shape was named
before, and which pictures have it.

This module knows no torch.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mmchat.prompt import ChatTokenizer
from tools.render_scenes import COLORS, SHAPES
from tools.scene_talk import Dialogue, text_state
from tools.scene_views import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_IMAGES = 8
MAX_COUNT = 4
_TEXTS = ("text", "word", "number")
NAMES = (*COLORS, *SHAPES, *_TEXTS, "shape")
_ALIASES = {"grey": "gray", "object": "shape", "thing": "shape", "figure": "shape"}
# Columns: the picture of an image row, whether it is of a whole view, the picture that the answer is about; whether
# the thing named here was named before in this turn, and in this answer; then per picture: has at least one, two, three
# and four of it, has it as background, has at least one and two shapes of this kind and the colour just named; then per
# name: is in the question, is in this answer, as far as either goes.
IMAGE, WHOLE, ABOUT, IN_TURN, IN_ANSWER, HAS = range(6)
BACKGROUND = HAS + MAX_COUNT * MAX_IMAGES
BOTH = BACKGROUND + MAX_IMAGES
ASKED = BOTH + 2 * MAX_IMAGES
SAID = ASKED + len(NAMES)
N_FACT_LABELS = SAID + len(NAMES)
_COUNTS = np.arange(1, MAX_COUNT + 1)


def fact_labels(ids: list[int], labels: list[int], dialogue: Dialogue, tokenizer: ChatTokenizer) -> NDArray[np.int8]:
    """(rows, N_FACT_LABELS); ids and labels as in dialogue_batches.Encoded.  IGNORED where nothing is asked."""
    names = _token_names(tokenizer)
    special = tokenizer.special
    start, unknown, image_id = special["<|im_start|>"], special["<unk>"], special["<image_id>"]
    slice_begin, image_begin = special["<slice>"], special["<image>"]
    user = tokenizer.encode("user")[0]
    table = np.full((len(ids), N_FACT_LABELS), IGNORED, np.int8)
    shown, turn, whole = 0, -1, True
    asked = np.zeros(len(NAMES), np.int8)
    said = np.zeros(len(NAMES), np.int8)
    before = ""
    for row, number in enumerate(ids):
        if number == unknown:
            table[row, IMAGE], table[row, WHOLE] = shown - 1, whole
            continue
        if number == start and ids[row + 1] == user:
            turn += 1
            asked[:], said[:] = 0, 0
        elif number == image_id:
            shown += 1
        elif number in (slice_begin, image_begin):
            whole = number == image_begin
        if turn < 0:
            continue
        table[row, ASKED:SAID], table[row, SAID:] = asked, said
        about = dialogue.turns[turn].about
        if len(about) == 1 and row + 1 < len(ids) and labels[row + 1] != IGNORED:
            table[row, ABOUT] = about[0]
        name = names.get(number, "")
        if name:
            which = NAMES.index(name)
            table[row, IN_TURN] = asked[which] or said[which]
            if labels[row] != IGNORED:
                table[row, IN_ANSWER] = said[which]
                said[which] = 1
            else:
                asked[which] = 1
            for k, scene in enumerate(dialogue.scenes[:shown]):
                counts = slice(HAS + MAX_COUNT * k, HAS + MAX_COUNT * (k + 1))
                if name in _TEXTS:
                    if text_state(scene, dialogue.plans[k]) in ("none", "readable"):
                        table[row, counts.start] = scene.text is not None and name in ("text", scene.text.kind)
                    continue
                found = [s for s in scene.shapes if name in ("shape", s.color, s.kind)]
                table[row, counts] = len(found) >= _COUNTS
                if name in COLORS:
                    table[row, BACKGROUND + k] = scene.background == name
                elif before in COLORS:
                    of_color = sum(s.color == before for s in found)
                    table[row, BOTH + 2 * k : BOTH + 2 * k + 2] = of_color >= _COUNTS[:2]
        before = name
    return table


@lru_cache(maxsize=4)
def _token_names(tokenizer: ChatTokenizer) -> dict[int, str]:
    """Token id -> the colour, shape or kind of text that it names, in any spelling."""
    names = {}
    for number in range(tokenizer.n_ids):
        word = tokenizer.token_bytes(number).decode("utf-8", errors="replace").strip().lower()
        for name in (word, re.sub(r"s$", "", word), re.sub(r"es$", "", word)):
            name = _ALIASES.get(name, name)
            if name in NAMES:
                names[number] = name
    return names
