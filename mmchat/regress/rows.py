"""Texts of exactly so many rows, and the lengths at which engines are known or suspected to break."""

from __future__ import annotations

import random
from collections.abc import Callable

from mmchat.errors import RegressError
from mmchat.prompt import ChatTokenizer, Message, RowCounter, Text

_DIGITS = "123456789"  # Qwen2's tokenizer never joins digits
_CHUNK_ROWS = 256  # what mmchat's CPU engine prefills at a time
_TRIES = 8


def digits(n: int) -> str:
    """n digits, the same for the same n."""
    return "".join(random.Random(n).choices(_DIGITS, k=n))


def fill(n_rows: int, count: Callable[[str], int], start: str = "") -> str:
    """`start` and digits behind it that make n_rows rows; one digit where even that is too long.

    count: rows that a text makes.  Raises RegressError: a tokenizer that joins digits as it likes.
    """
    n = max(1, n_rows - count(start or "1") + (0 if start else 1))
    for _ in range(_TRIES):
        text = start + digits(n)
        missing = n_rows - count(text)
        if missing == 0 or (n == 1 and missing < 0):
            return text
        n = max(1, n + missing)
    raise RegressError(f"no text of digits makes exactly {n_rows} rows with this tokenizer")


def first_question_rows(tokenizer: ChatTokenizer, system: str) -> Callable[[str], int]:
    """text -> rows of the whole prompt that it makes as the first question of a conversation without pictures."""
    counter = RowCounter(tokenizer, query_num=1)
    before = counter.message(Message("system", (Text(system),))) + counter.header
    return lambda text: before + counter.message(Message("user", (Text(text),)))


def boundaries(cap: int, *, safe_rows: int | None = None) -> list[int]:
    """Lengths of prompts worth trying, ascending: around multiples of 32, 64, 128 and 256, powers of two, what is
    known to be safe, and the cap, which a prompt reaches without an answer and one row more exceeds.
    """
    middles = {*range(64, 257, 32), *range(256, 513, 64), *range(512, 1025, 128), *range(1024, cap, _CHUNK_ROWS)}
    powers = {1 << i for i in range(5, cap.bit_length() + 1)}
    found = {n + d for n in middles | powers | {safe_rows or cap} for d in (-1, 0, 1)}
    return sorted({n for n in found if n <= cap} | {cap - 1, cap, cap + 1})
