"""Write an encoder that the stand-in runs, in the container that RKNN files have, and what mmchat.json says of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

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
    shapes = [[1, n, 3 * vision.patch_size**2], [1, n, vision.hidden_size], [1, 1, n], [1, n, width]]
    if mode == "square":
        shapes, across = [[1, side, side, 3]], side // vision.patch_size
        positions = checkpoint.float32(POSITIONS)
        tensors["position_rows"] = positions[vision_inputs.position_ids(across, across, vision.position_side)]
        tensors["key_positions"] = vision_inputs.sincos_positions(across, across, width)
    places: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        places[name] = [list(array.shape), at]
        at += array.nbytes
    text = json.dumps(
        {
            "mmchat_standin": 1,
            "target_platform": ["rk3588", "rk3576"],
            "version": "2.5.0 (a stand-in)",
            "mode": mode,
            "input_shapes": shapes,
            "n_layers": vision.n_layers,
            "n_heads": vision.n_heads,
            "resampler_heads": vision.resampler_heads,
            "patch_size": vision.patch_size,
            "tensors": places,
        }
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<8sQQ", b"RKNN", 1, at))
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, np.float32).data)
        file.write(struct.pack("<Q", len(text)) + text)


def write_positions(spec: ModelSpec, path: Path) -> None:
    """The table of learned positions alone."""
    checkpoint = Checkpoint(spec.folder)
    info = checkpoint.info(POSITIONS)
    write_tensors(path, {POSITIONS: (info.dtype, info.shape, [checkpoint.array(POSITIONS).tobytes()])})
