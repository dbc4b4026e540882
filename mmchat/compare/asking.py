"""Ask a model about pictures: each question in a conversation of its own, always the most likely token.

One model is in memory at a time, and it encodes every picture itself: its store is its own, and gone afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import mmchat
from mmchat.compare.facts import Compared, Said, compare_answers, compare_slices
from mmchat.errors import ImageError
from mmchat.images import read_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class Judge(Protocol):
    def score(self, picture: Path, text: str) -> float:
        """How well they go together; more is better."""


@dataclass(frozen=True)
class Model:
    """engine, n_threads: as mmchat.open takes them."""

    folder: str
    engine: str = "auto"
    n_threads: int | None = None


@dataclass(frozen=True)
class _Asked:
    """By picture and question; embeddings by picture."""

    tokenizer: str
    said: dict[tuple[Path, str], Said]
    embeddings: dict[Path, list[NDArray[np.float32]]]


def pictures_in(folder: Path, most: int | None = None) -> list[Path]:
    """The pictures of a folder, by name.  Raises ImageError: no such folder, no picture in it, or one is damaged."""
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())[:most]
    if not found:
        raise ImageError(f"{folder}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    for path in found:
        read_image(path)  # before a model has worked for an hour
    return found


def compare(
    a: Model,
    b: Model,
    pictures: Sequence[Path],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    max_slice_nums: int | None = None,
    judge: Judge | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Compared]:
    """Raises what opening the models and asking them raise."""
    asked = []
    for model in (a, b):
        asked.append(_ask(model, pictures, questions, max_new_tokens, max_slice_nums, say))
    one, other = asked
    found = []
    for picture in pictures:
        slices = compare_slices(one.embeddings[picture], other.embeddings[picture])
        for question in questions:
            said = [each.said[picture, question] for each in asked]
            if judge:
                say(f"judging the answers about {picture.name}")
                said = [replace(each, judged=judge.score(picture, each.text)) for each in said]
            answers = compare_answers(said[0], said[1], same_tokens=one.tokenizer == other.tokenizer)
            found.append(Compared(picture.name, question, slices, answers))
    return found


def _ask(
    model: Model,
    pictures: Sequence[Path],
    questions: Sequence[str],
    max_new_tokens: int,
    max_slice_nums: int | None,
    say: Callable[[str], None],
) -> _Asked:
    said: dict[tuple[Path, str], Said] = {}
    embeddings: dict[Path, list[NDArray[np.float32]]] = {}
    with (
        tempfile.TemporaryDirectory() as store,
        mmchat.open(model.folder, engine=model.engine, store=store, n_threads=model.n_threads) as runtime,
    ):
        for number, picture in enumerate(pictures, 1):
            say(f"{runtime.spec.name}: picture {number} of {len(pictures)}, {picture.name}")
            for question in questions:
                session = runtime.session(max_slice_nums=max_slice_nums)
                started = time.perf_counter()
                text = session.ask(question, [picture], temperature=0.0, max_new_tokens=max_new_tokens).text
                said[picture, question] = Said(text, session.turns[0].ids, time.perf_counter() - started)
                if picture not in embeddings:
                    found = [runtime.store.get(key) for key in session.images[0].keys]
                    embeddings[picture] = [one.copy() for one in found if one is not None]
        return _Asked(runtime.tokenizer.digest, said, embeddings)
