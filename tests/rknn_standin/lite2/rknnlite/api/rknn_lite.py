"""RKNNLite with the signatures, codes and habits of rknn-toolkit-lite2 2.5.0: nothing is raised on purpose.

What its caller must not rely on is here: a file of any kind "loads", a list of layouts is changed in place, an array
in another layout is taken as it lies in memory, a failed run gives the outputs of the run before, every call leaves a
cycle of objects that holds its buffers.
"""

from __future__ import annotations

import traceback
from typing import Any

from rknnlite.api.knobs import count, is_due, knob, log, trace
from rknnlite.api.rknn_runtime import RKNNRuntime

CORE_MASKS = (0, 1, 2, 3, 4, 7, 0xFFFF)


class RKNNLite:
    NPU_CORE_AUTO = 0
    NPU_CORE_0 = 1
    NPU_CORE_1 = 2
    NPU_CORE_2 = 4
    NPU_CORE_0_1 = 3
    NPU_CORE_0_1_2 = 7
    NPU_CORE_ALL = 0xFFFF

    def __init__(self, verbose: bool = False, verbose_file: str | None = None) -> None:
        log("W", "rknn-toolkit-lite2 version: 2.5.0 (a stand-in)")
        self.rknn_data: bytes | None = None
        self.rknn_runtime: RKNNRuntime | None = None

    def load_rknn(self, path: str, key_path: str | None = None) -> int:
        try:
            if knob("LOAD") == "fail":
                raise OSError(5, "Input/output error")
            with open(path, "rb") as file:
                self.rknn_data = file.read()
        except OSError:
            log("E", f"Invalid RKNN model path: {path}")
            log("E", traceback.format_exc())
            return -1
        return 0

    def init_runtime(
        self, target: str | None = None, device_id: str | None = None, async_mode: bool = False, core_mask: int = 0
    ) -> int:
        number = count("init")
        if self.rknn_data is None:
            log("E", "Model is not loaded yet, this interface should be called after load_rknn!")
            return -1
        self.rknn_runtime = None
        try:
            if is_due("INIT_FAIL", number):
                raise RuntimeError("RKNN init failed. error code: RKNN_ERR_DEVICE_UNAVAILABLE")
            runtime = RKNNRuntime(self.rknn_data)
        except Exception:
            log("E", "Catch exception when init runtime!")
            log("E", traceback.format_exc())
            return -1
        if core_mask not in CORE_MASKS:
            log("E", f"The core mode {core_mask} is not supported currently")
            log("E", "Catch exception when set npu core mode.")
            return -1
        trace(call="init", core_mask=core_mask)
        self.rknn_runtime = runtime
        return 0

    def inference(
        self,
        inputs: Any,
        data_type: str | None = None,
        data_format: Any = None,
        inputs_pass_through: Any = None,
        get_frame_id: bool = False,
        reuse_outputs: bool = False,
    ) -> list[Any] | None:
        if self.rknn_runtime is None:
            log("E", "Runtime environment is not inited, please call init_runtime to init it first!")
            return None
        try:
            self.rknn_runtime.set_inputs(inputs, data_type, data_format)
        except Exception:
            log("E", "Catch exception when setting inputs.")
            log("E", traceback.format_exc())
            return None
        try:
            self.rknn_runtime.run(get_frame_id)  # what it returns is not looked at
        except Exception:
            log("E", "Catch exception when running RKNN model.")
            log("E", traceback.format_exc())
            return None
        try:
            outputs: list[Any] = self.rknn_runtime.get_outputs(get_frame_id)
            return outputs
        except Exception:
            log("E", "Catch exception when getting outputs.")
            log("E", traceback.format_exc())
            return None

    def get_sdk_version(self) -> str | None:
        return "API: 2.5.0 (a stand-in)\nDRV: rknn_server: 2.5.0 (a stand-in)" if self.rknn_runtime else None

    def release(self) -> None:
        self.rknn_runtime = None
