"""Token ids -> rows of the checkpoint's embedding table, from a memory-mapped file.

RKLLM has no call that embeds token ids, so mmchat brings its own table: one safetensors file with the tensor
`embed_tokens.weight` (any prefix), in the type the checkpoint has.  A checkpoint's own file that holds the tensor
among others opens as well, so nothing has to be copied where the checkpoint is at hand.

This module does not know which ids are special, nor what rows are used for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint, TensorFile, TensorInfo, finite_blocks, write_tensors
from mmchat.errors import ModelDirError, PromptError

_SUFFIX = "embed_tokens.weight"
_FLOATS = {"F16", "BF16", "F32"}

# Rows of 3584 floats that stay near the processor while they are widened.  With several threads blocks are larger, so
# that they wait less for the interpreter's lock.  Both found with `mmchat bench host`.
_BLOCK_ROWS, _PARALLEL_BLOCK_ROWS = 24, 64
_PARALLEL_FROM_ROWS = 512
_THREADS = min(4, os.cpu_count() or 1)


class EmbedTable:
    """n_ids rows of `width` numbers.  Reading is safe from several threads."""

    def __init__(self, table: NDArray[Any], path: Path) -> None:
        self._table = table
        self.path = path
        self.n_ids, self.width = int(table.shape[0]), int(table.shape[1])

    @classmethod
    def open(cls, path: str | Path) -> EmbedTable:
        """Map the table at path: a safetensors file with exactly one `*embed_tokens.weight`.

        Raises ModelDirError: missing, truncated or foreign file, no such tensor, or not a table of floats.
        """
        file = TensorFile(path)
        names = [name for name in file.tensors if name.endswith(_SUFFIX)]
        if len(names) != 1:
            raise ModelDirError(f"{path}: has {len(names)} tensors named *{_SUFFIX}; an embedding table has one")
        _check_rows(file.tensors[names[0]], f"{path}: {names[0]}")
        return cls(file.array(names[0]), Path(path))

    def check_belongs(self, hidden_size: int, n_tokens: int) -> None:
        """Raises ModelDirError where the table is not that of a model so wide, with a tokenizer of so many tokens."""
        if self.width != hidden_size or self.n_ids < n_tokens:
            raise ModelDirError(
                f"{self.path}: rows {self.n_ids} x {self.width}, but the model is {hidden_size} wide "
                f"and its tokenizer has {n_tokens} tokens"
            )

    def rows(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The rows of ids: (n, width) float32, C-contiguous; written into out where it is given.

        Raises PromptError: an id that the table does not have, or out of another shape or type.
        """
        try:
            wanted = np.asarray(ids if len(ids) else np.empty(0, np.int64))
        except ValueError:
            raise PromptError("token ids are whole numbers in one list, not lists of several lengths") from None
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise PromptError(f"token ids are whole numbers in one list, not {wanted.dtype} of shape {wanted.shape}")
        shape = (len(wanted), self.width)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not (out.flags.c_contiguous and out.flags.writeable):
            raise PromptError(f"out must be writable C-contiguous float32 {shape}, not {out.dtype} {out.shape}")
        if len(wanted) == 0:
            return out
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= self.n_ids:
            raise PromptError(f"token id {low if low < 0 else high} is not in the table (0 to {self.n_ids - 1})")
        self._fill(wanted, out)
        return out

    def _fill(self, wanted: NDArray[Any], out: NDArray[np.float32]) -> None:
        if len(wanted) < _PARALLEL_FROM_ROWS or _THREADS == 1:
            _gather(self._table, wanted, out, _BLOCK_ROWS)
        else:
            parts = zip(np.array_split(wanted, _THREADS), np.array_split(out, _THREADS), strict=True)
            list(_pool().map(lambda part: _gather(self._table, part[0], part[1], _PARALLEL_BLOCK_ROWS), parts))


def _check_rows(info: TensorInfo, what: str) -> None:
    if info.dtype not in _FLOATS or len(info.shape) != 2 or 0 in info.shape:
        raise ModelDirError(f"{what} is {info.dtype} {list(info.shape)}; float rows are needed")


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="mmchat-rows")


def _gather(table: NDArray[Any], ids: NDArray[Any], out: NDArray[np.float32], block_rows: int) -> None:
    if table.dtype == np.float32:
        np.take(table, ids, axis=0, out=out, mode="clip")  # ids are checked; "raise" would copy once more
        return
    widen = _widen_float16 if table.dtype == np.float16 else _widen_bfloat16
    block = np.empty((min(block_rows, len(ids)), table.shape[1]), np.int16)
    raw = table.view(np.int16)
    for start in range(0, len(ids), block_rows):
        part = ids[start : start + block_rows]
        half = block[: len(part)]
        np.take(raw, part, axis=0, out=half, mode="clip")
        widen(half, out[start : start + len(part)])


def _widen_bfloat16(half: NDArray[np.int16], out: NDArray[np.float32]) -> None:
    bits = out.view(np.int32)
    bits[...] = half
    np.left_shift(bits, 16, out=bits)


def _widen_float16(half: NDArray[np.int16], out: NDArray[np.float32]) -> None:
    """Twice as fast as numpy's own cast: shift the bits into place, then correct the exponent by one multiplication.

    Exact for every finite value, subnormals included.  Tables hold no others (build_table checks).
    """
    bits = out.view(np.int32)
    bits[...] = half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x7000_2000), out=bits)  # 0x8fffe000: drop the copies of the sign bit
    np.multiply(out, np.float32(2.0**112), out=out)


def find_table(checkpoint: Checkpoint) -> str:
    """The name of the embedding table among a checkpoint's tensors.

    Raises ModelDirError: none, more than one, or one that is no table of floats.
    """
    names = [name for name in checkpoint if name.endswith(_SUFFIX)]
    if len(names) > 1:  # a table of its own may lie beside the checkpoint it was taken from
        names = [name for name in names if name != _SUFFIX]
    if len(names) != 1:
        raise ModelDirError(f"{checkpoint.folder}: has {len(names)} tensors named *{_SUFFIX}; exactly one is needed")
    _check_rows(checkpoint.info(names[0]), f"{checkpoint.folder}: {names[0]}")
    return names[0]


def build_table(checkpoint: str | Path, path: str | Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Copy the embedding table out of a checkpoint folder into a file of its own, in constant memory.

    progress: called with (bytes done, bytes in all).

    Raises ModelDirError: no table in the checkpoint, or a value in it that is not finite.
    """
    source = Checkpoint(checkpoint)
    name = find_table(source)
    info = source.info(name)
    chunks = finite_blocks(source.file(name).path, name, info, progress)
    write_tensors(Path(path), {_SUFFIX: (info.dtype, info.shape, chunks)})
