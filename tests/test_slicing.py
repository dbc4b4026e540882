"""slicing: the published processor's cut, bit for bit, and what holds for any picture and any limit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from mmchat import slicing
from mmchat.errors import ImageError
from mmchat.slicing import SlicePlan, plan_slices, slice_image
from mmchat.vision_inputs import patches

DATA = Path(__file__).parent / "data" / "slicing_small.json"
sides = st.integers(1, 20_000) | st.sampled_from([1, 13, 14, 447, 448, 449, 896, 1024, 100_000, 10_000_000])


def check_rows(rows: list[list[Any]]) -> None:
    for row in rows:
        width, height, max_slice_nums, scale_resolution, patch_size, *source, grid, refined, cell, _, _, n_inputs = row
        plan = plan_slices(
            width, height, max_slice_nums=max_slice_nums, scale_resolution=scale_resolution, patch_size=patch_size
        )
        wanted = [tuple(source), *(value and tuple(value) for value in (grid, refined, cell)), n_inputs]
        assert [plan.source, plan.grid, plan.refined, plan.cell, plan.n_inputs] == wanted, row
        assert not plan.shrunk


def check_pixels(case: dict[str, Any]) -> None:
    image = formula_image(case)
    assert sha256(np.asarray(image.convert("RGB"))) == case["rgb_sha256"], case["name"]
    plan = plan_slices(
        case["w"], case["h"], **{k: case[k] for k in ("max_slice_nums", "scale_resolution", "patch_size")}
    )
    views = slice_image(image, plan)
    assert [sha256(view) for view in views] == [s["u8_sha256"] for s in case["slices"]], case["name"]
    patch_size = case["patch_size"]
    assert [sha256(strip(view, patch_size)) for view in views] == [s["f32_sha256"] for s in case["slices"]]


def strip(view: NDArray[np.uint8], patch_size: int) -> NDArray[np.float32]:
    """The processor's layout of a view: (3, patch, n * patch), patches side by side."""
    flat = patches(view, patch_size).reshape(-1, 3, patch_size, patch_size)
    return np.ascontiguousarray(flat.transpose(1, 2, 0, 3)).reshape(3, patch_size, -1)


def sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def formula_image(case: dict[str, Any]) -> Image.Image:
    """The picture that pixel_vectors.json describes by a formula per band ("image_formula" there)."""
    width, height, mode = case["w"], case["h"], case["mode"]
    x, y = np.arange(width, dtype=np.int64)[None, :], np.arange(height, dtype=np.int64)[:, None]
    zero = 0 * x + 0 * y
    formulas: dict[str, Callable[[], Any]] = {
        "A": lambda: (7 * x + 3 * y) % 256,
        "B": lambda: (x * x + 5 * y) % 256,
        "C": lambda: (x * y + 11) % 256,
        "D": lambda: 255 * x // max(width - 1, 1),
        "E": lambda: 255 * y // max(height - 1, 1),
        "F": lambda: ((1103515245 * x + 12345 * y + 2654435761 * x * y) % 2**32) // 65536 % 256,
        "G": lambda: 255 * ((x // 8 + y // 8) % 2),
        "H": lambda: 255 - (x + y) % 256,
    }
    bands = np.stack([formulas[name]() + zero for name in case["channels"]], axis=-1).astype(np.uint8)
    if mode == "1":
        return Image.fromarray(bands[:, :, 0] >= 128)
    if mode == "P":
        image = Image.frombytes("P", (width, height), bands.tobytes())
        image.putpalette([value for i in range(256) for value in (5 * i % 256, 255 - i, i * i % 256)])
        return image
    return Image.frombytes(mode, (width, height), bands.tobytes())


def test_plans_of_the_small_copy() -> None:
    """Rows copied from the recorded vectors, for those who do not have them."""
    check_rows(json.loads(DATA.read_text())["rows"])


def test_pixels_of_the_small_copy() -> None:
    for case in json.loads(DATA.read_text())["cases"]:
        check_pixels(case)


def test_plans_equal_the_reference(reference: Path) -> None:
    """Every recorded row: source, grid, refined, cell and number of inputs."""
    rows = json.loads((reference / "slicing_vectors.json").read_text())["rows"]
    assert len(rows) > 19_000
    check_rows(rows)


def test_pixels_equal_the_reference(reference: Path) -> None:
    """Every canonical hash, as bytes and as normalised patches, for every mode."""
    cases = json.loads((reference / "pixel_vectors.json").read_text())["cases"]
    assert len(cases) > 20
    for case in cases:
        check_pixels(case)


@pytest.mark.parametrize("prefix", ["a", "b"])
def test_pixel_arrays_equal_the_reference(reference: Path, prefix: str) -> None:
    """The same with whole arrays, where a difference can be looked at."""
    arrays = np.load(reference / "pixel_small.npz")
    picture = Image.fromarray(arrays[f"{prefix}_input_u8"])
    recorded = sorted(name for name in arrays.files if name.startswith(f"{prefix}_slice") and name.endswith("_u8"))
    resolution = next(r for r in (28, 56, 112, 448) if fits(picture.size, r, [arrays[name] for name in recorded]))
    views = slice_image(picture, plan_slices(*picture.size, scale_resolution=resolution))
    for view, name in zip(views, recorded, strict=True):
        np.testing.assert_array_equal(view, arrays[name])
        floats = arrays[name.replace("_u8", "_f32_3xPxNP")]
        np.testing.assert_array_equal(strip(view, 14), floats)


def fits(size: tuple[int, int], resolution: int, views: list[NDArray[np.uint8]]) -> bool:
    """Whether this resolution gives views of these shapes (the file does not say which one it was made with)."""
    plan = plan_slices(*size, scale_resolution=resolution)
    return [(h, w) for w, h in plan.input_sizes] == [view.shape[:2] for view in views]


@given(sides, sides, st.integers(1, 12), st.sampled_from([56, 112, 448, 449]), st.sampled_from([7, 14, 16]))
def test_a_plan_is_consistent(width: int, height: int, max_slice_nums: int, resolution: int, patch: int) -> None:
    """Cells tile the refined picture exactly; sides are whole patches; never more inputs than asked for."""
    plan = plan_slices(width, height, max_slice_nums=max_slice_nums, scale_resolution=resolution, patch_size=patch)
    assert plan.size == (width, height)
    assert 1 <= plan.n_inputs <= 1 + max_slice_nums
    assert len(plan.input_sizes) == plan.n_inputs
    assert all(side >= patch and side % patch == 0 for size in plan.input_sizes for side in size)
    assert not plan.shrunk
    if plan.grid is None:
        assert (plan.refined, plan.cell) == (None, None)
        return
    assert plan.cell is not None
    assert plan.grid[0] * plan.grid[1] >= 2
    assert plan.refined == (plan.cell[0] * plan.grid[0], plan.cell[1] * plan.grid[1])


@given(sides, sides, st.integers(1, 9), st.integers(1, 3000))
@example(1, 100_000, 9, 1056)
@example(100_000, 1, 9, 1056)
@example(3, 200_000, 9, 2048)
def test_max_patches_is_honoured(width: int, height: int, max_slice_nums: int, max_patches: int) -> None:
    """Every view fits the encoder and keeps at least one patch a side; the cut itself stays the reference's."""
    free = plan_slices(width, height, max_slice_nums=max_slice_nums)
    plan = plan_slices(width, height, max_slice_nums=max_slice_nums, max_patches=max_patches)
    assert plan.grid == free.grid
    for (w, h), (free_w, free_h) in zip(plan.input_sizes, free.input_sizes, strict=True):
        assert w % 14 == h % 14 == 0
        assert 14 <= w <= free_w
        assert 14 <= h <= free_h
        assert (w // 14) * (h // 14) <= max_patches
    assert plan.shrunk == (plan.input_sizes != free.input_sizes)
    if not plan.shrunk:
        assert plan == free


def test_shrinking_keeps_the_shape_where_it_can() -> None:
    """The stated rule: both sides by sqrt(max / patches), rounded down to whole patches."""
    assert plan_slices(448, 448, max_patches=256).source == (16 * 14, 16 * 14)
    assert plan_slices(448, 448, max_patches=255).source == (15 * 14, 15 * 14)
    assert plan_slices(448, 448, max_patches=1024) == plan_slices(448, 448)


def test_squares_of_six_cells_hang_on_one_ulp() -> None:
    """log(3/2) and -log(2/3) differ in the last bit of a double: float32 would choose (2, 3)."""
    assert plan_slices(1024, 1024).grid == (3, 2)
    assert plan_slices(600, 600).grid == (1, 2)  # an exact tie: fewer columns first


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"width": 0}, "width is 0"),
        ({"height": -3}, "height is -3"),
        ({"max_slice_nums": 0}, "max_slice_nums is 0"),
        ({"width": 1_000_000_001}, "width is 1000000001"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"patch_size": 449}, "patch_size 449"),
        ({"scale_resolution": 13}, "scale_resolution 13"),
        ({"max_patches": 0}, "max_patches 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ImageError, match=named):
        plan_slices(**{"width": 10, "height": 10, **arguments})


def naive_slices(image: Image.Image, plan: SlicePlan) -> list[NDArray[np.uint8]]:
    """The reference's steps in plain PIL."""
    views = [image.resize(plan.source, Resampling.BICUBIC)]
    if plan.grid and plan.refined and plan.cell:
        refined = image.resize(plan.refined, Resampling.BICUBIC)
        for row in range(plan.grid[1]):
            for column in range(plan.grid[0]):
                left, top = column * plan.cell[0], row * plan.cell[1]
                views.append(refined.crop((left, top, left + plan.cell[0], top + plan.cell[1])))
    return [np.asarray(view) for view in views]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def check_slices(image: Image.Image, plan: SlicePlan) -> None:
    views = slice_image(image, plan)
    assert [(view.shape[1], view.shape[0]) for view in views] == plan.input_sizes
    for view, naive in zip(views, naive_slices(image, plan), strict=True):
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous
        np.testing.assert_array_equal(view, naive)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9), st.none() | st.integers(1, 70))
def test_slices_equal_plain_pil(width: int, height: int, max_slice_nums: int, max_patches: int | None) -> None:
    plan = plan_slices(width, height, max_slice_nums=max_slice_nums, scale_resolution=112, max_patches=max_patches)
    check_slices(noise(width, height), plan)


@pytest.mark.parametrize("size", [(1100, 950), (700, 1600), (4000, 260)])
def test_slices_made_in_two_threads_equal_plain_pil(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the threshold on, source and cells are scaled at the same time, whatever this machine's CPUs."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(slicing, "_PARALLEL_FROM_PX", size[0] * size[1])
    check_slices(noise(*size), plan_slices(*size))


def test_a_picture_of_the_sources_size_is_not_resized() -> None:
    image = noise(448, 448)
    (view,) = slice_image(image, plan_slices(448, 448))
    np.testing.assert_array_equal(view, np.asarray(image))


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("size", [(1001, 803), (640, 480), (7, 5)])
def test_a_jpeg_decoded_at_a_fraction_is_taken_for_the_whole(size: tuple[int, int], k: int) -> None:
    """Its size is the fraction, rounded up; the views have the plan's sizes all the same."""
    plan = plan_slices(*size)
    views = slice_image(noise(-(-size[0] // k), -(-size[1] // k)), plan)
    assert [(view.shape[1], view.shape[0]) for view in views] == plan.input_sizes


@pytest.mark.parametrize("size", [(10, 20), (19, 10), (7, 3), (40, 20)])
def test_a_plan_for_another_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"the plan is for 20x10, the picture has {size[0]}x{size[1]}"):
        slice_image(noise(*size), plan_slices(20, 10))
