"""What a *.rknn file tells: recorded from rknn-toolkit2, cut off anywhere, and garbage."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmchat.errors import ModelDirError
from mmchat.rknn_file import RknnFile, read_rknn
from tests.rknn_standin.model import described

# What rknn-toolkit2 2.5.0 wrote of the demo model's encoder, for rk3588.
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "rknn_navit.json").read_text())
INPUTS = {"patches": [1, 80, 588], "position_rows": [1, 80, 160], "key_mask": [1, 1, 80], "key_positions": [1, 80, 192]}
OUTPUTS = {"embeddings": [1, 16, 192]}


def container(described: object, *, version: int = 6, n_data: int = 24) -> bytes:
    text = described if isinstance(described, bytes) else json.dumps(described, separators=(",", ":")).encode()
    head = struct.pack("<8sQQ", b"RKNN", version, n_data) + (bytes(40) if version > 1 else b"")
    return head + bytes(n_data) + struct.pack("<Q", len(text)) + text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vision.rknn"


@pytest.mark.parametrize("version", [1, 2, 6])
def test_what_rknn_toolkit2_wrote(path: Path, version: int) -> None:
    path.write_bytes(container(RECORDED, version=version))
    assert read_rknn(path) == RknnFile(
        ("rk3588",),
        "2.5.0",
        tuple((name, tuple(shape)) for name, shape in INPUTS.items()),
        (("embeddings", (1, 16, 192)),),
    )


def test_the_stand_in_tells_the_same() -> None:
    ours = described(INPUTS, OUTPUTS)
    assert set(ours) <= set(RECORDED)
    for name in ("version", "input_num", "output_num", "graph"):
        assert ours[name] == RECORDED[name]
    for one, recorded in zip(ours["norm_tensor"], RECORDED["norm_tensor"], strict=True):
        assert one == {name: value for name, value in recorded.items() if name != "dtype"}


@pytest.mark.parametrize(
    "data",
    [
        b"CYPTRKNN" + bytes(100),
        b"\x18\0\0\0RKNN" + bytes(100),
        b"RKNN\0\0\0\0",
        container(RECORDED, version=7),
        container([1, 2]),
        container(b"{"),
        container({"graph": 3}),
        container({**RECORDED, "norm_tensor": []}),
        container({**RECORDED, "norm_tensor": [{"tensor_id": 0, "url": "x", "size": [1e999]}]}),
    ],
)
def test_what_tells_nothing(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert read_rknn(path) == RknnFile()


@pytest.mark.parametrize("data", [b"", b"RK", b"\x08\x09\x12\x07pytorch", b"version https://git-lfs.github.com"])
def test_what_is_no_model(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelDirError, match=r"vision\.rknn: is no RKNN model"):
        read_rknn(path)


def test_no_file(path: Path) -> None:
    with pytest.raises(ModelDirError, match="cannot be read"):
        read_rknn(path)


@given(n=st.integers(24, len(container(RECORDED)) - 1))
def test_cut_off_anywhere(path: Path, n: int) -> None:
    path.write_bytes(container(RECORDED)[:n])
    with pytest.raises(ModelDirError, match="cut off"):
        read_rknn(path)


@given(at=st.integers(0, 2000), new=st.binary(max_size=30), old=st.integers(0, 30))
def test_garbage_is_an_error_or_tells_something(path: Path, at: int, new: bytes, old: int) -> None:
    data = container(RECORDED)
    path.write_bytes(data[:at] + new + data[at + old :])
    with contextlib.suppress(ModelDirError):
        assert isinstance(read_rknn(path), RknnFile)
