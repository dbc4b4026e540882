"""Tensors of a checkpoint folder, by name, without loading the checkpoint: safetensors headers and memory maps.

The format is 8 bytes of header length, a JSON header, then the tensors' bytes.  The safetensors library reads tensors
into memory and has no bfloat16 for numpy; here their place in the file is what is needed: to map an embedding table
of a gigabyte, and to hand bfloat16 weights to an engine as they are.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mmchat.errors import ModelDirError

# Formats that numpy has; BF16 is read as its raw uint16.
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_BLOCK_BYTES = 1 << 22
_ZEROS = bytes(_BLOCK_BYTES)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype as safetensors names it, [start, end) bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file.

    Raises ModelDirError: missing, foreign, damaged, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            n_header = header_bytes(file.read(8), size, str(path))
            text = file.read(n_header)
    except OSError as error:
        raise ModelDirError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_header(text, size, str(path))


def header_bytes(head: bytes, size: int, where: str) -> int:
    """The length of the JSON header after the first 8 bytes of a file of this size.  Raises ModelDirError."""
    n_header = int(struct.unpack("<Q", head)[0]) if len(head) == 8 else _MAX_HEADER_BYTES
    if n_header >= min(size - 7, _MAX_HEADER_BYTES):
        raise ModelDirError(f"{where}: not a safetensors file, or cut off inside its header ({size} bytes)")
    return n_header


def parse_header(text: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """Every tensor of a file of this size whose JSON header is text.  Raises ModelDirError as read_header does."""
    data = 8 + len(text)
    try:
        entries = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        tensors = {
            name: TensorInfo(
                str(entry["dtype"]),
                tuple(_size(n) for n in entry["shape"]),
                data + _size(entry["data_offsets"][0]),
                data + _size(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelDirError(
            f"{where}: not a safetensors file (its header is not the JSON that belongs there)"
        ) from None
    end = max((info.end for info in tensors.values()), default=data)
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise ModelDirError(f"{where}: {what}: the header needs {end} bytes, the file has {size}")
    for name, info in tensors.items():
        item = np.dtype(_NUMPY[info.dtype]).itemsize if info.dtype in _NUMPY else None
        if info.end < info.start or (item and info.end - info.start != item * prod(info.shape)):
            raise ModelDirError(
                f"{where}: tensor {name!r} has {info.end - info.start} bytes for {info.dtype} {info.shape}"
            )
    return tensors


def _size(value: Any) -> int:
    """A size or offset that numpy can take.  Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is no size")
    return value


class TensorFile:
    """One safetensors file, memory-mapped.  Arrays stay valid for as long as they are referenced."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors = read_header(self.path)
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, name: str) -> NDArray[Any]:
        """Read-only view of the tensor in its own type; BF16 as raw uint16."""
        info = self.tensors[name]
        if info.dtype not in _NUMPY:
            raise ModelDirError(f"{self.path}: tensor {name!r} is {info.dtype}; known are {', '.join(_NUMPY)}")
        dtype = np.dtype(_NUMPY[info.dtype])
        return np.frombuffer(self._map, dtype, prod(info.shape), info.start).reshape(info.shape)


class Checkpoint:
    """All tensors of a folder's *.safetensors files (one file, or shards with or without an index)."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ModelDirError: no safetensors, one is damaged, or the index names a file that is not there."""
        self.folder = Path(folder)
        self._files = [TensorFile(path) for path in weight_files(self.folder)]
        self._where = {name: file for file in self._files for name in file.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def info(self, name: str) -> TensorInfo:
        return self.file(name).tensors[name]

    def file(self, name: str) -> TensorFile:
        """Raises ModelDirError where no file has the tensor."""
        if name not in self._where:
            raise ModelDirError(f"{self.folder}: no tensor {name!r} in its {len(self._files)} safetensors file(s)")
        return self._where[name]

    def array(self, name: str) -> NDArray[Any]:
        return self.file(name).array(name)

    def float32(self, name: str) -> NDArray[np.float32]:
        """A copy of the tensor in float32, whatever float type it has on disk."""
        return to_float32(self.array(name))


def to_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """float16, float32, or bfloat16 (raw uint16) -> float32, exact."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.  Raises ModelDirError: none, or one of the index is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("files beside the index, by name")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ModelDirError(f"{index}: not the index of a sharded checkpoint") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelDirError(f"{folder}: {len(missing)} of {len(names)} weight files missing, first {missing[0]}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelDirError(f"{folder}: no *.safetensors files; is this the folder of a checkpoint?")
    return files


def blocks(path: Path, info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor, some MB at a time: read, not mapped, so that they do not pile up in memory."""
    with path.open("rb") as file:
        file.seek(info.start)
        left = info.end - info.start
        while left:
            block = file.read(min(left, _BLOCK_BYTES))
            if not block:
                raise ModelDirError(f"{path}: became shorter while it was read")
            left -= len(block)
            yield block


def finite_blocks(
    path: Path, name: str, info: TensorInfo, progress: Callable[[int, int], None] | None = None
) -> Iterator[bytes]:
    """The same, and each number looked at.  progress: called with (bytes done, bytes in all).

    Raises ModelDirError: a value that is infinite or not a number.  Types that are not floats are not looked at.
    """
    done, total = 0, info.end - info.start
    for block in blocks(path, info):
        if info.dtype == "F32":
            finite = bool(np.isfinite(np.frombuffer(block, np.float32)).all())
        else:
            exponent = {"F16": 0x7C00, "BF16": 0x7F80}.get(info.dtype)  # all ones: infinite, or not a number
            finite = not exponent or bool(((np.frombuffer(block, np.uint16) & exponent) != exponent).all())
        if not finite:
            row = done * info.shape[0] // total if info.shape else 0
            raise ModelDirError(f"{path}: {name} has values that are not finite, in row {row} or soon after")
        yield block
        done += len(block)
        if progress:
            progress(done, total)


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """The beginning of a file of tensors: name -> (dtype, shape, n bytes), which follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, transformers refuses a file
    offset = 0
    for name, (dtype, shape, n_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64 + 56)  # so that the data begins on a multiple of 64 bytes
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], Iterable[bytes]]]) -> None:
    """Write a safetensors file: name -> (dtype, shape, its bytes in chunks).  Complete or not there at all."""
    sizes = {name: np.dtype(_NUMPY[dtype]).itemsize * prod(shape) for name, (dtype, shape, _) in tensors.items()}
    write_raw_tensors(path, {name: (*tensor[:2], sizes[name], tensor[2]) for name, tensor in tensors.items()})


def write_raw_tensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int, Iterable[bytes]]]) -> None:
    """The same for types that numpy lacks: name -> (dtype, shape, n bytes, its bytes in chunks).

    Large blocks of zeros become holes in the file, which take no room.
    """
    header = build_header({name: (dtype, shape, n_bytes) for name, (dtype, shape, n_bytes, _) in tensors.items()})
    wanted = sum(n_bytes for _, _, n_bytes, _ in tensors.values())

    def write(file: IO[bytes]) -> None:
        file.write(header)
        for _, _, _, chunks in tensors.values():
            for chunk in chunks:
                if chunk == _ZEROS:
                    file.seek(len(chunk), os.SEEK_CUR)
                else:
                    file.write(chunk)
        file.truncate()
        if file.tell() != len(header) + wanted:
            raise ModelDirError(f"{path}: {file.tell() - len(header)} bytes were written where {wanted} belong")

    write_atomic(path, write)


def write_atomic(path: Path, write: Any) -> None:
    """Call write(file) on a temporary file beside path, flush it to disk, and move it into place.

    Who may read it: whoever may read the one that is there, else as the user's umask has it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # file systems that refuse it
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # else a power cut may undo the move
        finally:
            os.close(folder)
