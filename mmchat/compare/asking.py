"""Ask a model about pictures: each question in a conversation of its own, always the most likely token.

One model is in memory at a time, and it encodes every picture itself: its store is its own, and gone afterwards.  An
encoder without an LLM encodes all pictures first; then an LLM finds its rows in the store, and encodes nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import mmchat
from mmchat.compare.encoders import BareEncoder, cut, plan_of
from mmchat.compare.facts import Compared, Said, compare_answers, compare_slices
from mmchat.errors import ImageError
from mmchat.images import is_picture_name, read_image
from mmchat.model_dir import ModelSpec, open_model
from mmchat.store import Store, slice_key

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
    """By picture and question; embeddings by picture.  Without an LLM nothing was said."""

    tokenizer: str | None
    said: dict[tuple[Path, str], Said]
    embeddings: dict[Path, list[NDArray[np.float32]]]


def pictures_in(folder: Path, most: int | None = None) -> list[Path]:
    """The pictures of a folder, by name.  Raises ImageError: no such folder, no picture in it, or one is damaged."""
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder of pictures")
    found = sorted(path for path in folder.iterdir() if is_picture_name(path) and path.is_file())[:most]
    if not found:
        raise ImageError(f"{folder}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    for path in found:
        read_image(path)  # before a model has worked for an hour
    return found


def compare(
    a: Model | BareEncoder,
    b: Model | BareEncoder,
    pictures: Sequence[Path],
    questions: Sequence[str],
    *,
    llm: Model | None = None,
    max_new_tokens: int = 64,
    max_slice_nums: int | None = None,
    judge: Judge | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Compared]:
    """llm: what an encoder's rows are given to; without one, encoders are compared in their embeddings alone.

    Raises what opening the models and asking them raise.
    """
    for side in (a, b):  # before the other one has worked for an hour
        if isinstance(side, BareEncoder):
            _check(side, llm, pictures, max_slice_nums)
    asked = []
    for side in (a, b):
        if isinstance(side, Model):
            asked.append(_ask(side, pictures, questions, max_new_tokens, max_slice_nums, say))
            continue
        embeddings = _encode(side, llm, pictures, max_slice_nums, say)
        if llm:
            asked.append(_ask(llm, pictures, questions, max_new_tokens, max_slice_nums, say, embeddings))
        else:
            asked.append(_Asked(None, {}, embeddings))
    one, other = asked
    found = []
    for picture in pictures:
        slices = compare_slices(one.embeddings[picture], other.embeddings[picture])
        if not (one.said and other.said):
            found.append(Compared(picture.name, "", slices, None))
            continue
        for question in questions:
            said = [each.said[picture, question] for each in asked]
            if judge:
                say(f"judging the answers about {picture.name}")
                said = [replace(each, judged=judge.score(picture, each.text)) for each in said]
            answers = compare_answers(said[0], said[1], same_tokens=one.tokenizer == other.tokenizer)
            found.append(Compared(picture.name, question, slices, answers))
    return found


def _check(encoder: BareEncoder, llm: Model | None, pictures: Sequence[Path], max_slice_nums: int | None) -> None:
    """Raises ModelDirError, ImageError: this encoder does not fit the LLM, or the pictures as they are cut for it."""
    spec = open_model(llm.folder) if llm else None
    if spec:
        encoder.check_fits(spec)
    rule = spec.slices if spec else encoder.slices
    for picture in pictures:
        encoder.check_views(picture, plan_of(picture, rule, max_slice_nums))


def _encode(
    encoder: BareEncoder,
    llm: Model | None,
    pictures: Sequence[Path],
    max_slice_nums: int | None,
    say: Callable[[str], None],
) -> dict[Path, list[NDArray[np.float32]]]:
    """All at once, for the simulator takes minutes to begin."""
    rule = open_model(llm.folder).slices if llm else encoder.slices
    counts = [plan_of(picture, rule, max_slice_nums).n_inputs for picture in pictures]
    views = (view for picture in pictures for view in cut(picture, rule, max_slice_nums))
    found = iter(encoder.encode(views, sum(counts), say))
    return {picture: list(islice(found, count)) for picture, count in zip(pictures, counts, strict=True)}


def _ask(
    model: Model,
    pictures: Sequence[Path],
    questions: Sequence[str],
    max_new_tokens: int,
    max_slice_nums: int | None,
    say: Callable[[str], None],
    given: Mapping[Path, list[NDArray[np.float32]]] | None = None,
) -> _Asked:
    """given: the embeddings, where the model is not to encode itself."""
    said: dict[tuple[Path, str], Said] = {}
    embeddings = dict(given or {})
    with (
        tempfile.TemporaryDirectory() as store,
        mmchat.open(model.folder, engine=model.engine, store=store, n_threads=model.n_threads) as runtime,
    ):
        for number, picture in enumerate(pictures, 1):
            say(f"{runtime.spec.name}: picture {number} of {len(pictures)}, {picture.name}")
            if given is not None:
                keys = _put(runtime.store, runtime.spec, picture, max_slice_nums, given[picture])
            for question in questions:
                session = runtime.session(max_slice_nums=max_slice_nums)
                started = time.perf_counter()
                text = session.ask(question, [picture], temperature=0.0, max_new_tokens=max_new_tokens).text
                said[picture, question] = Said(text, session.turns[0].ids, time.perf_counter() - started)
                if given is not None:
                    assert session.images[0].keys == keys  # else it encoded the picture itself
                if picture not in embeddings:
                    found = [runtime.store.get(key) for key in session.images[0].keys]
                    embeddings[picture] = [one.copy() for one in found if one is not None]
        return _Asked(runtime.tokenizer.digest, said, embeddings)


def _put(
    store: Store, spec: ModelSpec, picture: Path, max_slice_nums: int | None, rows: Sequence[NDArray[np.float32]]
) -> tuple[str, ...]:
    """Keep rows as if the model's own encoder had made them; the keys."""
    keys = tuple(slice_key(view, spec.encoder_digest) for view in cut(picture, spec.slices, max_slice_nums))
    for key, one in zip(keys, rows, strict=True):
        store.put(key, one)
    return keys
