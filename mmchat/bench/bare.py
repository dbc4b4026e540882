"""A worker that runs a conversation on the engine and the encoder alone, in one process, and times only these two.

What `mmchat bench chat` compares the whole program with: no second process, no messages, no store on disk, and what
the session does is not on the clock.  Reading and cutting the pictures has a clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.bench.script import Timed, pictures, say
from mmchat.child import Handler
from mmchat.engine import Encoded
from mmchat.images import open_image
from mmchat.model_dir import ModelSpec, open_model
from mmchat.openvino_engine import open_engine
from mmchat.openvino_vision import open_encoder
from mmchat.prompt import ChatTokenizer
from mmchat.session import Session
from mmchat.slicing import slice_image
from mmchat.store import Store


def _cut(picture: bytes, spec: ModelSpec) -> None:
    with open_image(picture) as opened:
        plan = spec.slices.plan(opened.size)
        slice_image(opened.read(at_least=plan.refined or plan.source), plan)


class _Encoder:
    """A Vision on the spot.  seconds: spent encoding."""

    def __init__(self, spec: ModelSpec, store: Store, n_threads: int | None) -> None:
        self._encoder = open_encoder(spec, n_threads)
        self._store = store
        self.seconds = 0.0

    def encode(
        self,
        slices: Sequence[tuple[str, NDArray[np.uint8]]],
        progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Encoded:
        for key, pixels in slices:
            started = time.perf_counter()
            rows = self._encoder.encode(pixels)
            self.seconds += time.perf_counter() - started
            self._store.put(key, rows)
        return Encoded(len(slices), 0.0, 0)


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child.  A request is {"system", "turn"}, and turn 0 begins a conversation; the event has the figures."""
    spec = open_model(Path(config["folder"]))
    store, tokenizer = Store(config["store"]), ChatTokenizer(spec.tokenizer_path)
    vision = _Encoder(spec, store, config["n_threads"])
    engine = open_engine(spec, tokenizer, store.get, n_threads=config["n_threads"])
    timed = Timed(engine)
    sessions: list[Session] = []

    def handle(request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        if request["turn"] == 0:
            store.clear()
            sessions[:] = [Session(spec, tokenizer, store, vision, timed, system=request["system"])]
        before = vision.seconds + timed.seconds, timed.generate_s, timed.n_tokens
        say(sessions[0], request["turn"])
        started = time.perf_counter()
        for picture in pictures(request["turn"]):
            _cut(picture, spec)
        yield {
            "pictures_s": time.perf_counter() - started,
            "model_s": vision.seconds + timed.seconds - before[0],
            "generate_s": timed.generate_s - before[1],
            "n_tokens": timed.n_tokens - before[2],
        }

    return {}, handle
