"""MiniCPM-V's adaptive slicing: a picture's size -> a plan -> the encoder's inputs.

A large picture is seen twice: once whole, scaled to about scale_resolution² pixels (the "source"), and once
as a grid of cells that each have about that many pixels.  The rules are those of the image processor that is
published with MiniCPM-V-2.6, to the bit: IEEE doubles, rounding half to even, ties broken by candidate order,
Pillow's fixed-point BICUBIC (10.1 to 12.x; 13.0 changed its bytes).

This module knows no files, no colours and no model: mmchat.images reads pictures, mmchat.prompt lays slices out.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mmchat.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

Size = tuple[int, int]

_LARGEST_SIDE, _MOST_SLICES = 1_000_000_000, 1000

# Below this a second thread costs more than it saves (measured: `mmchat bench host`).
_PARALLEL_FROM_PX = 4_000_000


@dataclass(frozen=True)
class SlicePlan:
    """How one picture is cut.  All sizes are (width, height) in pixels.

    size: of the picture.  source: of the whole view.  grid: (columns, rows) or None where the picture is not cut.
    refined: what the picture is scaled to before the grid is cut from it.  cell: of each grid cell.
    shrunk: a view was larger than the encoder takes and was made smaller (see plan_slices).
    """

    size: Size
    source: Size
    grid: tuple[int, int] | None = None
    refined: Size | None = None
    cell: Size | None = None
    shrunk: bool = False

    @property
    def n_inputs(self) -> int:
        """Encoder inputs: the source, then the cells row by row."""
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)

    @property
    def input_sizes(self) -> list[Size]:
        """The size of every encoder input, in the encoder's order."""
        return [self.source] + [self.cell] * (self.n_inputs - 1) if self.cell else [self.source]

    @property
    def overview(self) -> SlicePlan:
        """The same without the cells."""
        return replace(self, grid=None, refined=None, cell=None)


def plan_slices(
    width: int,
    height: int,
    *,
    max_slice_nums: int = 9,
    scale_resolution: int = 448,
    patch_size: int = 14,
    max_patches: int | None = None,
) -> SlicePlan:
    """The plan for a picture of width x height pixels.

    max_slice_nums: cells at most (1: never cut).  scale_resolution: side in pixels of a square view.
    patch_size: every side of every view is a multiple of it.
    max_patches: patches that the encoder takes in one input; None is the reference (no limit).  A view that has
        more is scaled down by sqrt(max_patches / patches) on both sides, each rounded down to whole patches,
        never below one; where that leaves a strip one patch high that is still too long, its length is cut to
        max_patches.  Only very elongated pictures meet this (1056 patches hold every view up to 5.57:1).

    Raises ImageError for sizes and limits below 1, sides above a billion, and more than 1000 slices.
    """
    for name, value, most in (
        ("width", width, _LARGEST_SIDE),
        ("height", height, _LARGEST_SIDE),
        ("max_slice_nums", max_slice_nums, _MOST_SLICES),
    ):
        if not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
            raise ImageError(f"{name} is {value}; it must be a whole number from 1 to {most:,}")
    if patch_size < 1 or scale_resolution < patch_size or (max_patches is not None and max_patches < 1):
        raise ImageError(
            f"scale_resolution {scale_resolution}, patch_size {patch_size}, max_patches {max_patches}: need "
            "1 <= patch_size <= scale_resolution and max_patches >= 1"
        )

    def fitted(size: Size) -> tuple[Size, bool]:
        smaller = _shrink(size, patch_size, max_patches)
        return smaller, smaller != size

    size = (width, height)
    grid = _best_grid(width, height, max_slice_nums, scale_resolution)
    source, shrunk = fitted(_best_size(width, height, scale_resolution, patch_size, upscale=grid is None))
    if grid is None:
        return SlicePlan(size, source, shrunk=shrunk)
    columns, rows = grid
    cell, cell_shrunk = fitted(
        _best_size(
            _round_to(width, columns) / columns,
            _round_to(height, rows) / rows,
            scale_resolution,
            patch_size,
            upscale=True,
        )
    )
    return SlicePlan(size, source, grid, (cell[0] * columns, cell[1] * rows), cell, shrunk or cell_shrunk)


def slice_image(image: Image, plan: SlicePlan) -> list[NDArray[np.uint8]]:
    """The encoder's inputs, each (height, width, 3) uint8 and C-contiguous: the source, then the cells row by row.

    image: of plan.size, or a JPEG of that size decoded at 1/2, 1/4 or 1/8; other modes than RGB are converted as the
        reference does (mmchat.images has kinder rules).
    Source and cells are both scaled from the original, at the same time where there is more than one CPU.

    Raises ImageError where the plan is for another size.
    """
    from PIL.Image import Resampling

    if image.size not in {(-(-plan.size[0] // k), -(-plan.size[1] // k)) for k in (1, 2, 4, 8)}:
        raise ImageError(
            f"the plan is for {plan.size[0]}x{plan.size[1]}, the picture has {image.size[0]}x{image.size[1]}"
        )
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.load()  # once, before two threads read it

    def scaled(size: Size) -> NDArray[np.uint8]:
        return np.asarray(rgb if rgb.size == size else rgb.resize(size, Resampling.BICUBIC))

    if plan.grid is None or plan.refined is None or plan.cell is None:
        return [scaled(plan.source)]
    if rgb.width * rgb.height >= _PARALLEL_FROM_PX and (os.cpu_count() or 1) > 1:
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(scaled, plan.source)
            refined = scaled(plan.refined)
            source = pending.result()
    else:
        source, refined = scaled(plan.source), scaled(plan.refined)
    (columns, rows), (width, height) = plan.grid, plan.cell
    cells = refined.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return [source, *np.ascontiguousarray(cells).reshape(-1, height, width, 3)]


def _round_to(length: float, divisor: int) -> int:
    return max(round(length / divisor) * divisor, divisor)


def _best_size(width: float, height: float, resolution: int, patch_size: int, *, upscale: bool) -> Size:
    """About resolution² pixels, same shape.  Height first, then width from the truncated height: not symmetric."""
    if upscale or width * height > resolution * resolution:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _round_to(width, patch_size), _round_to(height, patch_size)


def _best_grid(width: int, height: int, max_slice_nums: int, resolution: int) -> tuple[int, int] | None:
    """(columns, rows) nearest to the picture's shape among one cell fewer, as many as its area asks, and one more."""
    wanted = min(math.ceil(width * height / (resolution * resolution)), max_slice_nums)
    if wanted <= 1:
        return None
    log_ratio = math.log(width / height)
    best, best_error = (1, 1), math.inf
    for n in (wanted - 1, wanted, wanted + 1):
        if n == 1 or n > max_slice_nums:
            continue
        for columns in range(1, n + 1):
            if n % columns:
                continue
            # In doubles: log(3/2) and -log(2/3) differ by one ulp, and squares of 6 or 7 cells hang on it.
            error = abs(log_ratio - math.log(columns / (n // columns)))
            if error < best_error:
                best, best_error = (columns, n // columns), error
    return best


def _shrink(size: Size, patch_size: int, max_patches: int | None) -> Size:
    columns, rows = size[0] // patch_size, size[1] // patch_size
    if max_patches is None or columns * rows <= max_patches:
        return size
    factor = math.sqrt(max_patches / (columns * rows))
    columns, rows = max(1, int(columns * factor)), max(1, int(rows * factor))
    return min(columns, max_patches) * patch_size, min(rows, max_patches) * patch_size
