"""What the tests of captions share: a runtime without a model, small videos, and lines to compare."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from mmchat.engine import Event, Piece, Sampling
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer
from mmchat.record import Usage
from mmchat.runtime import Runtime
from mmchat.session import Session
from mmchat.store import Store
from mmchat.video import Caption, Frame, Notice, Source
from tests.fakes import FakeEngine, FakeVision

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
COLOURS = ("red", "green", "blue", "white", "yellow", "purple")


class Engine(FakeEngine):
    """faults: exceptions of the next requests.  prompts: the texts that were sent, pictures as <>, where kept.

    gate: where it is set, every answer waits for it; waits: an answer has come to it.
    """

    def __init__(self, store: Store, context_rows: int) -> None:
        super().__init__(TOKENIZER, store, SPEC.llm.hidden_size, context_rows=context_rows)
        self.faults: list[Exception | None] = []
        self.prompts: list[str] | None = None
        self.gate: threading.Event | None = None
        self.waits = threading.Event()

    def generate(
        self, pieces: Sequence[Piece], sampling: Sampling, should_stop: Any, *, resume_ids: Sequence[int] = ()
    ) -> Iterator[Event]:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        if self.prompts is not None:
            self.prompts.append("".join(_shown(piece) for piece in pieces))
        if self.gate is not None:
            self.waits.set()
            assert self.gate.wait(60)
        return super().generate(pieces, sampling, should_stop, resume_ids=resume_ids)


def _shown(piece: Piece) -> str:
    ids = getattr(piece, "ids", None)
    return "<>" if ids is None else b"".join(TOKENIZER.token_bytes(number) for number in ids).decode()


class FakeRuntime:
    """Everything but the model: answers depend on every row of the prompt, and on nothing else."""

    spec, tokenizer = SPEC, TOKENIZER

    def __init__(self, folder: Path, *, context_rows: int = 2048, cap_bytes: int = 1 << 30) -> None:
        self.store = Store(folder, cap_bytes)
        self.engine = Engine(self.store, context_rows)
        self.vision = FakeVision(self.store, SPEC.vision.query_num, SPEC.llm.hidden_size)
        self.parallel = True

    def session(self, system: str | None = None, **options: Any) -> Session:
        return Session(SPEC, self.tokenizer, self.store, self.vision, self.engine, system=system, **options)

    def ready(self) -> None: ...

    def __enter__(self) -> FakeRuntime:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def rt(self) -> Runtime:
        """The same, for the type checker."""
        return cast(Runtime, self)


def colour(name: str, size: tuple[int, int] = (56, 42)) -> Image.Image:
    return Image.new("RGB", size, name)


def distinct(number: int, size: tuple[int, int] = (28, 28)) -> NDArray[np.uint8]:
    """A picture that no other number has, with a quarter that says roughly which."""
    made = np.zeros((size[1], size[0], 3), np.uint8)
    made[: size[1] // 2, : size[0] // 2] = (number * 37 % 256, number * 11 % 256, number % 256)
    made[-1, :4, 0] = list(struct.pack(">I", number))
    return made


def make_video(
    path: Path,
    pictures: Iterable[Image.Image | NDArray[np.uint8]],
    *,
    codec: str = "libx264",
    form: str = "yuv420p",
    rate: int = 25,
    ticks: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """ticks: the frames' times in 1/rate s; 0, 1, 2 ... where there are none."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.pix_fmt, stream.options = form, options
        for number, picture in enumerate(pictures):
            pixels = np.asarray(picture)
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = ticks[number] if ticks else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames_of(source: Source) -> tuple[list[Frame], list[Notice]]:
    """All of them; times never go back."""
    items = list(source.frames(threading.Event()))
    frames = [item for item in items if isinstance(item, Frame)]
    times = [frame.time for frame in frames]
    assert times == sorted(times)
    assert [frame.index for frame in frames] == sorted({frame.index for frame in frames})
    return frames, [item for item in items if isinstance(item, Notice)]


def without_usage(captions: Iterable[Caption]) -> list[Caption]:
    """What does not depend on what the caches held."""
    return [replace(caption, usage=Usage()) for caption in captions]


def many(quick: int, deep: int) -> int:
    """How often: pytest --hypothesis-profile=deep takes its time."""
    return deep if settings.default is not None and settings.default.max_examples > 1000 else quick
