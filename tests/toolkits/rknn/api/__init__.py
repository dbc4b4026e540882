"""See tests/toolkits.  Runs in the driver's process, so it knows nothing of mmchat or its tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FAKE: dict[str, Any] = json.loads(os.environ["MMCHAT_FAKE"])


class RKNN:
    def __init__(self, verbose: bool = True, verbose_file: str | None = None) -> None:
        print("I rknn-toolkit2 version: a stand-in")
        self._built = False

    def config(self, target_platform: str | None = None, optimization_level: int = 3, **kwargs: Any) -> int:
        self._target, self._options = target_platform, kwargs
        return 0

    def load_onnx(self, model: str, inputs: Any = None) -> int:
        if "load_onnx" in FAKE:
            print("E load_onnx: the model is not to its liking")
            return int(FAKE["load_onnx"])
        self._model = model
        return 0

    def build(
        self,
        do_quantization: bool = True,
        dataset: str | None = None,
        rknn_batch_size: int | None = None,
        auto_hybrid: bool = False,
    ) -> int:
        Path("check0_base_optimize.onnx").write_bytes(b"what it leaves in the current folder")
        if do_quantization:
            assert dataset is not None
            for line in Path(dataset).read_text().splitlines():
                assert all(np.load(name).dtype == np.float32 for name in line.split())
        if "sleep" in FAKE:
            time.sleep(FAKE["sleep"])
        if "signal" in FAKE:
            os.kill(os.getpid(), getattr(signal, FAKE["signal"]))
        rules = FAKE.get("rules", [])
        for rule in rules:
            if rule not in self._options.get("disable_rules", []):
                print(f"E build: Catch exception in rule {rule}: 'inputs' or 'outputs' must be set!")
                raise ValueError("build failed")
        self._built = True
        return 0

    def export_rknn(self, export_path: str, **kwargs: Any) -> int:
        import onnx

        graph = onnx.load(self._model, load_external_data=False).graph
        tensors: list[dict[str, Any]] = []
        edges: list[dict[str, Any]] = []
        for side, several in (("input", graph.input), ("output", graph.output)):
            for number, one in enumerate(several):
                shape = [d.dim_value for d in one.type.tensor_type.shape.dim]
                edges.append(
                    {"left": side, "left_tensor_id": number, "right": "norm_tensor", "right_tensor_id": len(tensors)}
                )
                tensors.append({"tensor_id": len(tensors), "url": one.name, "size": shape})
        told = {
            "target_platform": [FAKE.get("chip", self._target)],
            "version": "2.5.0",
            "norm_tensor": tensors,
            "graph": edges,
        }
        text = json.dumps(told).encode()
        Path(export_path).write_bytes(struct.pack("<8sQQ40x", b"RKNN", 6, 0) + struct.pack("<Q", len(text)) + text)
        return 0

    def init_runtime(self, target: str | None = None) -> int:
        return 0 if target is None and self._built else -1

    def inference(self, inputs: list[Any], data_format: Any = None) -> list[Any] | None:
        import onnxruntime

        if FAKE.get("inference") == "none":
            print("E inference: no", file=sys.stderr)
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, dict(zip([one.name for one in session.get_inputs()], inputs, strict=True)))
        noise = np.random.default_rng(0).standard_normal(outputs[0].shape) * FAKE.get("noise", 1e-3)
        outputs[0] = (outputs[0] + noise).astype(np.float16)
        if FAKE.get("inference") == "nan":
            outputs[0][:] = np.nan
        return list(outputs)

    def release(self) -> None:
        shutil.rmtree("tmp", ignore_errors=True)
