"""Dialogues as batches of token ids, laid out by the runtime's own prompt code, for the trainer's last two stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mmchat.prompt import ChatTokenizer, Message, Picture, Text, render
from mmchat.slicing import SlicePlan
from tools.fact_labels import N_FACT_LABELS, fact_labels
from tools.long_histories import aged, cut_plans
from tools.render_scenes import Scene, Style, sample_scene, view_plan
from tools.scene_talk import Dialogue, make_dialogue, text_state, with_questions_first
from tools.scene_views import IGNORED, N_PATCH_LABELS, View, views_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUERY_NUM = 16
MAX_ROWS = 1024
# How much more often than in tools.scene_talk training asks what is learned late, and less what is learned soon.
EMPHASIS = {
    "exists": 1.6, "which": 1.5, "same_background": 1.2, "which_text": 2.0, "count_kind": 1.4, "no_text": 1.4,
    "shape": 2.4, "color": 1.2, "at": 1.4, "text": 1.2, "more": 1.5, "background": 0.6, "backgrounds": 0.5,
    "n_images": 0.4,
}  # fmt: skip
# By the number of pictures in a short dialogue: how many of them are cut.  Training has fewer: reading is learned from
# labels, and an answer about shapes takes one view.
_P_SLICED = {1: 0.7, 2: 0.45, 3: 0.45, 4: 0.45}
_TRAINED_SLICED = 0.5
# How often a shape of a training picture is like an earlier one: which of two gray shapes is the square is told late.
P_LIKE = 0.35
# Rows of a batch's dialogues: about equal, so that little is padding.
_JOINT_ROWS = (288, 448, 640, MAX_ROWS, MAX_ROWS)
_JUDGED_ROWS = 640
# How many pictures a conversation of MAX_ROWS has.
_N_IMAGES_LONG = (0.03, 0.09, 0.12, 0.14, 0.15, 0.15, 0.16, 0.16)
# How many questions that come with a picture stand before it.
_P_QUESTION_FIRST = 0.3


@dataclass(frozen=True)
class VisionBatch:
    """patches: (views, n, 588) float16.  patch_labels: (views, n, 5).  row_labels: (views, query_num, 10)."""

    patches: Tensor
    grids: list[tuple[int, int]]
    patch_labels: Tensor
    row_labels: Tensor


@dataclass(frozen=True)
class TextBatch:
    """ids, labels: (dialogues, rows); labels hold the id of every row that the model has to say, else IGNORED.

    pictures: per dialogue, the scenes shown, in order, as indices into a pool (cached stage), else empty; ~index
    where only the whole view is shown.
    vision: the views of all pictures, in order (joint stage).
    facts: (dialogues, rows, N_FACT_LABELS) int8, see tools.fact_labels; none when held out.
    """

    ids: Tensor
    labels: Tensor
    dialogues: list[Dialogue]
    pictures: list[tuple[int, ...]]
    vision: VisionBatch | None = None
    facts: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """One dialogue as ids and labels, cut after as many turns as fit."""

    ids: list[int]
    labels: list[int]
    dialogue: Dialogue
    pictures: tuple[int, ...] = ()
    facts: NDArray[np.int8] | None = None


def encode_dialogue(
    dialogue: Dialogue,
    tokenizer: ChatTokenizer,
    max_rows: int = MAX_ROWS,
    pictures: tuple[int, ...] = (),
    *,
    with_facts: bool = False,
) -> Encoded:
    """Later turns are left out until the rest fits max_rows; scenes that are then not shown are left out too."""
    turns = list(dialogue.turns)
    while True:
        messages: list[Message] = []
        for turn in turns:
            parts: list[Text | Picture] = [Picture(dialogue.plans[k]) for k in turn.new]
            parts += [Text(note) for note in turn.notes]
            question = Text(turn.question)
            messages.append(Message("user", (question, *parts) if turn.question_first else (*parts, question)))
            messages.append(Message("assistant", ids=tuple(tokenizer.encode(turn.answer))))
        prompt = render(messages, tokenizer, query_num=QUERY_NUM, generation_prompt=False)
        if prompt.n_rows <= max_rows or len(turns) == 1:
            break
        turns.pop()
    n_shown = sum(len(turn.new) for turn in turns)
    kept = Dialogue(dialogue.scenes[:n_shown], dialogue.plans[:n_shown], tuple(turns))
    labels = _labels(prompt.ids, tokenizer, [turn.taught for turn in turns])
    facts = fact_labels(prompt.ids, labels, kept, tokenizer) if with_facts else None
    return Encoded(prompt.ids, labels, kept, pictures[:n_shown], facts)


def dialogue_scenes(
    rng: Random, n_images: int, *, held_out: bool, p_sliced: float = 0.6, p_like: float = 0.0
) -> list[Scene]:
    """Scenes for one conversation: backgrounds are often equal, and later pictures have fewer shapes."""
    scenes: list[Scene] = []
    for _ in range(n_images):
        same = scenes[-1].background if scenes and rng.random() < 0.3 else None
        style = Style(background=same, max_shapes=4 if n_images < 3 else 3, p_sliced=p_sliced, p_like=p_like)
        scenes.append(sample_scene(rng, style, held_out=held_out))
    return scenes


def chosen_plan(rng: Random, scene: Scene) -> SlicePlan:
    """Mostly up to nine slices; else fewer or none."""
    if rng.random() < 0.75:
        return view_plan(scene.size)
    plan = view_plan(scene.size, rng.choice((1, 1, 2, 4)))
    return view_plan(scene.size) if text_state(scene, plan) == "doubt" else plan


def vision_batch(views: Sequence[View]) -> VisionBatch:
    """Views of all grids, padded to the longest."""
    longest = max(len(view.patches) for view in views)
    patches = torch.zeros(len(views), longest, views[0].patches.shape[1], dtype=torch.float16)
    labels = torch.full((len(views), longest, N_PATCH_LABELS), IGNORED - 1)
    for i, view in enumerate(views):
        patches[i, : len(view.patches)] = torch.from_numpy(view.patches)
        labels[i, : len(view.patches)] = torch.from_numpy(view.patch_labels)
    row_labels = torch.stack([torch.from_numpy(view.row_labels) for view in views])
    return VisionBatch(patches, [view.grid for view in views], labels, row_labels)


def text_batch(encoded: Sequence[Encoded], views: Sequence[View] = ()) -> TextBatch:
    """Dialogues padded on the right."""
    longest = max(len(e.ids) for e in encoded)
    ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    labels = torch.full((len(encoded), longest), IGNORED)
    for i, e in enumerate(encoded):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        labels[i, : len(e.labels)] = torch.tensor(e.labels)
    facts = torch.full((len(encoded), longest, N_FACT_LABELS), IGNORED, dtype=torch.int8)
    for i, e in enumerate(encoded):
        if e.facts is not None:
            facts[i, : len(e.ids)] = torch.from_numpy(e.facts)
    return TextBatch(
        ids,
        labels,
        [e.dialogue for e in encoded],
        [e.pictures for e in encoded],
        vision_batch(views) if views else None,
        None if all(e.facts is None for e in encoded) else facts,
    )


class JointData(IterableDataset[TextBatch]):
    """Dialogues over freshly drawn pictures, short ones when held out; each batch has about `n_views` views."""

    def __init__(self, tokenizer_file: str, n_views: int, seed: int, *, held_out: bool = False) -> None:
        self._tokenizer_file, self._n_views, self._seed, self._held_out = tokenizer_file, n_views, seed, held_out
        self._p_many = 0.0 if held_out else 0.05

    def __iter__(self) -> Iterator[TextBatch]:
        torch.set_num_threads(1)
        tokenizer = ChatTokenizer(self._tokenizer_file)
        rng = Random(f"joint {self._held_out} {self._seed}")
        while True:
            encoded: list[Encoded] = []
            views: list[View] = []
            max_rows = _JUDGED_ROWS if self._held_out else rng.choice(_JOINT_ROWS)
            while len(views) < self._n_views:
                dialogue = self._dialogue(rng, max_rows)
                if dialogue is None:
                    continue
                one = encode_dialogue(dialogue, tokenizer, max_rows, with_facts=not self._held_out)
                for scene, plan in zip(one.dialogue.scenes, one.dialogue.plans, strict=True):
                    views += views_of(scene, plan, QUERY_NUM)
                encoded.append(one)
            yield text_batch(encoded, views)

    def _dialogue(self, rng: Random, max_rows: int) -> Dialogue | None:
        """None where the pictures leave too little room.  In training it fills max_rows, and is cut later."""
        is_long = max_rows == MAX_ROWS
        n_images = rng.choices((1, 2, 3, 4, 6, 8), (0.42, 0.33, 0.17, 0.08, *(self._p_many,) * 2))[0]
        if is_long:
            n_images = rng.choices(range(1, 9), _N_IMAGES_LONG)[0]
        p_sliced = _P_SLICED.get(n_images, 0.15) * (1.0 if self._held_out else _TRAINED_SLICED)
        p_like = 0.0 if self._held_out else P_LIKE
        scenes = dialogue_scenes(rng, n_images, held_out=self._held_out, p_sliced=p_sliced, p_like=p_like)
        plans = [chosen_plan(rng, scene) for scene in scenes]
        n_inputs = sum(plan.n_inputs for plan in plans)
        if self._held_out:
            return make_dialogue(rng, scenes, plans, rng.randint(4, 8)) if n_inputs <= 24 else None
        room = max_rows - n_inputs * (QUERY_NUM + 2)
        if room < 0.4 * max_rows:
            return None
        is_aged = rng.random() < (0.5 if is_long else 0.15)
        shown = cut_plans(rng, plans, 0.35) if is_aged else plans
        dialogue = make_dialogue(rng, scenes, shown, room // 28, emphasis=EMPHASIS)
        dialogue = with_questions_first(rng, dialogue, _P_QUESTION_FIRST)
        if not is_aged:
            return dialogue
        gone = [sample_scene(rng, held_out=False) for _ in range(4)]
        others = [(scene, chosen_plan(rng, scene)) for scene in gone]
        return aged(rng, dialogue, plans, others, rng.randint(0, 9) if is_long else rng.randint(0, 3))


class PoolData(IterableDataset[tuple[list[tuple[Scene, SlicePlan]], VisionBatch]]):
    """Scenes with plans, and their views, for filling the pool of cached rows."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[list[tuple[Scene, SlicePlan]], VisionBatch]]:
        torch.set_num_threads(1)
        rng = Random(f"pool {self._seed}")
        while True:
            cut: list[tuple[Scene, SlicePlan]] = []
            views: list[View] = []
            while len(views) < 96:
                style = Style(max_shapes=rng.choice((3, 4, 4)), p_sliced=0.6, p_like=P_LIKE)
                scene = sample_scene(rng, style, held_out=False)
                plan = chosen_plan(rng, scene)
                cut.append((scene, plan))
                views += views_of(scene, plan, QUERY_NUM, labels=False)
            yield cut, vision_batch(views)


class CachedData(IterableDataset[TextBatch]):
    """Dialogues of all lengths over a pool of pictures; each batch has at most `max_batch_rows` rows with padding."""

    def __init__(
        self, tokenizer_file: str, pool: Sequence[tuple[Scene, SlicePlan]], max_batch_rows: int, seed: int
    ) -> None:
        self._tokenizer_file, self._pool, self._max_batch_rows, self._seed = tokenizer_file, pool, max_batch_rows, seed

    def __iter__(self) -> Iterator[TextBatch]:
        torch.set_num_threads(1)
        tokenizer = ChatTokenizer(self._tokenizer_file)
        rng = Random(f"cached {self._seed}")
        by_background: dict[str, list[int]] = defaultdict(list)
        for k, (scene, _) in enumerate(self._pool):
            by_background[scene.background].append(k)
        while True:
            encoded = sorted(
                (self._dialogue(rng, tokenizer, by_background) for _ in range(96)), key=lambda e: len(e.ids)
            )
            batches: list[list[Encoded]] = [[]]
            for one in encoded:
                if (len(batches[-1]) + 1) * len(one.ids) > self._max_batch_rows:
                    batches.append([])
                batches[-1].append(one)
            rng.shuffle(batches)
            yield from (text_batch(batch) for batch in batches if batch)

    def _dialogue(self, rng: Random, tokenizer: ChatTokenizer, by_background: dict[str, list[int]]) -> Encoded:
        long = rng.random() < 0.42
        max_rows = MAX_ROWS if long else 448
        n_images = (
            rng.choices(range(1, 9), _N_IMAGES_LONG)[0]
            if long
            else rng.choices((1, 2, 3, 4), (0.42, 0.36, 0.16, 0.06))[0]
        )
        room = int(max_rows * 0.75) // (QUERY_NUM + 2)
        if not long and rng.random() < 0.55:
            room = n_images  # pictures of one view: many answers for few rows
        chosen: list[int] = []
        for left in range(n_images, 0, -1):
            k = self._pick(rng, chosen, by_background, room - (left - 1))
            if k is None:
                break
            chosen.append(k)
            room -= self._pool[k][1].n_inputs
        scenes = [self._pool[k][0] for k in chosen]
        whole = [self._pool[k][1] for k in chosen]
        is_aged = rng.random() < (0.5 if long else 0.15)
        plans = cut_plans(rng, whole, 0.35) if is_aged else whole
        n_turns = rng.randint(8, 24) if long else rng.randint(5, 12)
        dialogue = make_dialogue(rng, scenes, plans, n_turns, emphasis=EMPHASIS)
        dialogue = with_questions_first(rng, dialogue, _P_QUESTION_FIRST)
        if is_aged:
            others = rng.sample(self._pool, 8)
            dialogue = aged(rng, dialogue, whole, others, rng.randint(0, 9) if long else rng.randint(0, 3))
        pictures = (k if plan == before else ~k for k, plan, before in zip(chosen, plans, whole, strict=True))
        return encode_dialogue(dialogue, tokenizer, max_rows, tuple(pictures), with_facts=True)

    def _pick(self, rng: Random, chosen: list[int], by_background: dict[str, list[int]], max_inputs: int) -> int | None:
        among: Sequence[int] = range(len(self._pool))
        if chosen and rng.random() < 0.3:
            among = by_background[self._pool[chosen[-1]][0].background]
        for _ in range(40):
            k = rng.choice(among)
            if k not in chosen and self._pool[k][1].n_inputs <= max(1, max_inputs):
                return k
        return None


def _labels(ids: list[int], tokenizer: ChatTokenizer, taught: Sequence[bool]) -> list[int]:
    """The ids of every taught answer and of the token that ends it; IGNORED elsewhere."""
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    header = [start, *tokenizer.encode("assistant\n")]
    labels = [IGNORED] * len(ids)
    begins = [i for i, number in enumerate(ids) if number == start and ids[i : i + len(header)] == header]
    for i, wanted in zip(begins, taught, strict=True):
        stop = ids.index(end, i)
        if wanted:
            labels[i + len(header) : stop + 1] = ids[i + len(header) : stop + 1]
    return labels
