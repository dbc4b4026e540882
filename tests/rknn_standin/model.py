"""Write an encoder that the stand-in runs, in the container that RKNN files have, and what mmchat.json says of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.model_dir import POSITIONS, ModelSpec

# What goes on a child's PYTHONPATH, so that `import rknnlite` finds the stand-in.
LITE2 = Path(__file__).with_name("lite2")


def write_encoder(spec: ModelSpec, path: Path, mode: str, *, n_patches: int) -> None:
    """mode: "navit" (n_patches is the static shape), or "square" (of scale_resolution's side)."""
    checkpoint, vision = Checkpoint(spec.folder), spec.vision
    tensors = {
        name: checkpoint.float32(name)
        for name in checkpoint
        if name.startswith(("vpm.", "resampler.")) and name != POSITIONS
    }
    side = spec.slices.scale_resolution
    n, width = n_patches, vision.output_size
    inputs = {
        "patches": [1, n, 3 * vision.patch_size**2],
        "position_rows": [1, n, vision.hidden_size],
        "key_mask": [1, 1, n],
        "key_positions": [1, n, width],
    }
    if mode == "square":
        inputs, across = {"pixels": [1, 3, side, side]}, side // vision.patch_size  # as in ONNX; fed as NHWC
        positions = checkpoint.float32(POSITIONS)
        tensors["position_rows"] = positions[vision_inputs.position_ids(across, across, vision.position_side)]
        tensors["key_positions"] = vision_inputs.sincos_positions(across, across, width)
    places: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        places[name] = [list(array.shape), at]
        at += array.nbytes
    standin = {
        "mode": mode,
        "n_layers": vision.n_layers,
        "n_heads": vision.n_heads,
        "resampler_heads": vision.resampler_heads,
        "patch_size": vision.patch_size,
        "tensors": places,
    }
    outputs = {"embeddings": [1, vision.query_num, width]}
    _write(path, described(inputs, outputs), standin, list(tensors.values()))


def write_echo(path: Path) -> None:
    """A model whose outputs tell what arrived at its inputs; tests/emulated/librknnrt.c says how."""
    told = described({"picture": [1, 3, 4, 6], "rows": [1, 5, 2]}, {"echo": [1, 2, 8]})
    _write(path, told, {"mode": "echo", "tensors": {}}, [])


def _write(path: Path, told: dict[str, Any], standin: dict[str, Any], tensors: list[NDArray[np.float32]]) -> None:
    text = json.dumps({**told, "mmchat_standin": standin}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<8sQQ40x", b"RKNN", 6, sum(array.nbytes for array in tensors)))
        for array in tensors:
            file.write(np.ascontiguousarray(array, np.float32).data)
        file.write(struct.pack("<Q", len(text)) + text)


def described(inputs: dict[str, list[int]], outputs: dict[str, list[int]]) -> dict[str, Any]:
    """What rknn-toolkit2 2.5.0 tells of a model's outside."""
    tensors, graph = list[dict[str, Any]](), list[dict[str, Any]]()
    for left, sides in (("input", inputs), ("output", outputs)):
        for i, (name, shape) in enumerate(sides.items()):
            graph.append({"left": left, "left_tensor_id": i, "right": "norm_tensor", "right_tensor_id": len(tensors)})
            tensors.append({"dim_num": len(shape), "size": shape, "tensor_id": len(tensors), "url": name})
    return {
        "target_platform": ["rk3588", "rk3576"],
        "version": "2.5.0",
        "input_num": len(inputs),
        "output_num": len(outputs),
        "graph": graph,
        "norm_tensor": tensors,
    }


def write_positions(spec: ModelSpec, path: Path) -> None:
    """The table of learned positions alone."""
    checkpoint = Checkpoint(spec.folder)
    info = checkpoint.info(POSITIONS)
    write_tensors(path, {POSITIONS: (info.dtype, info.shape, [checkpoint.array(POSITIONS).tobytes()])})
