"""The LLM -> *.rkllm, by rkllm-toolkit in its own environment: **written from its documents, never run with it**.

What it takes is from the vendor's examples and docstrings, 1.1.0 to 1.3.0, and from users' reports:
* a plain Qwen2 folder (convert llm-checkpoint), loaded as float32 or bfloat16; float16 becomes float32 on a CPU;
* quantisation by chip: RK3588 has w8a8 and its groups, RK3576 w4a16, its groups, and w8a8;
* max_context, from 1.2.0 on: a multiple of 32, 16384 at most, written into the file; older ones do not ask for it;
* samples to calibrate with, as JSON of embeddings: prompts with pictures, as the board will see them, made here by the
  pipeline of a chat.  Whether 1.3.0 takes that form was not seen; its own example for InternVL3 writes it.

1.3.0 never ends the answers of models that 1.2.2 and 1.2.3 made (it does not find their end token); mmchat ends them.
Nothing here knows whether the model is right: `mmchat calibrate` and a look at its answers, on the board, tell.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mmchat.checkpoint import Checkpoint
from mmchat.convert import llm_checkpoint, toolkit
from mmchat.convert.calibration import Embedder, Talk, talks_in
from mmchat.convert.step import COPIED_BYTES_PER_S, Estimate, Progress
from mmchat.errors import ModelDirError, OptionError, ToolkitError
from mmchat.model_dir import ModelSpec, open_model
from mmchat.outputs import check_space, check_target, only_writer, remove_work

DTYPES = {
    "rk3588": ("w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"),
    "rk3576": ("w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w8a8"),
}
CORES = {"rk3588": 3, "rk3576": 2}
ALGORITHMS = ("normal", "grq", "gdq")  # gdq: of 1.1; grq: of later ones, with a GPU
_LOADED = {"float32": 4, "bfloat16": 2, "float16": 4}  # bytes per number in memory
_CONTEXT, _MOST_CONTEXT, _CONTEXT_STEP = 4096, 16384, 32
# Per number: MiniCPM-V-2.6's file has 7.8 GB at w8a8 (7.6e9 numbers); users tell of an hour for that on a CPU.
_BYTES_AT, _SECONDS_PER_NUMBER = {"w8": 1.05, "w4": 0.65}, 5e-7
_SAMPLE_BYTES, _SAMPLE_SECONDS = 60_000_000, 10  # as JSON, at full size; on two cores


@dataclass(frozen=True)
class Options:
    """What the toolkit is asked for, in its own words.  Raises OptionError for what it is known not to take."""

    target: str
    dtype: str
    max_context: int = _CONTEXT
    optimization_level: int = 1
    num_npu_core: int | None = None
    algorithm: str = "normal"
    hybrid_rate: float = 0.0
    device: str = "cpu"
    load_dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("the target", self.target, DTYPES)
        _one_of(f"the dtype for {self.target}", self.dtype, DTYPES[self.target])
        _one_of("the algorithm", self.algorithm, ALGORITHMS)
        _one_of("the device", self.device, ("cpu", "cuda"))
        _one_of("the dtype to load with", self.load_dtype, _LOADED)
        _one_of("the optimization level", self.optimization_level, (0, 1))
        _one_of(f"the number of NPU cores of {self.target}", self.cores, range(1, CORES[self.target] + 1))
        if self.max_context % _CONTEXT_STEP or not _CONTEXT_STEP <= self.max_context <= _MOST_CONTEXT:
            raise OptionError(
                f"max_context is {self.max_context}; a multiple of {_CONTEXT_STEP} up to {_MOST_CONTEXT} is needed"
            )
        if not 0 <= self.hybrid_rate < 1:
            raise OptionError(f"the hybrid rate is {self.hybrid_rate}; it must be at least 0 and below 1")
        if self.algorithm != "normal" and not self.dtype.startswith("w4"):
            raise OptionError(f"the algorithm {self.algorithm} is for four bits (w4a16...), not for {self.dtype}")
        if self.algorithm == "grq" and self.device != "cuda":
            raise OptionError("the algorithm grq needs a GPU: give the device cuda, or the algorithm normal")

    @property
    def cores(self) -> int:
        return CORES[self.target] if self.num_npu_core is None else self.num_npu_core


def default_dtype(target: str) -> str:
    """Raises OptionError for an unknown target."""
    _one_of("the target", target, DTYPES)
    return DTYPES[target][0]


def default_context(checkpoint: str | Path) -> int:
    """4096, or less where the model knows less.  Raises ModelDirError."""
    return min(_CONTEXT, open_model(checkpoint).llm.context_rows // _CONTEXT_STEP * _CONTEXT_STEP)


def _one_of(what: str, value: object, known: Any) -> None:
    if value not in known:
        raise OptionError(f"{what} is {value!r}; known are {', '.join(map(str, known))}")


@dataclass(frozen=True)
class Plan:
    """llm: what the plain Qwen2 folder is made of.  talks: to calibrate with."""

    spec: ModelSpec
    llm: llm_checkpoint.Plan
    options: Options
    talks: tuple[Talk, ...]
    n_numbers: int

    @property
    def result_bytes(self) -> int:
        return int(self.n_numbers * _BYTES_AT[self.options.dtype[:2]])

    @property
    def estimate(self) -> Estimate:
        plain, n = self.llm.estimate.writes, len(self.talks)
        return Estimate(
            2 * plain,
            plain + self.result_bytes + n * _SAMPLE_BYTES,
            int(1_500e6 + self.n_numbers * _LOADED[self.options.load_dtype] * 1.3),
            plain / COPIED_BYTES_PER_S + n * _SAMPLE_SECONDS + self.n_numbers * _SECONDS_PER_NUMBER,
        )


def plan(checkpoint: str | Path, options: Options, calibration: Path | None = None) -> Plan:
    """calibration: pictures or JSON (convert.calibration.talks_in).

    Raises ModelDirError: no whole checkpoint, or nothing to calibrate with.  OptionError: a context that it lacks.
    """
    spec = open_model(checkpoint)
    if spec.board:
        raise ModelDirError(f"{spec.folder}: a board's folder; give the checkpoint that it was made from")
    if options.max_context > spec.llm.context_rows:
        raise OptionError(
            f"max_context is {options.max_context}, but the model knows {spec.llm.context_rows} positions"
        )
    tensors = Checkpoint(spec.folder)
    n_numbers = sum(prod(tensors.info(name).shape) for name in tensors if name.startswith("llm."))
    talks = tuple(talks_in(calibration)) if calibration is not None else ()
    return Plan(spec, llm_checkpoint.plan(spec.folder), options, talks, n_numbers)


def run(plan: Plan, target: Path, python: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
    """Write target and, beside it, the report, which is given back.

    The plain Qwen2 folder lies in target.qwen2 meanwhile: interrupted, it goes on where it was; the rest begins anew.

    Raises ToolkitError: no toolkit, or a failure of it; ModelDirError; DiskFull.
    """
    check_target(target, "model.rkllm")
    plain = target.with_name(f"{target.name}.qwen2")
    work, log = target.with_name(f".{target.name}.work"), target.with_name(f"{target.name}.log")
    with only_writer(target.parent):
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        check_space(target.parent, plan.estimate.writes - _size(plain))
        llm_checkpoint.run(plan.llm, plain, progress)
        work.mkdir()
        try:
            job = {
                "kind": "rkllm",
                "model": str(plain.absolute()),
                "load": {"device": plan.options.device, "dtype": plan.options.load_dtype},
                "build": _build_options(plan.options),
                "samples": _samples(plan, work, tell),
                "out": "model.rkllm",
            }
            result = toolkit.run(toolkit.RKLLM, python, job, work, log, tell)
            report = {
                **asdict(plan.options),
                "num_npu_core": plan.options.cores,
                "samples": len(job["samples"]),
                **result,
            }
            if "max_context" in result["ignored"]:
                tell(
                    f"this rkllm-toolkit ({result['toolkit']}) takes no max_context: the file's own limit is not known"
                )
            made = work / "model.rkllm"
            if not made.is_file() or not made.stat().st_size:
                raise ToolkitError(f"rkllm-toolkit says that it succeeded, but wrote nothing; all it said: {log}")
            toolkit.write_report(target, report)
            os.replace(made, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        remove_work(plain)
        log.unlink(missing_ok=True)
    return report


def _build_options(options: Options) -> dict[str, Any]:
    return {
        "do_quantization": True,
        "optimization_level": options.optimization_level,
        "quantized_dtype": options.dtype,
        "quantized_algorithm": options.algorithm,
        "target_platform": options.target,
        "num_npu_core": options.cores,
        "extra_qparams": None,
        "hybrid_rate": options.hybrid_rate,
        "max_context": options.max_context,
    }


def _samples(plan: Plan, work: Path, tell: toolkit.Tell) -> list[dict[str, str]]:
    """Embeddings of every talk, written into work."""
    if not plan.talks:
        if plan.options.dtype.startswith("w8"):
            tell("without --calibration the toolkit chooses its steps by the weights alone")
        return []
    embedder, samples = Embedder(plan.spec), []
    for number, talk in enumerate(plan.talks):
        tell(f"sample {number + 1} of {len(plan.talks)}: {talk.picture.name}")
        rows = embedder.rows(talk)
        if len(rows) > plan.options.max_context:
            tell(f"{talk.picture.name} is left out: {len(rows)} rows are more than max_context")
            continue
        name = f"sample_{number}.npy"
        np.save(work / name, rows)
        samples.append({"rows": name, "target": talk.answer})
    if not samples:
        raise OptionError(f"all {len(plan.talks)} calibration samples are longer than max_context")
    return samples


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
