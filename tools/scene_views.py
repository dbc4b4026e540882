"""A scene's picture as the vision tower sees it, and what each patch and each resampler row should know of it.

The labels are for the throw-away heads that teach the tower and the resampler without a language model.
This module knows no torch; shapes of arrays are in the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from mmchat.slicing import SlicePlan, slice_image
from mmchat.vision_inputs import patches
from tools.render_scenes import (
    CHARACTERS,
    COLORS,
    PATCH_SIZE,
    READABLE_PX,
    SHAPES,
    UNREADABLE_PX,
    Box,
    Scene,
    draw,
    view_boxes,
    view_plan,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100
COLOR_NAMES = tuple(COLORS)
# Patch labels: shape (0: none), colour, up to three characters whose centre is in the patch (0: none).
N_PATCH_LABELS = 5
PATCH_CLASSES = (len(SHAPES) + 1, len(COLORS)) + (len(CHARACTERS) + 1,) * 3
# Row labels: nearest shape (0: none), its colour, its position, background, the printed text's characters.
MAX_CHARACTERS = 6
N_ROW_LABELS = 4 + MAX_CHARACTERS
ROW_CLASSES = (len(SHAPES) + 1, len(COLORS), 9, len(COLORS)) + (len(CHARACTERS) + 1,) * MAX_CHARACTERS


@dataclass(frozen=True)
class View:
    """One encoder input.

    patches: (rows * columns, 3 * 14 * 14) float16, normalised.  grid: (rows, columns) of patches.
    patch_labels: (rows * columns, 5) int64.  row_labels: (query_num, 10) int64.
    """

    patches: NDArray[np.float16]
    grid: tuple[int, int]
    patch_labels: NDArray[np.int64]
    row_labels: NDArray[np.int64]


def views_of(
    scene: Scene,
    plan: SlicePlan | None = None,
    query_num: int = 16,
    *,
    labels: bool = True,
    wanted: Sequence[int] | None = None,
) -> list[View]:
    """The encoder inputs of the scene's picture, the whole view first; of these the wanted ones.

    labels: compute them; without, they are all IGNORED.
    """
    plan = plan or view_plan(scene.size)
    views = []
    everything = zip(slice_image(draw(scene), plan), view_boxes(plan), strict=True)
    for number, (pixels, box) in enumerate(everything):
        if wanted is not None and number not in wanted:
            continue
        grid = (pixels.shape[0] // PATCH_SIZE, pixels.shape[1] // PATCH_SIZE)
        if labels:
            patch_labels, row_labels = _patch_labels(scene, box, grid), _row_labels(scene, box, grid, query_num)
        else:
            patch_labels = np.full((grid[0] * grid[1], N_PATCH_LABELS), IGNORED, np.int64)
            row_labels = np.full((query_num, N_ROW_LABELS), IGNORED, np.int64)
        views.append(View(patches(pixels, PATCH_SIZE).astype(np.float16), grid, patch_labels, row_labels))
    return views


def sampled_views(rng: Random, scene: Scene) -> list[View]:
    """Those views of a scene that teach most: cells with text, most whole views, few of the other cells."""
    wanted = []
    for number, box in enumerate(view_boxes(view_plan(scene.size))):
        shows_text = any(_overlap(printed.box, box) for printed in scene.texts)
        if rng.random() < (0.85 if number == 0 else (1.0 if shows_text else 0.1)):
            wanted.append(number)
    return views_of(scene, wanted=wanted) if wanted else []


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _patch_labels(scene: Scene, box: Box, grid: tuple[int, int]) -> NDArray[np.int64]:
    """(rows * columns, 5): see PATCH_CLASSES; IGNORED near a shape's edge and for letters too small to read."""
    rows, columns = grid
    step_x, step_y = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
    labels = np.zeros((rows, columns, N_PATCH_LABELS), np.int64)
    labels[:, :, 1] = COLOR_NAMES.index(scene.background)
    x = box[0] + (np.arange(columns) + 0.5) * step_x
    y = box[1] + (np.arange(rows) + 0.5) * step_y
    for shape in scene.shapes:
        distance = np.hypot(x[None, :] - shape.center[0], y[:, None] - shape.center[1])
        labels[distance < shape.radius * 1.2 + step_x / 2, :2] = IGNORED
        inside = distance < shape.radius * 0.75
        column, row = int((shape.center[0] - box[0]) // step_x), int((shape.center[1] - box[1]) // step_y)
        if 0 <= row < rows and 0 <= column < columns:
            inside[row, column] = True
        labels[inside, 0] = SHAPES.index(shape.kind) + 1
        labels[inside, 1] = COLOR_NAMES.index(shape.color)
    n_in_patch: dict[tuple[int, int], int] = {}
    for printed in scene.texts:
        readable = printed.font_px * PATCH_SIZE / step_y >= READABLE_PX - 1
        for character, letter_x, letter_y in printed.letters:
            row, column = math.floor((letter_y - box[1]) / step_y), math.floor((letter_x - box[0]) / step_x)
            if not (0 <= row < rows and 0 <= column < columns):
                continue
            slot = n_in_patch.get((row, column), 0)
            n_in_patch[row, column] = slot + 1
            if slot < 3:
                labels[row, column, 2 + slot] = CHARACTERS.index(character) + 1 if readable else IGNORED
    return labels.reshape(-1, N_PATCH_LABELS)


def _row_labels(scene: Scene, box: Box, grid: tuple[int, int], query_num: int) -> NDArray[np.int64]:
    """(query_num, 10): see ROW_CLASSES.  Shapes and background are asked of the whole view only."""
    side = math.isqrt(query_num)
    labels = np.full((query_num, N_ROW_LABELS), IGNORED, np.int64)
    width, height = scene.size
    whole = box[2] - box[0] > width - 1 and box[3] - box[1] > height - 1
    ticks = (np.arange(side) + 0.5) / side
    place_y, place_x = (axis.ravel() for axis in np.meshgrid(ticks, ticks, indexing="ij"))
    if whole:
        labels[:, 0] = 0
        labels[:, 3] = COLOR_NAMES.index(scene.background)
        if scene.shapes:
            distances = np.stack(
                [np.hypot(place_x - s.center[0] / width, place_y - s.center[1] / height) for s in scene.shapes]
            )
            for row, nearest in enumerate(distances.argmin(0)):
                shape = scene.shapes[int(nearest)]
                if distances[nearest, row] < max(0.22, 0.9 * shape.radius / max(width, height)):
                    labels[row, :3] = (SHAPES.index(shape.kind) + 1, COLOR_NAMES.index(shape.color), shape.cell)
    labels[:, 4] = 0
    for printed in scene.texts:
        if not _overlap(printed.box, box):
            continue
        left, top, right, bottom = printed.box
        seen_px = printed.font_px * grid[0] * PATCH_SIZE / (box[3] - box[1])
        middle_x = ((left + right) / 2 - box[0]) / (box[2] - box[0])
        middle_y = ((top + bottom) / 2 - box[1]) / (box[3] - box[1])
        whole_text = left >= box[0] - 1 and right <= box[2] + 1 and top >= box[1] - 1 and bottom <= box[3] + 1
        away = np.hypot(place_x - middle_x, place_y - middle_y)
        if not whole_text or seen_px < READABLE_PX:
            if whole_text and seen_px < UNREADABLE_PX:
                continue  # nothing to be read there
            labels[away < 0.5, 4:] = IGNORED
            continue
        nearest_row = int(away.argmin())
        if labels[nearest_row, 4] > 0:
            labels[nearest_row, 4:] = IGNORED  # two texts claim it
            continue
        labels[nearest_row, 4:] = 0
        for i, character in enumerate(printed.text[:MAX_CHARACTERS]):
            labels[nearest_row, 4 + i] = CHARACTERS.index(character) + 1
    return labels
