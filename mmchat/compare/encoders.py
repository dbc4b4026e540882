"""Encoders without an LLM: what convert vision-onnx wrote, computed by onnxruntime, or by rknn-toolkit2's PC simulator.

The simulator computes in float16, as the NPU is said to do; that they agree is not known here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.convert import toolkit, vision_rknn
from mmchat.convert.vision_onnx import MODEL_FILE
from mmchat.errors import ImageError, ModelDirError, OptionError
from mmchat.images import open_image
from mmchat.model_dir import ModelSpec, SliceSpec
from mmchat.slicing import SlicePlan, slice_image

SIMULATOR = "rknn-sim:"  # before the folder's name
_MAX_SLICES = 9

Views = Iterable[NDArray[np.uint8]]


@dataclass(frozen=True)
class BareEncoder:
    """name: as it was given.  chip, python: of the simulator, python having its toolkit; None is onnxruntime."""

    name: str
    encoder: vision_rknn.Encoder
    chip: str = ""
    python: Path | None = None
    n_threads: int | None = None

    @property
    def slices(self) -> SliceSpec:
        """How pictures are cut for it where no LLM says so."""
        return SliceSpec(_MAX_SLICES, self.encoder.side, self.encoder.patch_size, self.encoder.n)

    def encode(self, views: Views, n_views: int, say: Callable[[str], None]) -> list[NDArray[np.float32]]:
        """(query_num, output_size) for each.  Raises ModelDirError, ToolkitError, DiskFull."""
        if self.python:
            return vision_rknn.simulate(self.encoder, self.chip, views, n_views, self.python, say)
        table, run, found = self.encoder.position_table(), _session(self.encoder.path, self.n_threads), []
        for number, view in enumerate(views, 1):
            say(f"{self.name}: view {number} of {n_views}")
            rows = np.array(run(None, self.encoder.inputs(view, table))[0][0], np.float32)
            if not np.isfinite(rows).all():
                raise ModelDirError(f"{self.name}: its rows for view {number} are not finite numbers")
            found.append(rows)
        return found

    def check_fits(self, spec: ModelSpec) -> None:
        """Raises ModelDirError where the model cannot be given this encoder's rows."""
        encoder, vision = self.encoder, spec.vision
        mine = (encoder.patch_size, encoder.query_num, encoder.output_size)
        if mine != (vision.patch_size, vision.query_num, vision.output_size):
            raise ModelDirError(
                f"{self.name}: patches of {mine[0]} pixels, {mine[1]} rows of {mine[2]} for a view; {spec.name} has "
                f"{vision.patch_size}, and {vision.query_num} rows of {vision.output_size}: give that of the encoder"
            )

    def check_views(self, picture: Path, plan: SlicePlan) -> None:
        """Raises ImageError where a view has more patches than this encoder takes."""
        patch, n = self.encoder.patch_size, self.encoder.n
        most = max((width // patch) * (height // patch) for width, height in plan.input_sizes)
        if most > n:
            raise ImageError(
                f"{picture}: a view of it has {most} patches, and {self.name} takes {n}; leave the picture out, or "
                f"make the encoder with mmchat convert vision-onnx --patches {most}"
            )


def is_encoder(name: str) -> bool:
    """Whether this names an encoder, and not a model that chats."""
    folder = Path(name)
    return name.startswith(SIMULATOR) or ((folder / MODEL_FILE).is_file() and not (folder / "config.json").is_file())


def open_encoder(name: str, *, chip: str, python: str | None, n_threads: int | None) -> BareEncoder:
    """name: a folder of convert vision-onnx, or that after "rknn-sim:".

    Raises ModelDirError: no such folder, or what it needs is not installed.  OptionError: an unknown chip.
    ToolkitError: no interpreter for the toolkit.
    """
    simulated = name.startswith(SIMULATOR)
    encoder = vision_rknn.read_encoder(Path(name.removeprefix(SIMULATOR)) / MODEL_FILE)
    if not simulated:
        _onnxruntime()
        return BareEncoder(name, encoder, n_threads=n_threads)
    if chip not in vision_rknn.TARGETS:
        raise OptionError(f"the chip is {chip!r}; known are {', '.join(vision_rknn.TARGETS)}")
    return BareEncoder(name, encoder, chip, toolkit.RKNN.python(python, option="--rknn-python"))


def cut(picture: Path, rule: SliceSpec, max_slice_nums: int | None) -> list[NDArray[np.uint8]]:
    """The views that a conversation would cut it into.  Raises ImageError."""
    with open_image(picture) as opened:
        plan = rule.plan(opened.size, max_slice_nums)
        return slice_image(opened.read(at_least=plan.refined or plan.source), plan)


def plan_of(picture: Path, rule: SliceSpec, max_slice_nums: int | None) -> SlicePlan:
    """Raises ImageError."""
    with open_image(picture) as opened:
        return rule.plan(opened.size, max_slice_nums)


def _session(path: Path, n_threads: int | None) -> Callable[..., Sequence[Any]]:
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads or 0
    try:
        run: Callable[..., Sequence[Any]] = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        ).run
    except Exception as error:  # the library's own, of many kinds
        raise ModelDirError(f"{path}: onnxruntime does not open it ({' '.join(str(error).split())[:300]})") from None
    return run


def _onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise ModelDirError("an ONNX encoder needs the package onnxruntime: pip install onnxruntime") from None
