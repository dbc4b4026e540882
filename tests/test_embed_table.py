"""embed_table: rows equal naive indexing, to the bit, for every type; what cannot be is refused by name."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mmchat import embed_table
from mmchat.checkpoint import to_float32, write_tensors
from mmchat.embed_table import EmbedTable, build_table
from mmchat.errors import ModelDirError, PromptError

NAME = "llm.model.embed_tokens.weight"
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
DTYPES = list(NUMPY)


def write(path: Path, dtype: str, table: NDArray[Any], name: str = NAME, **others: NDArray[Any]) -> Path:
    tensors: dict[str, Any] = {name: (dtype, table.shape, [table.tobytes()])}
    tensors.update({other: ("F32", array.shape, [array.tobytes()]) for other, array in others.items()})
    write_tensors(path, tensors)
    return path


def finite(dtype: str, shape: tuple[int, int], seed: int = 0) -> NDArray[Any]:
    """Random bits, every finite value of the type possible: subnormals, both zeros, the largest."""
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)
    if dtype == "F32":
        values = bits.view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(0))
    half = (bits & 0xFFFF).astype(np.uint16)
    exponent = {"F16": 0x7C00, "BF16": 0x7F80}[dtype]
    half = np.where(half & exponent == exponent, half & 0x8000, half).astype(np.uint16)
    return half.view(NUMPY[dtype])


def bits_of(rows: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(rows).view(np.uint32)


@pytest.fixture(params=DTYPES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[EmbedTable, NDArray[np.float32]]:
    """A table of 700 rows on disk, and the same in memory."""
    table = finite(request.param, (700, 37))
    return EmbedTable.open(write(tmp_path / "t.safetensors", request.param, table)), to_float32(table)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> EmbedTable:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    return EmbedTable.open(write(tmp_path_factory.mktemp("table") / "t.safetensors", "F32", table))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_finite_value_is_exact(tmp_path: Path, dtype: str) -> None:
    """All 65,536 patterns but infinities and NaN: subnormals and signed zeros included."""
    bits = np.arange(2**16, dtype=np.uint16)
    exponent = {"F16": 0x7C00, "BF16": 0x7F80}[dtype]
    half = bits[bits & exponent != exponent].view(NUMPY[dtype]).reshape(-1, 16)
    table = EmbedTable.open(write(tmp_path / "t.safetensors", dtype, half))
    np.testing.assert_array_equal(bits_of(table.rows(range(table.n_ids))), bits_of(to_float32(half)))


def test_every_float32_pattern_is_kept(tmp_path: Path) -> None:
    special = np.array([[0.0, -0.0, 1e-45, -1e-45, 3.4e38, np.inf, np.nan, -np.nan]], np.float32)
    table = EmbedTable.open(write(tmp_path / "t.safetensors", "F32", special))
    np.testing.assert_array_equal(bits_of(table.rows([0])), bits_of(special))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 511, 512, 513, 1000, 2047])
def test_rows_equal_naive_indexing(case: tuple[EmbedTable, NDArray[np.float32]], n: int) -> None:
    """On both sides of the block and of the thread thresholds; out= gives the same in place."""
    table, naive = case
    ids = np.random.default_rng(n).integers(0, table.n_ids, n)
    rows = table.rows(ids)
    assert rows.dtype == np.float32
    assert rows.shape == (n, 37)
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(bits_of(rows), bits_of(naive[ids]))
    out = np.full((n, 37), np.nan, np.float32)
    assert table.rows(ids.tolist(), out) is out
    np.testing.assert_array_equal(bits_of(out), bits_of(naive[ids]))


def test_threads_give_the_same_rows(
    case: tuple[EmbedTable, NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of them, also more than divide the rows."""
    table, naive = case
    ids = np.random.default_rng(1).integers(0, table.n_ids, 521)
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(embed_table, "_THREADS", threads)
        np.testing.assert_array_equal(bits_of(table.rows(ids)), bits_of(naive[ids]))


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_table_and_any_ids(tmp_path: Path, data: st.DataObject, dtype: str) -> None:
    """And ids -> rows commutes with concatenation."""
    n_ids, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    values = finite(dtype, (n_ids, width), data.draw(st.integers(0, 2**32)))
    table = EmbedTable.open(write(tmp_path / "t.safetensors", dtype, values))
    assert (table.n_ids, table.width) == (n_ids, width)
    first, second = (data.draw(st.lists(st.integers(0, n_ids - 1), max_size=40)) for _ in range(2))
    naive = to_float32(values)[np.array(first + second, dtype=np.int64)]
    np.testing.assert_array_equal(bits_of(table.rows(first + second)), bits_of(naive))
    joined = np.concatenate([table.rows(first), table.rows(second)])
    np.testing.assert_array_equal(bits_of(joined), bits_of(naive))


@given(ids=hnp.arrays(hnp.integer_dtypes() | hnp.unsigned_integer_dtypes(), 5, elements=st.integers(0, 3)))
def test_ids_of_every_integer_type(small: EmbedTable, ids: NDArray[Any]) -> None:
    naive = np.arange(12, dtype=np.float32).reshape(4, 3)[ids.astype(int)]
    np.testing.assert_array_equal(small.rows(ids), naive)
    np.testing.assert_array_equal(small.rows(ids[::-1]), naive[::-1])


def test_no_ids_give_no_rows(small: EmbedTable) -> None:
    nothing: list[Any] = [[], (), np.array([], np.int64), np.array([])]
    for empty in nothing:
        assert small.rows(empty).shape == (0, 3)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([4], r"token id 4 is not in the table \(0 to 3\)"),
        ([0, -1], "token id -1 is not"),
        ([-(2**62)], "token id -4611686018427387904 is not"),
        ([2**62], "token id 4611686018427387904 is not"),
        ([2**63], "token id 9223372036854775808 is not"),
        ([2**70], "whole numbers"),
        ([0.0], "whole numbers"),
        ([float("nan")], "whole numbers"),
        ([True], "whole numbers"),
        (["1"], "whole numbers"),
        ([None], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        ([[1], [2, 3]], "whole numbers"),
        (np.zeros((2, 2), int), "whole numbers"),
        (np.zeros(2), "whole numbers"),
    ],
)
def test_bad_ids_are_named(small: EmbedTable, ids: Any, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        small.rows(ids)


def test_a_bad_id_among_many_leaves_out_untouched(small: EmbedTable) -> None:
    out = np.full((1000, 3), 7, np.float32)
    with pytest.raises(PromptError, match="token id 4"):
        small.rows([*range(4)] * 249 + [0, 0, 0, 4], out)
    assert (out == 7).all()


def read_only() -> NDArray[np.float32]:
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((3, 3), np.float32),
        np.zeros((2, 4), np.float32),
        np.zeros(6, np.float32),
        np.zeros((2, 3)),
        np.zeros((2, 3), np.float16),
        np.zeros((2, 3), ">f4"),
        np.zeros((3, 2), np.float32).T,
        np.zeros((4, 3), np.float32)[::2],
        read_only(),
    ],
    ids=lambda out: f"{out.dtype}-{out.shape}-{out.strides}-{out.flags.writeable}",
)
def test_a_wrong_out_is_refused(small: EmbedTable, out: Any) -> None:
    with pytest.raises(PromptError, match="out must be"):
        small.rows([0, 1], out)


# --- files ------------------------------------------------------------------------------------------------------


def test_a_checkpoints_own_file_opens(tmp_path: Path) -> None:
    """The table among other tensors."""
    values = finite("BF16", (9, 4))
    path = write(tmp_path / "m.safetensors", "BF16", values, head=np.zeros((9, 4), np.float32))
    np.testing.assert_array_equal(bits_of(EmbedTable.open(str(path)).rows([8])), bits_of(to_float32(values[8:])))


def test_a_table_at_an_odd_place_is_read_right(tmp_path: Path) -> None:
    """Other writers pad the header to 8 bytes, or not at all."""
    path = tmp_path / "t.safetensors"
    for dtype in DTYPES:
        values = finite(dtype, (700, 5))
        header = {NAME: {"dtype": dtype, "shape": [700, 5], "data_offsets": [0, values.nbytes]}}
        for pad in range(5):
            text = json.dumps(header).encode() + b" " * pad
            path.write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
            rows = EmbedTable.open(path).rows(range(700))
            np.testing.assert_array_equal(bits_of(rows), bits_of(to_float32(values)))


def test_a_truncated_table_is_named_at_every_boundary(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", "F16", finite("F16", (4, 4)))
    whole = path.read_bytes()
    n_header = 8 + struct.unpack("<Q", whole[:8])[0]
    for end in (0, 1, 7, 8, 9, n_header - 1, n_header, n_header + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ModelDirError, match=r"t\.safetensors"):
            EmbedTable.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ModelDirError, match="longer than its header says"):
        EmbedTable.open(path)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"other.weight": ("F32", (1, 1))}, "has 0 tensors named"),
        ({NAME: ("F32", (1, 1)), "draft.embed_tokens.weight": ("F32", (1, 1))}, "has 2 tensors named"),
        ({NAME: ("I32", (1, 1))}, r"is I32 \[1, 1\]"),
        ({NAME: ("U8", (1, 1))}, r"is U8 \[1, 1\]"),
        ({NAME: ("F32", (4,))}, r"is F32 \[4\]"),
        ({NAME: ("F32", (1, 2, 2))}, r"is F32 \[1, 2, 2\]"),
        ({NAME: ("F32", (0, 4))}, r"is F32 \[0, 4\]"),
        ({NAME: ("F32", (3, 0))}, r"is F32 \[3, 0\]"),
    ],
)
def test_a_file_without_one_table_of_floats_is_named(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], named: str
) -> None:
    """When it is opened as a table, and when one is to be built from it."""
    sizes = {"F32": 4, "I32": 4, "U8": 1}
    path = tmp_path / "m.safetensors"
    zeros = {n: (d, s, [bytes(sizes[d] * int(np.prod(s)))]) for n, (d, s) in tensors.items()}
    write_tensors(path, zeros)
    with pytest.raises(ModelDirError, match=named):
        EmbedTable.open(path)
    with pytest.raises(ModelDirError, match=named):
        build_table(tmp_path, tmp_path / "table")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_built_table_equals_its_source(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    values = finite(dtype, (700, 37))
    write(folder / "model-1.safetensors", "F32", np.zeros((2, 2), np.float32), "vpm.x")
    write(folder / "model-2.safetensors", dtype, values)
    seen: list[tuple[int, int]] = []
    build_table(folder, tmp_path / "table.safetensors", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (values.nbytes, values.nbytes)
    assert seen == sorted(seen)
    table = EmbedTable.open(tmp_path / "table.safetensors")
    np.testing.assert_array_equal(bits_of(table.rows(range(700))), bits_of(to_float32(values)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: str, bad: float) -> None:
    """And no file is left behind."""
    values = finite(dtype, (50, 4))
    if dtype == "BF16":
        values[41, 2] = np.array(bad, np.float32).view(np.uint32) >> 16
    else:
        values[41, 2] = bad
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder / "m.safetensors", dtype, values)
    with pytest.raises(ModelDirError, match="not finite"):
        build_table(folder, tmp_path / "table.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_building_takes_constant_memory(tmp_path: Path) -> None:
    """A table of 200 MB goes through in less than half of that: the real one has a gigabyte."""
    rows, width = 100_000, 1024
    header = {NAME: {"dtype": "F16", "shape": [rows, width], "data_offsets": [0, rows * width * 2]}}
    text = json.dumps(header).encode()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with (folder / "m.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rows * width * 2)  # sparse
    tracemalloc.start()
    try:
        build_table(folder, tmp_path / "table.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 90_000_000
    assert EmbedTable.open(tmp_path / "table.safetensors").rows([0, rows - 1]).any() == np.False_
    os.unlink(tmp_path / "table.safetensors")


def test_reading_a_few_rows_of_a_large_table_takes_little_memory(small: EmbedTable, tmp_path: Path) -> None:
    rows, width = 100_000, 512
    text = json.dumps({NAME: {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "t.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rows * width * 4)
    ids: Sequence[int] = [0, 5, rows - 1]
    tracemalloc.start()
    try:
        EmbedTable.open(path).rows(ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
