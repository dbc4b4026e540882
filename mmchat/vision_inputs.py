"""What the host computes for the vision encoder: patches, position rows, key mask, resampler key positions.

The tower is SigLIP in NaViT style: any patch grid, positions looked up in a side x side table by bucket.  Keeping
these four on the host leaves a graph of matmuls, norms and attention that every engine can compile (DESIGN 6).

Source: the published processor, vision tower and resampler; tests compare with vectors made by running them.
This module knows no engine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Added to the scores of padding keys.  Survives float16, which the float32 minimum does not.
MASKED = -1e4


def host_inputs(
    patches: NDArray[np.float32],
    rows: int,
    columns: int,
    *,
    positions: NDArray[np.float32],
    output_size: int,
    n: int,
) -> dict[str, NDArray[np.float32]]:
    """The encoder's four inputs, in its order, each float32 and padded to n patches (n >= rows * columns).

    patches: (rows * columns, 3 * patch²), normalised.  positions: the tower's table, (side², hidden).

    Gives patches (1, n, 3 * patch²), position_rows (1, n, hidden), key_mask (1, 1, n), key_positions
    (1, n, output_size).  None has four dimensions, so that no engine can take one for a picture in another layout.
    """
    used = rows * columns
    key_mask = np.zeros((1, 1, n), np.float32)
    key_mask[..., used:] = MASKED
    side = round(len(positions) ** 0.5)

    def padded(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return (np.pad(array, ((0, n - used), (0, 0))) if n > used else array)[None]

    return {
        "patches": padded(patches),
        "position_rows": padded(positions[position_ids(rows, columns, side)]),
        "key_mask": key_mask,
        "key_positions": padded(sincos_positions(rows, columns, output_size)),
    }


def patches(pixels: NDArray[np.uint8], patch_size: int) -> NDArray[np.float32]:
    """(height, width, 3) uint8 -> (rows * columns, 3 * patch_size²) float32, normalised; a patch is [channel][y][x]."""
    height, width, _ = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = pixels.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    flat: NDArray[np.float32] = tiles.reshape(rows * columns, 3 * patch_size * patch_size).astype(np.float32)
    # fl32(fl32(fl32(v / 255) - 0.5) / 0.5): the processor's own three roundings, not 2v/255 - 1.
    flat /= np.float32(255)
    flat -= np.float32(0.5)
    flat /= np.float32(0.5)
    return flat


@lru_cache(maxsize=1024)
def _buckets(n: int, side: int) -> NDArray[np.int64]:
    """Bucket of each of n patches along a side, out of `side`.

    Nearly floor(side * i / n).  The reference compares float32 coordinates, made by a vectorised arange (8 lanes,
    blocks of 16), with float32 edges, and lands one lower for some i when n is 25, 49, 50, 55, 58, ...; this is that
    arithmetic.  x86 and this code agree everywhere; an ARM build of the reference would differ for a few n > 48.
    """
    step = float(np.float32(1) / np.float32(n))
    whole = n - n % 16
    i = np.arange(whole)
    lane = i % 8
    start = (step * (i - lane)).astype(np.float32).astype(np.float64)
    coordinates = np.concatenate([start + lane * step, step * np.arange(whole, n)]).astype(np.float32)
    edges = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    return np.searchsorted(edges, coordinates, side="right").astype(np.int64)


def position_ids(rows: int, columns: int, side: int) -> NDArray[np.int64]:
    """(rows * columns,) indices into the tower's side * side position table."""
    return (_buckets(rows, side)[:, None] * side + _buckets(columns, side)).reshape(-1)


def sincos_positions(rows: int, columns: int, width: int) -> NDArray[np.float32]:
    """(rows * columns, width) float32: what the resampler adds to its keys; the column fills the first half."""
    quarter = width // 4
    table = np.empty((rows, columns, 4 * quarter), dtype=np.float32)
    table[..., : 2 * quarter] = _sincos(columns, quarter)[None, :, :]
    table[..., 2 * quarter :] = _sincos(rows, quarter)[:, None, :]
    return table.reshape(rows * columns, 4 * quarter)


@lru_cache(maxsize=256)
def _sincos(n: int, quarter: int) -> NDArray[np.float32]:
    """(n, 2 * quarter) float32: sines, then cosines, of each of n places along a side."""
    frequencies = (1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / quarter)).astype(np.float32)
    angles = np.arange(n, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
