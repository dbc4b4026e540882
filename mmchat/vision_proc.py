"""The vision worker: the child's side (serve) and the parent's (VisionClient).

Pixels go in, embeddings go to the store; only keys and progress come back.  An encoder that fails, by whatever error,
is given up with its process; a new one goes on where it was, once per request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmchat.child import Handler
from mmchat.engine import Encoded
from mmchat.errors import EngineError, ImageError, ModelDirError
from mmchat.model_dir import OPENVINO_CURE, ModelSpec, open_model
from mmchat.store import Store
from mmchat.worker import Exclusive, Worker

# One slice of the 8B model takes minutes on a slow CPU, and 3 to 5 seconds on an RK3588 (reported).
SILENCE_S = 300.0
NPU_SILENCE_S = 60.0
_MAX_REQUEST_BYTES = 16 << 20


class VisionClient:
    """The encoder in its worker, for the parent."""

    def __init__(
        self,
        spec: ModelSpec,
        store: Store,
        *,
        n_threads: int | None = None,
        npu: Exclusive | None = None,
        log_file: Path | None = None,
    ) -> None:
        """npu: held while the encoder works, where it shares an NPU with the LLM.  log_file: for what it writes."""
        self._store, self._npu = store, npu
        self._silence_s = NPU_SILENCE_S if spec.board and spec.board.rknn else SILENCE_S
        config = {
            "folder": str(spec.folder),
            "store": store.to_dict(),
            "n_threads": n_threads,
            "log": str(log_file or "the worker's log"),
        }
        self.worker = Worker(__name__, config, name="vision", log_file=log_file)

    def encode(
        self,
        slices: Sequence[tuple[str, NDArray[np.uint8]]],
        progress: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Encoded:
        """Put the embedding of every (key, pixels) into the store; those that are there are left alone.

        progress: called with (slices done, slices in all).  The encoder may fail once and is then replaced.

        Raises EngineError (WorkerDied, WorkerTimeout), ModelDirError, ImageError, StoreError.
        """
        with self._npu.held(should_stop) if self._npu else contextlib.nullcontext(True) as is_mine:
            return self._encode(slices, progress, should_stop) if is_mine else Encoded(0, 0.0, 0)

    def _encode(
        self,
        slices: Sequence[tuple[str, NDArray[np.uint8]]],
        progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Encoded:
        todo = list(dict(slices).items())
        total, done, restarts, seconds = len(todo), 0, 0, 0.0
        while todo:
            batch = _batch(todo)
            request = {"slices": [_slice_to_wire(key, pixels) for key, pixels in batch]}
            n_done = 0
            try:
                for event in self.worker.call(request, silence_s=self._silence_s, should_stop=should_stop):
                    n_done += 1
                    seconds += event["seconds"]
                    if event["problem"]:
                        self._store.tell(event["problem"])
                    progress(done + n_done, total)
            except EngineError:
                self.worker.kill()  # where it is alive after an error, nobody knows in what state
                restarts += 1
                if restarts > 1:
                    raise
            done += n_done
            todo = todo[n_done:]
            if should_stop():
                break
        return Encoded(done, seconds, restarts)


class Encoder(Protocol):
    """What the worker drives, on whatever engine."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) uint8, sides multiples of the patch size -> (query_num, output_size) float32."""


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child: load the encoder, answer requests."""
    spec = open_model(Path(config["folder"]))
    store = Store(**config["store"])
    encoder = _encoder(spec, config)

    def handle(request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        for item in request["slices"]:
            if should_stop():
                return
            pixels = _slice_from_wire(item, spec)
            started, problem = time.perf_counter(), None
            if store.get(item["key"]) is None:  # not has(): a damaged one in a read-only folder stays there
                problem = store.put(item["key"], encoder.encode(pixels))
            yield {"key": item["key"], "seconds": time.perf_counter() - started, "problem": problem}

    return {}, handle


def _encoder(spec: ModelSpec, config: dict[str, Any]) -> Encoder:
    if spec.board and spec.board.rknn:
        from mmchat.rknn_vision import RknnEncoder

        return RknnEncoder(spec.board, spec.vision, log=config["log"])
    try:
        from mmchat.openvino_vision import open_encoder
    except ModuleNotFoundError:
        raise ModelDirError(f"{spec.folder}: its encoder runs on the CPU engine, {OPENVINO_CURE}") from None
    return open_encoder(spec, config["n_threads"])


def _batch(slices: list[tuple[str, NDArray[np.uint8]]]) -> list[tuple[str, NDArray[np.uint8]]]:
    """As many of the first slices as a request may carry; at least one."""
    size, n = slices[0][1].nbytes, 1
    while n < len(slices) and size + slices[n][1].nbytes <= _MAX_REQUEST_BYTES:
        size += slices[n][1].nbytes
        n += 1
    return slices[:n]


def _slice_to_wire(key: str, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    return {"key": key, "height": pixels.shape[0], "width": pixels.shape[1], "pixels": pixels.tobytes()}


def _slice_from_wire(item: dict[str, Any], spec: ModelSpec) -> NDArray[np.uint8]:
    """Raises ImageError for what the encoder must not see."""
    width, height, patch = item["width"], item["height"], spec.vision.patch_size
    if width < patch or height < patch or width % patch or height % patch:
        raise ImageError(f"a slice of {width}x{height} is not made of patches of {patch}x{patch}")
    if (width // patch) * (height // patch) > spec.slices.max_patches:
        raise ImageError(f"a slice of {width}x{height} has more patches than {spec.slices.max_patches}")
    if len(item["pixels"]) != width * height * 3:
        raise ImageError(f"a slice of {width}x{height} came with {len(item['pixels'])} bytes")
    return np.frombuffer(item["pixels"], np.uint8).reshape(height, width, 3)
