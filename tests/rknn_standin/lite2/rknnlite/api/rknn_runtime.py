"""What librknnrt would do: take inputs, run the encoder that the model file holds, in numpy.

The file has the container that RKNN files have (signature, sizes, data, JSON), with contents of its own.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rknnlite.api.encoder import encode, encode_picture
from rknnlite.api.knobs import count, is_due, log, on_the_npu, trace, wait

_HEAD = struct.Struct("<8sQQ40x")  # signature, container version, bytes of data
_NHWC, _UNDEFINED = 1, 3
_TYPES = {"int8", "uint8", "int16", "float16", "float32"}


class _Call:
    """Keeps a call's buffers and, by a cycle, itself: Lite2 up to 2.3.2 loses memory this way (toolkit2 issue 42)."""

    def __init__(self, buffers: list[Any]) -> None:
        self.buffers, self.me = buffers, self


class RKNNRuntime:
    def __init__(self, data: bytes) -> None:
        """Raises RuntimeError: not a model, as RKNN's and this stand-in's container has it."""
        signature, version, n_data = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))
        if signature != b"RKNN\0\0\0\0" or version != 6 or len(data) < _HEAD.size + n_data + 8:
            raise RuntimeError("RKNN init failed. error code: RKNN_ERR_MODEL_INVALID")
        body = memoryview(data)[_HEAD.size : _HEAD.size + n_data]
        text = data[_HEAD.size + n_data + 8 :]
        if struct.unpack_from("<Q", data, _HEAD.size + n_data)[0] != len(text):
            raise RuntimeError("RKNN init failed. error code: RKNN_ERR_MODEL_INVALID")
        described = json.loads(text)
        if "mmchat_standin" not in described:
            raise RuntimeError("RKNN init failed. error code: RKNN_ERR_MODEL_INVALID (not this stand-in's)")
        self.model: dict[str, Any] = described["mmchat_standin"]
        self.weights = {
            name: np.frombuffer(body, np.float32, int(np.prod(shape)), at).reshape(shape)
            for name, (shape, at) in self.model["tensors"].items()
        }
        shapes = [tuple(one["size"]) for one in described["norm_tensor"][: described["input_num"]]]
        self.shapes = [(shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape for shape in shapes]  # NHWC
        self.inputs: list[Any] = []
        *_, output = described["norm_tensor"]
        self.output: Any = np.zeros(output["size"], np.float32)
        self.number = 0
        self.library = _map_library()
        log("W", "Query dynamic range failed. Ret code: RKNN_ERR_MODEL_INVALID. (If it is a static shape RKNN model, "
            "please ignore the above warning message.)")  # fmt: skip

    def set_inputs(self, inputs: Any, data_type: str | None, data_format: Any) -> None:
        """Raises RuntimeError."""
        if is_due("SET", count("set")):
            raise RuntimeError("Set inputs failed. error code: RKNN_ERR_PARAM_INVALID")
        if not isinstance(inputs, list):
            raise RuntimeError(
                "Inputs should be placed in a list, like [img1, img2], both the img1 and img2 are ndarray."
            )
        if len(inputs) != len(self.shapes):
            raise RuntimeError("E Inputs are invalid.")
        formats = data_format if isinstance(data_format, list) else [data_format] * len(inputs)
        if len(formats) != len(inputs):
            raise RuntimeError("E The lengths of data_format and inputs are not equal.")
        self.inputs = []
        for i, (array, form, shape) in enumerate(zip(inputs, formats, self.shapes, strict=True)):
            if not isinstance(array, np.ndarray):
                raise RuntimeError(f"E Type of inputs[{i}] is not np.ndarray!")
            if array.dtype.name not in _TYPES:
                raise RuntimeError(f"E Unsupport inputs[{i}].dtype: {array.dtype}")
            if data_type is not None and array.dtype.name != data_type:
                raise RuntimeError(f"E inputs[{i}].dtype: {array.dtype} is not same as data_type: {data_type}")
            if form not in (None, "nhwc", "nchw"):
                raise RuntimeError(f"E Unsupport data format: {form}")
            if len(shape) == 4 and array.ndim != 4:
                raise RuntimeError(f"The input[{i}] need 4dims input, but {array.ndim}dims input buffer feed.")
            if array.ndim == 4 and form == "nchw":
                log("W", f"The input[{i}] need NHWC data format, but NCHW set, so it is changed")
                array = array.transpose(0, 2, 3, 1)
            formats[i] = _NHWC if array.ndim == 4 else _UNDEFINED  # Lite2 does so, in the caller's own list
            if array.size != np.prod(shape):  # the library's own check; Lite2 has none of shapes
                raise RuntimeError("Set inputs failed. error code: RKNN_ERR_PARAM_INVALID")
            self.inputs.append(np.ascontiguousarray(array, np.float32).reshape(shape))  # bytes as they lie

    def run(self, get_frame_id: bool = False) -> int:
        """0, or librknnrt's error; then the outputs are still those of the run before."""
        self.number = count("inference")
        if is_due("CRASH", self.number):
            log("E", "stand-in: segmentation fault on purpose (RKNN_STANDIN_CRASH)")
            os.kill(os.getpid(), signal.SIGSEGV)
        while is_due("HANG", self.number):
            time.sleep(3600)
        began = time.monotonic()
        if is_due("RUN", self.number) or not on_the_npu(self._compute):
            print("E RKNN: failed to submit!, op id: 7, op name: Conv, flags: 0x5, task start: 0", flush=True)
            return -1
        trace(call="inference", number=self.number, began=began, ended=time.monotonic(),
              shapes=[list(array.shape) for array in self.inputs])  # fmt: skip
        return 0

    def get_outputs(self, get_frame_id: bool = False, reuse_outputs: bool = False) -> list[Any]:
        """Raises RuntimeError."""
        if is_due("NONE", self.number):
            raise RuntimeError("E Get outputs failed, error code: RKNN_ERR_OUTPUT_INVALID")
        output = self.output.copy()
        _Call([*self.inputs, output])
        if is_due("NOTHING", self.number):
            return []
        if is_due("SHAPE", self.number):
            return [output[:, :-1]]
        if is_due("INTEGERS", self.number):
            return [output.astype(np.int8)]
        if is_due("NAN", self.number):
            output[0, 0, 0] = np.nan
        if is_due("INFINITE", self.number):
            output[0, -1, -1] = np.inf
        return [output]

    def _compute(self) -> None:
        wait()
        self.output = self._result().astype(np.float32)

    def _result(self) -> Any:
        if self.model["mode"] == "echo":
            picture, rows = (array.reshape(-1) for array in self.inputs)
            i = np.arange(16)
            return (picture[5 * i % picture.size] + 100 * rows[i % rows.size]).reshape(1, 2, 8)
        if self.model["mode"] == "square":
            return encode_picture(self.weights, self.model, *self.inputs)
        return encode(self.weights, self.model, *self.inputs)


def _map_library() -> mmap.mmap:
    """Lite2 loads librknnrt.so here; the stand-in maps an empty page by that name, for whoever looks for it."""
    folder = Path(tempfile.gettempdir()) / f"mmchat-standin-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with (folder / "librknnrt.so").open("a+b") as file:
        file.truncate(mmap.PAGESIZE)
        return mmap.mmap(file.fileno(), mmap.PAGESIZE)
