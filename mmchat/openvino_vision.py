"""The vision encoder on OpenVINO: one encoder input -> its embedding."""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import Checkpoint
from mmchat.model_dir import VisionSpec
from mmchat.openvino_graphs import build_vision


class OpenVinoEncoder:
    """Encodes one input at a time and at its own size, so that no result depends on a neighbour or on padding."""

    def __init__(self, checkpoint: Checkpoint, spec: VisionSpec, properties: dict[str, object]) -> None:
        self._spec = spec
        self._positions = checkpoint.float32("vpm.embeddings.position_embedding.weight")
        model = build_vision(checkpoint, spec)
        self._request = ov.Core().compile_model(model, "CPU", properties).create_infer_request()

    def encode(self, pixels: NDArray[np.uint8], *, pad_to: int | None = None) -> NDArray[np.float32]:
        """(height, width, 3) uint8, sides multiples of the patch size -> (query_num, output_size) float32.

        pad_to: patches to pad to, as an encoder of static shape needs; the result is the same up to rounding.
        """
        size = self._spec.patch_size
        return self.encode_patches(
            vision_inputs.patches(pixels, size), pixels.shape[0] // size, pixels.shape[1] // size, pad_to=pad_to
        )

    def encode_patches(
        self, patches: NDArray[np.float32], rows: int, columns: int, *, pad_to: int | None = None
    ) -> NDArray[np.float32]:
        """The same from normalised patches (rows * columns, 3 * patch²)."""
        n = rows * columns
        ids = vision_inputs.position_ids(rows, columns, self._spec.position_side)
        key_mask = np.zeros(max(n, pad_to or 0), np.float32)
        key_mask[n:] = vision_inputs.MASKED
        filler = len(key_mask) - n
        inputs = {
            "patches": patches,
            "position_rows": self._positions[ids],
            "key_positions": vision_inputs.sincos_positions(rows, columns, self._spec.output_size),
        }
        padded = {name: np.pad(array, ((0, filler), (0, 0)))[None] for name, array in inputs.items()}
        result = self._request.infer({**padded, "key_mask": key_mask[None, None, None]})
        return np.array(result["embeddings"][0], np.float32)
