"""The vision encoder on Rockchip's NPU, through rknn-toolkit-lite2: one encoder input -> its embedding.

Two kinds of *.rknn are driven (vision.mode in mmchat.json):

    navit   exact: any patch grid up to N patches.  Inputs, all float32 and in this order: patches (1, N, 3 * patch²),
            position_rows (1, N, hidden), key_mask (1, 1, N), key_positions (1, N, output_size); see vision_inputs.
    square  as others publish them: one picture (1, side, side, 3), RGB from 0 to 255, float32.  Every slice is scaled
            to the square, whatever its shape.

Both give (1, query_num, output_size), floats.

Lite2 raises nothing on purpose: it returns -1 or None and writes why to stderr.  It takes an array of another layout
without a word, changes the list of layouts it is given, leaves cycles of objects to the garbage collector, and does
not notice that a run failed: then it gives the outputs of the run before.  All of that was seen with its release 2.5.0
(emulated, over a fake librknnrt).  This module is for the worker alone.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import TensorFile, to_float32
from mmchat.errors import EngineError
from mmchat.model_dir import POSITIONS, BoardSpec, RknnSpec, VisionSpec


class RknnEncoder:
    """Encodes one input at a time."""

    def __init__(self, board: BoardSpec, spec: VisionSpec, *, log: str = "the worker's log") -> None:
        """log: where errors say that Lite2's own words are.

        Raises ModelDirError, EngineError: no Lite2, no NPU, or a model that does not load.
        """
        assert board.rknn is not None
        self._spec, self._rknn = spec, board.rknn
        if board.rknn.positions_path:
            self._positions = to_float32(TensorFile(board.rknn.positions_path).array(POSITIONS))
        self._name = board.vision_path.name
        self._lite2 = _Lite2(board, log)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) uint8, sides multiples of the patch size -> (query_num, output_size) float32.

        Raises EngineError: the NPU failed, or what it gave is no embedding.
        """
        inputs = self._navit(pixels) if self._rknn.n_patches else [_square(pixels, self._rknn.side)]
        outputs = [np.asarray(output) for output in self._lite2.infer(inputs)]
        wanted = (self._spec.query_num, self._spec.output_size)
        if len(outputs) != 1 or outputs[0].shape not in (wanted, (1, *wanted)) or outputs[0].dtype.kind != "f":
            given = ", ".join(f"{output.dtype} {output.shape}" for output in outputs) or "nothing"
            needed = f"floats of {(1, *wanted)} are needed"
            raise EngineError(f"{self._name} gave {given}; {needed}: is it this model's encoder?")
        embedding = np.array(outputs[0], np.float32).reshape(wanted)
        if not np.isfinite(embedding).all():
            raise EngineError(f"{self._name} gave values that are not finite")
        return embedding

    def _navit(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        size = self._spec.patch_size
        inputs = vision_inputs.host_inputs(
            vision_inputs.patches(pixels, size),
            pixels.shape[0] // size,
            pixels.shape[1] // size,
            positions=self._positions,
            output_size=self._spec.output_size,
            n=self._rknn.n_patches,
        )
        return list(inputs.values())


def _square(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """(height, width, 3) uint8 -> (1, side, side, 3) float32 from 0 to 255."""
    from PIL import Image

    if pixels.shape[:2] != (side, side):
        pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    return pixels[None].astype(np.float32)


class _Lite2:
    """One model in Lite2, whose codes and Nones become EngineError."""

    def __init__(self, board: BoardSpec, log: str) -> None:
        assert board.rknn is not None
        self._why = f"{log} has its own words, and mmchat doctor looks for the cause"
        try:
            from rknnlite.api import RKNNLite
        except ImportError as error:
            raise EngineError(
                f"rknn-toolkit-lite2 cannot be imported ({error}): pip install rknn-toolkit-lite2, on an aarch64 board"
            ) from None
        core_mask = _core_mask(RKNNLite, board.rknn)
        self._lite2: Any = RKNNLite()
        code = self._called("load_rknn", self._lite2.load_rknn, str(board.vision_path))
        if code != 0:
            raise EngineError(f"load_rknn returned {code} for {board.vision_path}; {self._why}")
        code = self._called("init_runtime", self._lite2.init_runtime, core_mask=core_mask)
        if code != 0:
            raise EngineError(
                f"init_runtime returned {code} for {board.vision_path.name}: no NPU for this user, a librknnrt.so that "
                f"is missing or older than the model, a model for another chip, or no memory; {self._why}"
            )

        self._check_runs()

    def _check_runs(self) -> None:
        """Let inference() see what rknn_run returned, which it does not look at."""
        runtime = getattr(self._lite2, "rknn_runtime", None)
        run = getattr(runtime, "run", None)
        if runtime is None or run is None:
            print("this rknn-toolkit-lite2 has no rknn_runtime.run: a failed run cannot be told", flush=True)
            return

        def checked(*arguments: Any) -> Any:
            code = run(*arguments)
            if isinstance(code, int) and code != 0:
                raise EngineError(f"rknn_run returned {code}")  # inference() catches it, writes it, and returns None
            return code

        runtime.run = checked

    def infer(self, inputs: list[NDArray[np.float32]]) -> list[Any]:
        layouts = ["nhwc"] * len(inputs)  # read for arrays of four dimensions alone; a new list, for it is changed
        outputs = self._called(
            "inference", self._lite2.inference, [np.ascontiguousarray(one) for one in inputs], data_format=layouts
        )
        gc.collect()  # what a call leaves refers to itself: megabytes that wait for some later collection
        if outputs is None:
            raise EngineError(f"the NPU gave no result (inference returned None); {self._why}")
        return list(outputs)

    def _called(self, name: str, call: Any, *arguments: Any, **named: Any) -> Any:
        """Raises EngineError for whatever the call raises."""
        try:
            return call(*arguments, **named)
        except Exception as error:  # some mistakes of its own, and older releases
            raise EngineError(f"{name} raised {type(error).__name__}: {error}; {self._why}") from error


def _core_mask(lite2: Any, rknn: RknnSpec) -> int:
    name = f"NPU_CORE_{rknn.cores.upper()}"
    mask = getattr(lite2, name, None)
    if mask is None:
        raise EngineError(f"this rknn-toolkit-lite2 has no {name}: choose other vision.cores in mmchat.json")
    return int(mask)
