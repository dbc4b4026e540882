"""Pieces -> the rows that an engine is fed: token rows and image embeddings, concatenated.

Also what makes two rows the same, which is how engines find out what their KV cache already holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mmchat.embed_table import EmbedTable
from mmchat.engine import ImageRows, Piece, Tokens
from mmchat.errors import MissingEmbeddings, PromptError

_AT_ONCE = 256  # rows that are compared in C
RowKey = int | tuple[str, int]  # a token id, or a row of an image embedding


def row_keys(pieces: Sequence[Piece]) -> list[RowKey]:
    """What each row of a prompt is; two rows with equal keys after equal rows have equal KV entries.

    Raises PromptError for a piece that is none, or an image without rows.
    """
    keys: list[RowKey] = []
    for piece in pieces:
        if isinstance(piece, Tokens):
            keys += piece.ids
        elif isinstance(piece, ImageRows) and piece.n_rows >= 1:
            keys += [(piece.key, i) for i in range(piece.n_rows)]
        else:
            raise PromptError(f"{piece!r} is no piece of a prompt")
    return keys


def common_prefix(a: Sequence[RowKey], b: Sequence[RowKey]) -> int:
    """How many first rows are the same."""
    n = min(len(a), len(b))
    for start in range(0, n, _AT_ONCE):
        end = min(start + _AT_ONCE, n)
        if a[start:end] != b[start:end]:
            return next((i for i in range(start, end) if a[i] != b[i]), end)
    return n


def choose_cache(held: Sequence[Sequence[RowKey]], wanted: Sequence[RowKey], n_most: int) -> tuple[int, int, int]:
    """Which KV cache a prompt goes on in, where an engine has several (at most n_most, one at least).

    held: the rows in each, the least recently used first.

    Returns (source, target, n): the first n rows of source are of use, all but the prompt's last at most, since that
    one's output is what the first token is chosen from; and the prompt goes on in target.  That is source itself,
    unless source would lose more rows than it keeps: then it belongs to another conversation, most likely, and the
    rows are to be copied to a new cache (target == len(held)), or to the one that was not used for longest.
    """
    common = [common_prefix(rows, wanted) for rows in held]
    source = max(range(len(held)), key=lambda number: (common[number], number))
    n = min(common[source], len(wanted) - 1)
    if len(held[source]) - n <= n:
        return source, source, n
    return source, len(held) if len(held) < n_most else 0, n


def assemble(
    pieces: Sequence[Piece],
    table: EmbedTable,
    load_image: Callable[[str], NDArray[np.float32] | None],
    *,
    skip: int = 0,
) -> NDArray[np.float32]:
    """The rows of all pieces but the first `skip` rows: (n, table.width) float32, C-contiguous.

    load_image: the embedding under a store key, or None where it is not there.

    Everything is checked here, before an engine sees any of it.  Raises MissingEmbeddings (all that are missing),
    PromptError: a token that the table does not have, or an embedding of the wrong shape or with values that are
    not finite.
    """
    total = sum(piece.n_rows for piece in pieces)
    out = np.empty((total - skip, table.width), np.float32)
    missing: list[str] = []
    at = -skip  # where the piece begins in out
    for piece in pieces:
        first = max(0, -at)  # rows of the piece that are skipped
        at += piece.n_rows
        if first >= piece.n_rows:
            continue
        target = out[at - piece.n_rows + first : at]
        if isinstance(piece, Tokens):
            table.rows(piece.ids[first:], out=target)
            continue
        image = load_image(piece.key)
        if image is None:
            missing.append(piece.key)
            continue
        if image.shape != (piece.n_rows, table.width):
            raise PromptError(f"an image embedding has shape {image.shape}; {(piece.n_rows, table.width)} is needed")
        if not np.isfinite(image).all():
            raise PromptError(f"the image embedding {piece.key[:12]} holds values that are not finite")
        target[...] = image[first:]
    if missing:
        raise MissingEmbeddings(missing)
    return out
