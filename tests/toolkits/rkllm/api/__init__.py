"""See tests/toolkits.  Signatures: the vendor's test.py and export_rkllm.py of 1.1.0 and 1.3.0, and a docstring that a
user quotes (airockchip/rknn-llm issue 126)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FAKE: dict[str, Any] = json.loads(os.environ["MMCHAT_FAKE"])
_DTYPES = {
    "rk3588": ("w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"),
    "rk3576": ("w8a8", "w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128"),
}
_CORES = {"rk3588": 3, "rk3576": 2}


class _Toolkit:
    def _load(self, model: str, **options: Any) -> int:
        config = json.loads((Path(model) / "config.json").read_text())
        if FAKE.get("load") or config["architectures"] != ["Qwen2ForCausalLM"]:
            print("ERROR: Catch exception when loading model: CUDA out of memory.")
            return -1
        self._hidden = config["hidden_size"]
        self._asked: dict[str, Any] = {"load": options}
        return 0

    def _build(self, dataset: str | None, **options: Any) -> int:
        platform = options["target_platform"].lower()
        if (
            options["quantized_dtype"] not in _DTYPES[platform]
            or not 1 <= options["num_npu_core"] <= _CORES[platform]
            or options.get("max_context", 4096) % 32
        ):
            print("ERROR: not supported")
            return -1
        rows = []
        for sample in json.loads(Path(dataset).read_text()) if dataset else ():
            (batch,) = sample["input_embed"]
            assert all(len(row) == self._hidden for row in batch)
            rows.append([len(batch), sample.get("target"), batch[0][0]])
        self._asked.update(build=options, samples=rows)
        return 0

    def export_rkllm(self, export_path: str) -> int:
        name = export_path + (".rkllm" if FAKE.get("suffix") else "")
        if not FAKE.get("nothing"):
            Path(name).write_text(json.dumps(self._asked))
        return 0


class _RKLLM11(_Toolkit):
    def load_huggingface(self, model: str, model_lora: str | None = None, device: str = "cpu") -> int:
        return self._load(model, device=device)

    def build(
        self,
        do_quantization: bool = True,
        optimization_level: int = 1,
        quantized_dtype: str = "w8a8",
        quantized_algorithm: str = "normal",
        target_platform: str = "rk3588",
        num_npu_core: int = 3,
        extra_qparams: str | None = None,
        dataset: str | None = None,
        hybrid_rate: float = 0,
    ) -> int:
        options = {name: value for name, value in locals().items() if name not in ("self", "dataset", "__class__")}
        return self._build(dataset, **options)


class _RKLLM13(_Toolkit):
    def load_huggingface(
        self,
        model: str,
        model_lora: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        custom_config: str | None = None,
        load_weight: bool = True,
    ) -> int:
        return self._load(model, device=device, dtype=dtype)

    def build(
        self,
        do_quantization: bool = True,
        optimization_level: int = 1,
        quantized_dtype: str = "w8a8",
        quantized_algorithm: str = "normal",
        target_platform: str = "rk3588",
        num_npu_core: int = 3,
        extra_qparams: str | None = None,
        dataset: str | None = None,
        hybrid_rate: float = 0,
        max_context: int = 4096,
    ) -> int:
        options = {name: value for name, value in locals().items() if name not in ("self", "dataset", "__class__")}
        return self._build(dataset, **options)


RKLLM = _RKLLM11 if FAKE.get("release") == "1.1" else _RKLLM13
