"""The vision encoder on OpenVINO: one encoder input -> its embedding."""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import Checkpoint
from mmchat.model_dir import POSITIONS, VisionSpec
from mmchat.openvino_graphs import build_vision


class OpenVinoEncoder:
    """Encodes one input at a time and at its own size, so that no result depends on a neighbour or on padding."""

    def __init__(self, checkpoint: Checkpoint, spec: VisionSpec, properties: dict[str, object]) -> None:
        self._spec = spec
        self._positions = checkpoint.float32(POSITIONS)
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
        inputs = vision_inputs.host_inputs(
            patches,
            rows,
            columns,
            positions=self._positions,
            output_size=self._spec.output_size,
            n=max(rows * columns, pad_to or 0),
        )
        result = self._request.infer({**inputs, "key_mask": inputs["key_mask"][None]})
        return np.array(result["embeddings"][0], np.float32)
