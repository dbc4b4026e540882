"""The vision encoder on OpenVINO: one encoder input -> its embedding, from a checkpoint or a folder's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import Checkpoint
from mmchat.errors import ModelDirError
from mmchat.model_dir import POSITIONS, ModelSpec, VisionSpec
from mmchat.openvino_graphs import build_vision, cpu_properties
from mmchat.openvino_ir import check_inputs, read

# What hides padding from an exported resampler, which adds its mask to the scores.
_HIDDEN = -3e38


def open_encoder(spec: ModelSpec, n_threads: int | None) -> OpenVinoEncoder | IrEncoder:
    """The folder's encoder.  Raises ModelDirError."""
    properties = cpu_properties(n_threads)
    if spec.openvino:
        return IrEncoder(spec.openvino["vision"], spec.openvino["resampler"], spec.vision, properties)
    return OpenVinoEncoder(Checkpoint(spec.folder), spec.vision, properties)


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


class IrEncoder:
    """The tower and the resampler of an OpenVINO folder.  One input at a time and at its own size, as above."""

    def __init__(self, vision: Path, resampler: Path, spec: VisionSpec, properties: dict[str, object]) -> None:
        """Raises ModelDirError: models with other inputs or outputs."""
        self._spec = spec
        core, tower, last = ov.Core(), read(vision), read(resampler)
        check_inputs(tower, {"pixel_values", "patch_attention_mask", "position_ids"}, vision)
        check_inputs(last, {"image_feature", "pos_embed", "key_padding_mask"}, resampler)
        for model, path, width in ((tower, vision, spec.hidden_size), (last, resampler, spec.output_size)):
            found = model.outputs[0].get_partial_shape()
            if len(found) != 3 or not found[2].compatible(ov.Dimension(width)):
                raise ModelDirError(f"{path}: gives {found}; by config.json it would be {width} wide")
        self._additive = last.input("key_padding_mask").get_element_type() != ov.Type.boolean
        self._tower = core.compile_model(tower, "CPU", properties).create_infer_request()
        self._resampler = core.compile_model(last, "CPU", properties).create_infer_request()

    def encode(self, pixels: NDArray[np.uint8], *, pad_to: int | None = None) -> NDArray[np.float32]:
        """See OpenVinoEncoder.encode."""
        patch = self._spec.patch_size
        rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
        used = rows * columns
        n = max(used, pad_to or 0)
        # (n, 3, patch, patch) -> (3, patch, n * patch): patches side by side
        patches = vision_inputs.patches(pixels, patch).reshape(used, 3, patch, patch)
        strip = np.zeros((1, 3, patch, n * patch), np.float32)
        strip[0, :, :, : used * patch] = patches.transpose(1, 2, 0, 3).reshape(3, patch, used * patch)
        ids = np.zeros((1, n), np.int64)
        ids[0, :used] = vision_inputs.position_ids(rows, columns, self._spec.position_side)
        positions = np.zeros((n, 1, self._spec.output_size), np.float32)
        positions[:used, 0] = vision_inputs.sincos_positions(rows, columns, self._spec.output_size)
        padding = np.arange(n)[None] >= used
        features = self._tower.infer(
            {
                "pixel_values": strip,
                "patch_attention_mask": (~padding[None]).astype(self._type_of("patch_attention_mask")),
                "position_ids": ids,
            }
        )[0]
        result = self._resampler.infer(
            {
                "image_feature": features,
                "pos_embed": positions,
                "key_padding_mask": np.where(padding, np.float32(_HIDDEN), np.float32(0))
                if self._additive
                else padding,
            }
        )[0]
        return np.array(result[0], np.float32)

    def _type_of(self, name: str) -> np.dtype[Any]:
        kind: np.dtype[Any] = np.dtype(self._tower.get_compiled_model().input(name).get_element_type().to_dtype())
        return kind
