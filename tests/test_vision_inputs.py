"""vision_inputs: the numbers that the published processor, tower and resampler compute, recorded from running them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmchat.vision_inputs import MASKED, patches, position_ids, sincos_positions


@pytest.fixture(scope="session")
def recorded(reference: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((reference / "vision_reference.json").read_text())
    return found


def buckets(n: int, side: int = 70) -> list[int]:
    """The bucket of each row of a single column of patches."""
    found: list[int] = (position_ids(n, 1, side) // side).tolist()
    return found


def test_buckets_equal_the_reference(recorded: dict[str, Any]) -> None:
    """Every side up to 130 patches, and to 320 by the exceptions to floor(70 i / n)."""
    for n, wanted in recorded["bucket_table_1_to_130"].items():
        assert buckets(int(n)) == wanted, n
    exceptions = recorded["floor_formula_exceptions_1_to_320"]["exceptions"]
    for n in range(1, 321):
        floor = [70 * i // n for i in range(n)]
        for i, bucket in exceptions.get(str(n), []):
            floor[i] = bucket
        assert buckets(n) == floor, n


def test_position_ids_equal_the_reference(recorded: dict[str, Any]) -> None:
    for case in recorded["position_ids"]:
        ids = position_ids(case["tgt_h"], case["tgt_w"], 70)
        assert (len(ids), int(ids.sum())) == (case["n"], case["sum"])
        assert ids[: len(case["first8"])].tolist() == case["first8"]
        assert ids[-len(case["last4"]) :].tolist() == case["last4"]
        assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == case["sha256_int64le"]


def test_some_sides_fall_below_the_floor_formula() -> None:
    """Known without the recorded file: 25 patches do, 24 do not."""
    assert buckets(24) == [70 * i // 24 for i in range(24)]
    assert [i for i in range(25) if buckets(25)[i] != 70 * i // 25] == [5, 10, 15, 20]
    assert buckets(25)[5] == 13


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 70))
def test_position_ids_are_ordered_and_within_the_table(rows: int, columns: int, side: int) -> None:
    """One row of the table per patch row, one column per patch column, near floor(side i / n)."""
    ids = position_ids(rows, columns, side).reshape(rows, columns)
    row, column = ids // side, ids % side
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < side * side
    assert (row == row[:, :1]).all()
    assert (column == column[:1]).all()
    for found, n in ((row[:, 0], rows), (column[0], columns)):
        floor = side * np.arange(n) // n
        assert ((floor - found == 0) | (floor - found == 1)).all()
        assert (np.diff(found) >= 0).all()


def test_resampler_positions_equal_the_reference(recorded: dict[str, Any]) -> None:
    """Tighter than the 2e-5 that the reference's own float32 allows against exact numbers."""
    for case in recorded["resampler_sincos"]:
        for point in case["points"]:
            row, column = point["row"], point["col"]
            table = sincos_positions(row + 1, column + 1, case["D"]).reshape(row + 1, column + 1, -1)
            np.testing.assert_allclose(table[row, column, point["channels"]], point["values"], rtol=0, atol=2e-6)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40).map(lambda n: 4 * n))
def test_resampler_positions_are_near_the_exact_ones(rows: int, columns: int, width: int) -> None:
    """The column fills the first half; in doubles, by the formula."""
    found = sincos_positions(rows, columns, width)
    assert found.dtype == np.float32
    assert found.shape == (rows * columns, width)
    quarter = width // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    exact = [
        np.concatenate([f(position * frequencies) for position in (column, row) for f in (np.sin, np.cos)])
        for row in range(rows)
        for column in range(columns)
    ]
    np.testing.assert_allclose(found, np.array(exact), rtol=0, atol=2e-5)


@cache
def all_values() -> NDArray[np.float32]:
    """What each of the 256 values of a pixel becomes, in patches of one pixel."""
    return patches(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2), 1)[:, 0]


def test_normalisation_equals_the_reference(recorded: dict[str, Any], reference: Path) -> None:
    """All 256 values to the bit, through patches()."""
    lut = json.loads((reference / "pixel_vectors.json").read_text())["norm_lut_f32"]
    np.testing.assert_array_equal(all_values().view(np.uint32), np.array(lut, np.float32).view(np.uint32))


def test_normalisation_rounds_three_times() -> None:
    """2 v / 255 - 1 in one go would differ in the last bit for some v."""
    wanted = [((value / np.float32(255)) - np.float32(0.5)) / np.float32(0.5) for value in np.arange(256, dtype="f4")]
    np.testing.assert_array_equal(all_values(), np.array(wanted))
    assert (wanted[0], wanted[255]) == (-1, 1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_patches_equal_naive_loops(rows: int, columns: int, patch: int, seed: int) -> None:
    """Row-major over the grid; within a patch [channel][y][x]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * patch, columns * patch, 3), dtype=np.uint8)
    found = patches(pixels, patch)
    assert found.dtype == np.float32
    assert found.shape == (rows * columns, 3 * patch * patch)
    assert found.flags.c_contiguous
    naive = [
        [
            all_values()[pixels[row * patch + y, column * patch + x, channel]]
            for channel in range(3)
            for y in range(patch)
            for x in range(patch)
        ]
        for row in range(rows)
        for column in range(columns)
    ]
    np.testing.assert_array_equal(found, np.array(naive, np.float32))


def test_the_mask_survives_float16() -> None:
    assert np.isfinite(np.float16(MASKED))
    assert np.exp(np.float32(MASKED)) == 0
