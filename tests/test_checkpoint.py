"""checkpoint: safetensors files as they are, damaged ones named, new ones complete or not there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint, TensorFile, read_header, to_float32, weight_files, write_atomic, write_tensors
from mmchat.errors import ModelDirError

ARRAYS: dict[str, tuple[str, NDArray[Any]]] = {
    "f32": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "f16": ("F16", np.linspace(-1, 1, 5, dtype=np.float16)),
    "bf16": ("BF16", np.array([0x3F80, 0xC000, 0x0001], np.uint16)),
    "i64": ("I64", np.array([[-(2**62)]], np.int64)),
    "i32": ("I32", np.array([], np.int32)),
    "u8": ("U8", np.array([0, 255, 7], np.uint8)),
    "scalar": ("F32", np.float32(2.5).reshape(())),
}


def write(path: Path, arrays: dict[str, tuple[str, NDArray[Any]]]) -> None:
    write_tensors(path, {name: (dtype, array.shape, [array.tobytes()]) for name, (dtype, array) in arrays.items()})


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header, which may be anything, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some model.safetensors"


def test_every_type_comes_back_bit_for_bit(path: Path) -> None:
    write(path, ARRAYS)
    file = TensorFile(path)
    assert list(file.tensors) == list(ARRAYS)
    for name, (dtype, array) in ARRAYS.items():
        read = file.array(name)
        assert (file.tensors[name].dtype, read.dtype, read.shape) == (dtype, array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)
        assert not read.flags.writeable


def test_the_data_begins_aligned(path: Path) -> None:
    """On a multiple of 64 bytes, however long the names are: unaligned tables would be copied at every use."""
    for n in range(1, 80):
        write(path, {"n" * n: ARRAYS["f32"]})
        assert next(iter(read_header(path).values())).start % 64 == 0


def test_metadata_is_no_tensor(path: Path) -> None:
    path.write_bytes(raw({"__metadata__": {"format": "pt"}, **entry()}, b"\0" * 4))
    assert list(read_header(path)) == ["a"]


def test_data_at_an_odd_place_is_read(path: Path) -> None:
    """The format asks for no alignment."""
    data = np.array([1.5, -2.5], np.float32)
    for pad in range(8):
        text = json.dumps(entry(shape=[2], offsets=[0, 8])).encode() + b" " * pad
        path.write_bytes(raw(text, data.tobytes()))
        np.testing.assert_array_equal(TensorFile(path).array("a"), data)


def test_arrays_outlive_the_file_object(path: Path) -> None:
    write(path, ARRAYS)
    array = TensorFile(path).array("f32")
    path.unlink()
    np.testing.assert_array_equal(array, ARRAYS["f32"][1])


def test_a_file_cut_off_anywhere_is_named(path: Path) -> None:
    """At every byte of a small file: in the length, in the header, between tensors, inside one."""
    write(path, ARRAYS)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ModelDirError, match=r"some model.safetensors: (not a safetensors|truncated)"):
            TensorFile(path)


def test_a_file_longer_than_its_header_says_is_named(path: Path) -> None:
    write(path, ARRAYS)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelDirError, match="longer than its header says"):
        TensorFile(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors"),
        (b"PK\3\4" + bytes(100), "not a safetensors"),
        (bytes(100), "not a safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "not a safetensors"),
        (raw(b"\xff\xfe{}"), "not a safetensors"),
        (raw(b"["), "not a safetensors"),
        (raw([]), "not a safetensors"),
        (raw({"a": 1}), "not a safetensors"),
        (raw({"a": {}}), "not a safetensors"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "not a safetensors"),
        (raw(b"[" * 100_000), "not a safetensors"),
        (raw({}, length=2**63), "not a safetensors"),
        (raw({}, length=2**64 - 1), "not a safetensors"),
        (raw({}, b"more"), "longer"),
        (raw(entry(offsets=[0, 8]), bytes(4)), "truncated"),
        (raw(entry(shape=[2]), bytes(4)), "tensor 'a' has 4 bytes for F32"),
        (raw(entry(shape=[-1]), bytes(4)), "not a safetensors"),
        (raw(entry(offsets=[-4, 4]), bytes(4)), "not a safetensors"),
        (raw(entry(offsets=[4, 4]), bytes(4)), "tensor 'a'"),
        (raw(entry(offsets=[0]), bytes(4)), "not a safetensors"),
        (raw(entry(shape=5), bytes(4)), "not a safetensors"),
        (raw(entry(shape=[None]), bytes(4)), "not a safetensors"),
    ],
)
def test_foreign_and_damaged_files_are_named(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelDirError, match=f"some model.safetensors: .*{reason}|some model.safetensors: {reason}"):
        TensorFile(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "F8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    header=st.dictionaries(
        st.text(max_size=5),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "U8", "F8_E4M3", "BOOL"]) | json_values,
                "shape": st.lists(st.integers(-1, 5) | json_values, max_size=3) | json_values,
                "data_offsets": st.lists(st.integers(-1, 20) | json_values, max_size=3) | json_values,
            }
        ),
        max_size=3,
    ),
    data=st.binary(max_size=20),
)
@example(header=entry(dtype=["F32"]), data=bytes(4))
@example(header=entry(shape=[float("inf")]), data=bytes(4))
@example(header=entry(offsets=[0, float("inf")]), data=bytes(4))
@example(header=entry(shape=[0, 10**30], offsets=[0, 0]), data=b"")
def test_any_header_is_read_or_named(path: Path, header: dict[str, Any], data: bytes) -> None:
    """A JSON object of any content: tensors, or a ModelDirError; nothing else."""
    path.write_bytes(raw(header, data))
    try:
        file = TensorFile(path)
        for name in file.tensors:
            file.array(name)
    except ModelDirError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_a_missing_file_and_a_folder_are_named(path: Path) -> None:
    with pytest.raises(ModelDirError, match="cannot be read"):
        TensorFile(path)
    path.mkdir()
    with pytest.raises(ModelDirError, match="cannot be read"):
        TensorFile(path)


def test_an_unknown_type_is_named_when_it_is_asked_for(path: Path) -> None:
    """Other tensors of the file can still be read."""
    path.write_bytes(
        raw({**entry("F8_E4M3", [4]), "b": {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}}, b"12345")
    )
    assert TensorFile(path).array("b").tolist() == [ord("5")]
    with pytest.raises(ModelDirError, match="'a' is F8_E4M3; known are"):
        TensorFile(path).array("a")


# --- folders ----------------------------------------------------------------------------------------------------


def shards(folder: Path) -> Path:
    for i, name in enumerate(("one", "two")):
        write(folder / f"model-0000{i + 1}-of-00002.safetensors", {name: ("F32", np.full(3, i, np.float32))})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_checkpoint_with_or_without_an_index(tmp_path: Path) -> None:
    for indexed in (False, True):
        checkpoint = Checkpoint(shards(tmp_path))
        assert set(checkpoint) == {"one", "two"}
        assert "two" in checkpoint
        assert "three" not in checkpoint
        np.testing.assert_array_equal(checkpoint.array("two"), np.ones(3))
        assert checkpoint.file("two").path.name == "model-00002-of-00002.safetensors"
        assert checkpoint.info("one").shape == (3,)
        if not indexed:
            index(tmp_path, {f: f"model-0000{i + 1}-of-00002.safetensors" for i, f in enumerate(("one", "two"))})


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    shards(tmp_path)
    index(tmp_path, {"one": "model-00001-of-00002.safetensors"})
    assert [path.name for path in weight_files(tmp_path)] == ["model-00001-of-00002.safetensors"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    index(tmp_path, {"one": "model-00001-of-00002.safetensors", "three": "model-00003-of-00003.safetensors"})
    with pytest.raises(ModelDirError, match=r"1 of 2 weight files missing, first model-00003-of-00003.safetensors"):
        Checkpoint(tmp_path)


@given(json_values)
@example({"a": 1})
@example({"a": "."})
@example([])
def test_an_index_of_any_content_is_used_or_named(tmp_path: Path, weight_map: Any) -> None:
    index(tmp_path, weight_map)
    try:
        Checkpoint(tmp_path)
    except ModelDirError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017


def test_an_index_that_is_no_json_is_named(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "5", '{"weights": {}}', "\udcff"):
        (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelDirError, match="not the index"):
            Checkpoint(tmp_path)


def test_a_folder_without_weights_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match=r"no \*.safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(ModelDirError, match=r"no tensor 'three' in its 2 safetensors"):
        Checkpoint(shards(tmp_path)).array("three")


def test_float32_is_exact_and_a_copy(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", ARRAYS)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.float32("bf16").tolist() == [1.0, -2.0, 2.0**-133]
    assert checkpoint.float32("f16").tolist() == ARRAYS["f16"][1].tolist()
    copy = checkpoint.float32("f32")
    copy[:] = 0
    np.testing.assert_array_equal(checkpoint.array("f32"), ARRAYS["f32"][1])


def test_every_bfloat16_widens_by_its_bits() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(to_float32(bits).view(np.uint32), bits.astype(np.uint32) << 16)


# --- writing ----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def failing() -> Iterator[bytes]:
    yield b"1234"
    raise Interrupted


@pytest.mark.parametrize("old", [None, b"what was there before"])
def test_a_failed_write_leaves_nothing_behind(path: Path, old: bytes | None) -> None:
    """Neither half a file nor a temporary one; a file that was there stays as it is."""
    if old is not None:
        path.write_bytes(old)
    before = sorted(path.parent.iterdir())
    with pytest.raises(Interrupted):
        write_tensors(path, {"a": ("F32", (2,), failing())})
    with pytest.raises(ModelDirError, match="4 bytes were written where 8 belong"):
        write_tensors(path, {"a": ("F32", (2,), [b"1234"])})
    with pytest.raises(ModelDirError, match="12 bytes were written where 8 belong"):
        write_tensors(path, {"a": ("F32", (2,), [b"1234"] * 3)})
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert sorted(path.parent.iterdir()) == before
    assert old is None or path.read_bytes() == old


def test_a_write_replaces_what_was_there(path: Path) -> None:
    path.write_bytes(b"old")
    write(path, ARRAYS)
    assert list(TensorFile(path).tensors) == list(ARRAYS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_a_file_is_the_users_to_say(path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(path, ARRAYS)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        path.chmod(0o640)
        write(path, ARRAYS)
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
