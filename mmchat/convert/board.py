"""A checkpoint -> the folder that a board runs: mmchat.json, token rows, encoder, LLM and the small files.

Step by step, the short ones first; interrupted or failed, it goes on with the step where it was.  A step whose toolkit
is missing can be skipped: without rknn-toolkit2 the encoder's tensors are taken along for the board's CPU, which is
slow; without rkllm-toolkit the folder lacks its LLM, and gets no mmchat.json before that is there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmchat.checkpoint import Checkpoint, blocks, write_raw_tensors
from mmchat.convert import llm_rkllm, table, toolkit, vision_onnx, vision_rknn
from mmchat.convert.step import COPIED_BYTES_PER_S, Estimate, Progress
from mmchat.convert.steps import WORK, Steps
from mmchat.errors import ModelDirError, OptionError
from mmchat.model_dir import BOARD_FILE, ModelSpec, check_digests, open_model
from mmchat.outputs import check_space, only_writer, remove_temporary, remove_work, replace_file, stamp
from mmchat.prompt import ChatTokenizer

LLM, TABLE, VISION, CPU_VISION = "model.rkllm", "embed_table.safetensors", "vision.rknn", "vision.safetensors"
POSITIONS = vision_onnx.POSITIONS_FILE
REPORT = "conversion.json"
SKIPPABLE = ("vision", "llm")
_SMALL = ("config.json", "preprocessor_config.json", "tokenizer.json", "generation_config.json")
_MEMORY = 100_000_000
_ENCODER_TENSORS = ("vpm.", "resampler.")


@dataclass(frozen=True)
class Step:
    """key: what makes its result another one.  make: writes its files into the work folder; gives a report.

    python: finds its toolkit's interpreter, or raises; None where it has no toolkit.
    """

    name: str
    files: tuple[str, ...]
    key: Any
    estimate: Estimate
    make: Callable[[Path, toolkit.Tell, Progress], dict[str, Any]]
    python: Callable[[], Path] | None = None


@dataclass(frozen=True)
class Plan:
    """lacks: what the folder will not have, each with what makes it."""

    spec: ModelSpec
    target: str
    context_rows: int
    mode: str
    patches: int
    steps: tuple[Step, ...]
    lacks: tuple[str, ...]

    @property
    def estimate(self) -> Estimate:
        """Of all steps; memory: of the one that takes most."""
        several = [step.estimate for step in self.steps]
        return Estimate(
            sum(one.reads for one in several),
            sum(one.writes for one in several),
            max(one.memory for one in several),
            sum(one.seconds for one in several),
        )


def plan(
    checkpoint: str | Path,
    options: llm_rkllm.Options,
    *,
    skip: Collection[str] = (),
    llm: Path | None = None,
    calibration: Path | None = None,
    rknn_python: Callable[[], Path],
    rkllm_python: Callable[[], Path],
) -> Plan:
    """skip: of SKIPPABLE.  llm: a *.rkllm that somebody made, with options.max_context.

    Raises ModelDirError: no whole checkpoint, or no such file.  OptionError.
    """
    if unknown := set(skip) - set(SKIPPABLE):
        raise OptionError(f"{', '.join(sorted(unknown))} cannot be skipped; known are {', '.join(SKIPPABLE)}")
    converted = llm_rkllm.plan(checkpoint, options, calibration)
    spec, source = converted.spec, Checkpoint(converted.spec.folder)
    made_from = [[path.name, *stamp(path)] for path in sorted({source.file(name).path for name in source})]
    steps = [_small(spec), _table(spec, made_from)]
    steps.append(_cpu_vision(spec, made_from) if "vision" in skip else _vision(spec, options, made_from, rknn_python))
    lacks: list[str] = []
    if llm is not None:
        steps.append(_given_llm(llm))
    elif "llm" in skip:
        made = f"mmchat convert llm-rkllm {shlex.quote(str(checkpoint))} {LLM} --target {options.target}"
        made += f" --dtype {options.dtype} --max-context {options.max_context}"
        made += f" --calibration {shlex.quote(str(calibration))}" if calibration else ""
        lacks.append(
            f"{LLM}, the LLM: {made} makes it; then run this command again with --llm {LLM} instead of --skip llm"
        )
    else:
        steps.append(_llm(converted, made_from, rkllm_python))
    mode = "openvino" if "vision" in skip else "navit"
    patches = vision_onnx.default_patches(spec)
    return Plan(spec, options.target, options.max_context, mode, patches, tuple(steps), tuple(lacks))


def run(plan: Plan, folder: Path, tell: toolkit.Tell, progress: Progress) -> None:
    """Write the folder, or what of it is not there yet.

    Raises ModelDirError: other files in it, or a result that does not open.  ToolkitError; DiskFull.
    """
    if folder.exists() and folder.samefile(plan.spec.folder):
        raise ModelDirError(f"{folder}: is the checkpoint's own folder; give another one")
    with only_writer(folder):
        steps = Steps(folder)
        steps.start(
            checkpoint=str(plan.spec.folder.absolute()),
            target=plan.target,
            lacks=plan.lacks,
            steps=[step.name for step in plan.steps],
        )
        todo = [step for step in plan.steps if not steps.is_done(step.name, step.key, progress)]
        for step in todo:  # before hours of work
            if step.python:
                step.python()
        if todo:  # until the end: it would describe other files
            (folder / BOARD_FILE).unlink(missing_ok=True)
        # What a killed step left is gone on with, or removed first; the steps look at the disk again.
        check_space(folder, max(0, sum(step.estimate.writes for step in todo) - steps.n_bytes_begun))
        for step in plan.steps:
            if step not in todo:
                tell(f"{step.name}: done before")
                continue
            tell(f"{step.name}: {step.estimate.describe(folder)}")
            steps.begin(step.name, step.files)
            steps.finish(step.name, step.key, list(step.files), step.make(steps.work, tell, progress), progress)
        if not plan.lacks:
            _describe(plan, folder, steps)
            check_digests(open_model(folder), lambda name: tell(f"checking {name}"))
        steps.clear()
        complete = (folder / BOARD_FILE).is_file()  # skipping a part that is there takes nothing away
    for one in () if complete else plan.lacks:
        tell(f"the folder is not complete: it lacks {one}")


def _describe(plan: Plan, folder: Path, steps: Steps) -> None:
    """mmchat.json, from which the folder opens, and how it was made."""
    spec = plan.spec
    vision: dict[str, Any] = {"file": CPU_VISION}
    if plan.mode == "navit":
        vision = {"file": VISION, "patches": plan.patches, "positions": POSITIONS}
    description = {
        "format": 1,
        "family": "minicpmv-2.6",
        "name": spec.name,
        "hidden_size": spec.llm.hidden_size,
        "context_rows": plan.context_rows,
        "llm": {"engine": "rkllm", "file": LLM},
        "embed_table": {"file": TABLE},
        "vision": {"mode": plan.mode, **vision},
        "slices": {},
        "stop_ids": sorted(ChatTokenizer(folder / "tokenizer.json").stop_ids),
        "files": steps.files(*(step.name for step in plan.steps)),
    }
    for name, content in ((REPORT, {"target": plan.target, **steps.reports()}), (BOARD_FILE, description)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / name, text.encode())


# --- the steps --------------------------------------------------------------------------------------------------


def _small(spec: ModelSpec) -> Step:
    names = tuple(name for name in _SMALL if (spec.folder / name).is_file())

    def make(work: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
        for name in names:
            shutil.copyfile(spec.folder / name, work / name)
        return {}

    n_bytes = sum((spec.folder / name).stat().st_size for name in names)
    key = [[name, *stamp(spec.folder / name)] for name in names]
    return Step("small files", names, key, Estimate(n_bytes, n_bytes, _MEMORY, 0), make)


def _table(spec: ModelSpec, made_from: Any) -> Step:
    def make(work: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
        table.run(spec.folder, work / TABLE, progress)
        return {}

    return Step("embedding table", (TABLE,), made_from, table.plan(spec.folder, Path(WORK) / TABLE), make)


def _cpu_vision(spec: ModelSpec, made_from: Any) -> Step:
    """The encoder's tensors alone, byte for byte."""
    checkpoint = Checkpoint(spec.folder)
    tensors = {name: checkpoint.info(name) for name in checkpoint if name.startswith(_ENCODER_TENSORS)}
    n_bytes = sum(info.end - info.start for info in tensors.values())

    def make(work: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
        done = 0

        def counted(name: str) -> Iterator[bytes]:
            nonlocal done
            for block in blocks(checkpoint.file(name).path, tensors[name]):
                yield block
                done += len(block)
                progress(CPU_VISION, done, n_bytes)

        remove_temporary(work / CPU_VISION)
        write_raw_tensors(
            work / CPU_VISION,
            {name: (info.dtype, info.shape, info.end - info.start, counted(name)) for name, info in tensors.items()},
        )
        return {"mode": "openvino"}

    estimate = Estimate(n_bytes, n_bytes, _MEMORY, n_bytes / COPIED_BYTES_PER_S)
    return Step("encoder", (CPU_VISION,), ["cpu", made_from], estimate, make)


def _vision(spec: ModelSpec, options: llm_rkllm.Options, made_from: Any, python: Callable[[], Path]) -> Step:
    exported = vision_onnx.plan(spec)
    tower = spec.vision
    foreseen = vision_rknn.Encoder(
        Path(), Path(), exported.n_patches, tower.patch_size, tower.hidden_size, tower.query_num, tower.output_size,
        exported.n_data,
    )  # fmt: skip
    compiled = vision_rknn.Plan(foreseen, options.target, False, (), vision_rknn.MIN_COSINE).estimate
    first = exported.estimate
    estimate = Estimate(
        first.reads + compiled.reads,
        first.writes + compiled.writes,
        max(first.memory, compiled.memory),
        first.seconds + compiled.seconds,
    )

    def make(work: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
        vision_onnx.run(exported, work / "onnx", progress)
        report = vision_rknn.run(vision_rknn.plan(work / "onnx", options.target), work / VISION, python(), tell)
        shutil.copyfile(work / "onnx" / POSITIONS, work / POSITIONS)
        remove_work(work / "onnx")
        return report

    key = [options.target, exported.n_patches, made_from]
    return Step("encoder", (VISION, POSITIONS), key, estimate, make, python)


def _given_llm(path: Path) -> Step:
    if not path.is_file():
        raise ModelDirError(f"{path}: no such file; give a *.rkllm that was made of this checkpoint")
    n_bytes = path.stat().st_size

    def make(work: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
        (work / LLM).unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(path), work / LLM)  # not the link that a file of the hub's cache is
        except OSError:  # another disk
            shutil.copyfile(path, work / LLM)
        return {"given": path.name}

    key = ["given", *stamp(path)]
    return Step("LLM", (LLM,), key, Estimate(n_bytes, n_bytes, _MEMORY, n_bytes / COPIED_BYTES_PER_S), make)


def _llm(converted: llm_rkllm.Plan, made_from: Any, python: Callable[[], Path]) -> Step:
    def make(work: Path, tell: toolkit.Tell, progress: Progress) -> dict[str, Any]:
        return llm_rkllm.run(converted, work / LLM, python(), tell, progress)

    talks = [[str(talk.picture), talk.question, talk.answer, *stamp(talk.picture)] for talk in converted.talks]
    return Step("LLM", (LLM,), [asdict(converted.options), talks, made_from], converted.estimate, make, python)
