"""The encoder's ONNX -> *.rknn for one chip, by rknn-toolkit2 2.x in its own environment, then checked.

What its release 2.5.0 was seen to stumble over, and what is done about it:
* it fuses attention into one operator, and failed where the queries are constants, as the resampler's are.  With the
  graph of vision_onnx it does not; where a build fails at such a rule (its log names it), these rules are switched off
  and it is built again;
* it aborts the whole process on graphs it cannot hold: it runs in one of its own;
* 4-D inputs are taken for pictures and laid out anew: the graph has none (vision_onnx);
* it leaves files in the current folder, and splits the paths in a list of samples at blanks: it runs in a folder of
  its own, with names relative to it;
* a model that was built can be simulated on the PC, one that was loaded from a file cannot: so the check is part of
  the build.

* int8 has 256 steps for all scores of attention, mask included: samples to calibrate with have a mask of -30, which
  is enough, and the host's -10000 is taken for the least value there is.  (Of -10000, cosine 0.66 was left.)
* it says `Unkown op target: 0` while it builds, and goes on: what that means for the NPU is not known.

The check: pictures are cut and encoded by the simulator (float16, as the NPU is said to compute) and by onnxruntime.
That the NPU itself agrees with its simulator is not known here.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import TensorFile, to_float32
from mmchat.convert import toolkit
from mmchat.convert.calibration import drawn_pictures, pictures_in, views
from mmchat.convert.step import Estimate
from mmchat.convert.vision_onnx import MODEL_FILE, POSITIONS_FILE
from mmchat.errors import ModelDirError, OptionError, ToolkitError
from mmchat.model_dir import POSITIONS
from mmchat.outputs import check_space, check_target, only_writer
from mmchat.rknn_file import read_rknn

TARGETS = ("rk3588", "rk3576")
MIN_COSINE = 0.999
# They fuse attention, and fail where its queries are constants.
RULES = (
    "fuse_matmul_softmax_matmul_to_sdpa",
    "fuse_matmul_add_mul_softmax_matmul_to_sdpa",
    "fuse_exmatmul_add_mul_exsoftmax13_exmatmul_to_sdpa",
)
_MORE_RULES = 2  # that logs may name, one per build
_CHECKED, _CALIBRATED = 4, 32  # views
_INT8_MASKED = -30.0
_INPUTS = ("patches", "position_rows", "key_mask", "key_positions")
# Of the toolkit, per byte of the ONNX, onnxruntime and simulator included: 0.47 GB (4 layers at full size) took 3.6 GB
# and 160 s of one CPU.
_MEMORY_PER_BYTE, _SECONDS_PER_BYTE, _SECONDS_PER_VIEW = 6.5, 1.5e-7, 2.5e-8


@dataclass(frozen=True)
class Encoder:
    """An ONNX that convert vision-onnx wrote.  n: its patches.  side: of a square view that fits, in pixels."""

    path: Path
    positions: Path
    n: int
    patch_size: int
    hidden_size: int
    query_num: int
    output_size: int
    n_bytes: int

    @property
    def side(self) -> int:
        return math.isqrt(self.n) * self.patch_size

    @property
    def view_bytes(self) -> int:
        return 4 * self.n * (3 * self.patch_size**2 + self.hidden_size + self.output_size + 1)

    def position_table(self) -> NDArray[np.float32]:
        """Of learned positions, (side², hidden_size)."""
        return to_float32(TensorFile(self.positions).array(POSITIONS))

    def inputs(self, pixels: NDArray[np.uint8], table: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Of the graph, for a view (height, width, 3) of at most n patches."""
        rows, columns = pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size
        patches = vision_inputs.patches(pixels, self.patch_size)
        return vision_inputs.host_inputs(
            patches, rows, columns, positions=table, output_size=self.output_size, n=self.n
        )


@dataclass(frozen=True)
class Plan:
    """pictures: to check with, and to calibrate with where int8; none are drawn ones."""

    encoder: Encoder
    target: str
    int8: bool
    pictures: tuple[Path, ...]
    min_cosine: float

    @property
    def estimate(self) -> Estimate:
        n = self.encoder.n_bytes
        made, samples = n // (4 if self.int8 else 2), _CHECKED + (_CALIBRATED if self.int8 else 0)
        return Estimate(
            n,
            made + samples * self.encoder.view_bytes,
            int(500e6 + _MEMORY_PER_BYTE * n),
            10 + n * (_SECONDS_PER_BYTE + samples * _SECONDS_PER_VIEW),
        )


def plan(
    onnx: Path, target: str, *, int8: bool = False, pictures: Path | None = None, min_cosine: float = MIN_COSINE
) -> Plan:
    """onnx: the file, or the folder that convert vision-onnx wrote.  pictures: a folder of some.

    Raises OptionError: an unknown target, or int8 without pictures.  ModelDirError: no such model.
    """
    if target not in TARGETS:
        raise OptionError(f"the target is {target!r}; known are {', '.join(TARGETS)}")
    if int8 and pictures is None:
        raise OptionError("int8 is calibrated with pictures: give a folder of some that the board will see")
    found = tuple(pictures_in(pictures)) if pictures is not None else ()
    return Plan(read_encoder(onnx / MODEL_FILE if onnx.is_dir() else onnx), target, int8, found, min_cosine)


def read_encoder(path: Path) -> Encoder:
    """Raises ModelDirError: no ONNX of convert vision-onnx, or its other files are missing."""
    try:
        import onnx
    except ImportError:
        raise ModelDirError("an ONNX encoder needs the package onnx: pip install onnx") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
        shapes = {
            one.name: tuple(d.dim_value for d in one.type.tensor_type.shape.dim)
            for one in (*graph.input, *graph.output)
        }
        outside = {entry.value for one in graph.initializer for entry in one.external_data if entry.key == "location"}
    except OSError as error:
        raise ModelDirError(
            f"{path}: cannot be read ({error.strerror or error}); make it with mmchat convert vision-onnx"
        ) from None
    except Exception as error:  # the library's own, of many kinds
        raise ModelDirError(f"{path}: not an ONNX model ({error})") from None
    try:
        (_, n, patch), (_, _, hidden), (_, queries, output) = (
            shapes[name] for name in ("patches", "position_rows", "embeddings")
        )
        good = [one.name for one in graph.input] == list(_INPUTS) and shapes["key_positions"] == (1, n, output)
    except (KeyError, ValueError):
        good = False
    if not good:
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ModelDirError(
            f"{path}: its inputs and outputs are {described}; one of mmchat convert vision-onnx is needed"
        )
    files = [path, *(path.parent / name for name in outside)]
    positions = path.parent / POSITIONS_FILE
    if missing := [one.name for one in (*files, positions) if not one.is_file()]:
        raise ModelDirError(f"{path.parent}: lacks {', '.join(missing)}; run mmchat convert vision-onnx again")
    n_bytes = sum(one.stat().st_size for one in files)
    return Encoder(path, positions, n, math.isqrt(patch // 3), hidden, queries, output, n_bytes)


def run(plan: Plan, target: Path, python: Path, tell: toolkit.Tell) -> dict[str, Any]:
    """Write target and, beside it, the report, which is given back.  Interrupted, it begins anew.

    Raises ToolkitError: no toolkit, a failure of it, or a result that differs too much; ModelDirError; DiskFull.
    """
    check_target(target, "vision.rknn")
    work, log = target.with_name(f".{target.name}.work"), target.with_name(f"{target.name}.log")
    with only_writer(target.parent):
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        check_space(target.parent, plan.estimate.writes)
        work.mkdir()
        try:
            report = _build(plan, work, python, log, tell)
            _check(plan, work / target.name, work / "model.rknn", report)
            toolkit.write_report(target, report)
            os.replace(work / "model.rknn", target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        log.unlink(missing_ok=True)
    return report


def _build(plan: Plan, work: Path, python: Path, log: Path, tell: toolkit.Tell) -> dict[str, Any]:
    """The report; the model is in work/model.rknn."""
    samples = _samples(plan, work)
    dataset = None
    if plan.int8:
        dataset = "dataset.txt"
        (work / dataset).write_text("".join(" ".join(names) + "\n" for names in samples["calibration"]))
    job = {
        "kind": "rknn", "onnx": str(plan.encoder.path.absolute()), "out": "model.rknn", "target": plan.target,
        "quantize": dataset, "samples": samples["check"],
    }  # fmt: skip
    result, rules = _run_job(job, python, work, log, tell)
    outputs = [
        {
            "name": one["name"],
            "cosine": min(one["cosine"]),
            "max_error": max(one["error"]),
            "largest": max(one["largest"]),
        }
        for one in result["outputs"]
    ]
    return {
        "target": plan.target, "precision": "int8" if plan.int8 else "float16", "toolkit": result["toolkit"],
        "disabled_rules": rules, "ignored_options": result["ignored"], "complaints": result["complaints"],
        "patches": plan.encoder.n, "views": len(samples["check"]), "simulator_against_onnx": outputs,
    }  # fmt: skip


def simulate(
    encoder: Encoder, target: str, views: Iterable[NDArray[np.uint8]], n_views: int, python: Path, tell: toolkit.Tell
) -> list[NDArray[np.float32]]:
    """What the toolkit's PC simulator makes of views (n_views, each of at most encoder.n patches), in float16.

    Gives (query_num, output_size) for each.  Its inputs lie in the system's temporary folder meanwhile.

    Raises ToolkitError, whose log stays there; DiskFull.
    """
    with tempfile.TemporaryDirectory(prefix="mmchat-") as name:
        work, table = Path(name), encoder.position_table()
        log = work.with_name(f"{work.name}-rknn.log")
        check_space(work, n_views * encoder.view_bytes)
        samples = [
            [*_write_view(view, encoder, table, work / f"view_{i}", vision_inputs.MASKED), f"embedding_{i}.npy"]
            for i, view in enumerate(views)
        ]
        job = {
            "kind": "rknn-simulator", "onnx": str(encoder.path.absolute()), "target": target, "quantize": None,
            "samples": samples,
        }  # fmt: skip
        _run_job(job, python, work, log, tell)
        log.unlink()
        shape = encoder.query_num, encoder.output_size
        return [np.load(work / files[-1]).astype(np.float32).reshape(shape) for files in samples]


def _run_job(
    job: dict[str, Any], python: Path, work: Path, log: Path, tell: toolkit.Tell
) -> tuple[dict[str, Any], list[str]]:
    """Its result, and the rules that had to be switched off."""
    rules: list[str] = []
    while True:
        config = {"disable_rules": rules, "optimization_level": 3}
        try:
            return toolkit.run(toolkit.RKNN, python, {**job, "config": config}, work, log, tell), rules
        except ToolkitError as error:
            named = [rule for rule in re.findall(r"\bfuse_[a-z0-9_]+", error.log) if rule not in rules]
            if error.call != "build" or not named or len(rules) >= len(RULES) + _MORE_RULES:
                raise
            rules = list(dict.fromkeys((*rules, *RULES, named[-1])))
            tell(f"{toolkit.RKNN.name} fails at its rule {named[-1]}: again without")


def _check(plan: Plan, name: Path, path: Path, report: dict[str, Any]) -> None:
    """Raises ToolkitError: outputs that differ, or a file that tells of something else than what was asked for."""
    for one in report["simulator_against_onnx"]:
        if not one["cosine"] >= plan.min_cosine:
            hint = (
                "int8 may need other pictures; float16 (without --int8) keeps the model exact"
                if plan.int8
                else ("this release of the toolkit does not compute the graph right; another one may")
            )
            raise ToolkitError(
                f"{name.name}: {one['name']} of the simulator differs from the ONNX: cosine {one['cosine']:.6f}, "
                f"{plan.min_cosine} is needed; largest error {one['max_error']:.3g} of {one['largest']:.3g}.  {hint}; "
                "nothing was written (--min-cosine lowers the bar)"
            )
    file, encoder = read_rknn(path), plan.encoder
    wanted = [(1, encoder.n, 3 * encoder.patch_size**2), (1, encoder.n, encoder.hidden_size), (1, 1, encoder.n),
              (1, encoder.n, encoder.output_size)]  # fmt: skip
    shapes = [shape for _, shape in file.inputs]
    if (file.chips and plan.target not in file.chips) or (shapes and shapes != wanted):
        raise ToolkitError(
            f"{name.name}: was made for {file.chips} with inputs {shapes}; {plan.target}, {wanted} asked"
        )


def _samples(plan: Plan, work: Path) -> dict[str, list[list[str]]]:
    """Arrays written into work: "check" and "calibration", per view the names of its inputs."""
    encoder = plan.encoder
    table = encoder.position_table()
    cut = [
        views(picture, side=encoder.side, patch_size=encoder.patch_size, n=encoder.n)
        for picture in (plan.pictures[:_CALIBRATED] or drawn_pictures(encoder.side))
    ]
    # Of one picture the whole, of the next its last cell.
    check = [several[0 if i % 2 == 0 else -1] for i, several in enumerate(cut[:_CHECKED])]
    calibration = list(_spread(cut)) if plan.int8 else []
    chosen = (("check", check, vision_inputs.MASKED), ("calibration", calibration, _INT8_MASKED))
    return {
        kind: [list(_write_view(view, encoder, table, work / f"{kind}_{i}", masked)) for i, view in enumerate(several)]
        for kind, several, masked in chosen
    }


def _spread(cut: list[list[NDArray[np.uint8]]]) -> Iterator[NDArray[np.uint8]]:
    """Views of all pictures in turn, _CALIBRATED of them."""
    numbered = sorted((number, picture) for picture, several in enumerate(cut) for number in range(len(several)))
    for number, picture in numbered[:_CALIBRATED]:
        yield cut[picture][number]


def _write_view(
    pixels: NDArray[np.uint8], encoder: Encoder, table: NDArray[np.float32], stem: Path, masked: float
) -> Iterator[str]:
    """masked: the least value that its mask has."""
    inputs = encoder.inputs(pixels, table)
    inputs["key_mask"] = np.maximum(inputs["key_mask"], np.float32(masked))
    for name in _INPUTS:
        path = stem.with_name(f"{stem.name}_{name}.npy")
        np.save(path, inputs[name])
        yield path.name
