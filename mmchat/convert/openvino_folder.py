"""A checkpoint -> an OpenVINO folder with the files, inputs and outputs that optimum-intel writes for MiniCPM-V.

mmchat opens it (mmchat.openvino_ir), and so does openvino_genai's VLMPipeline, given the two tokenizer models; these
are written where the packages openvino-tokenizers and transformers are installed.

Weights are mapped from the checkpoint, not loaded.  Those that need another type go through a mapped file beside the
result, one matrix at a time.  NNCF compresses the LLM alone (int4: its last layer int8); the tower, the resampler and
the token rows are kept as float16, for they are small, and every answer depends on them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint, finite_blocks, to_float32, write_atomic
from mmchat.convert.step import Estimate, Progress
from mmchat.errors import ModelDirError
from mmchat.model_dir import IR_FILES, ModelSpec
from mmchat.outputs import Work, check_space, only_writer, stamp
from mmchat.prompt import CHAT_TEMPLATE

KINDS = ("int4", "int8", "fp16", "fp32")
GROUP_SIZE = 64
TOKENIZER_FILES = ("openvino_tokenizer", "openvino_detokenizer")
_LOG = logging.getLogger("mmchat")
_COPIED = ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "config.json")
_BLOCK_ROWS_BYTES = 1 << 24
# Bits of a number in the file, and numbers per second on one busy core of a PC, reading and writing included.
_BITS = {"int4": 4.25, "int8": 8.1, "fp16": 16, "fp32": 32}
_NUMBERS_PER_S = {"int4": 40e6, "int8": 60e6, "fp16": 100e6, "fp32": 60e6}


@dataclass(frozen=True)
class Plan:
    """numbers: how many each model has; n_last: the LLM's output layer.  n_read: bytes of the checkpoint."""

    spec: ModelSpec
    weights: str
    numbers: dict[str, int]
    n_last: int
    n_read: int

    def bits(self, part: str) -> float:
        """Of a number, in this model's file."""
        return _BITS[self.weights if part == "llm" or self.weights == "fp32" else "fp16"]

    def n_bytes(self, part: str) -> int:
        last = self.n_last * (_BITS["int8"] - _BITS["int4"]) if part == "llm" and self.weights == "int4" else 0
        return int((self.numbers[part] * self.bits(part) + last) / 8)

    @property
    def n_scratch(self) -> int:
        """Bytes of the mapped file, at most: that of one model at a time."""
        return max(self.n_bytes(part) for part in IR_FILES if part != "llm" or self.weights in ("fp16", "fp32"))

    @property
    def estimate(self) -> Estimate:
        writes = sum(map(self.n_bytes, IR_FILES))
        memory = 300_000_000  # what is mapped is not counted: it is given back where others need it
        if self.weights in ("int4", "int8"):  # 4.9 GB with 4 layers of the published size
            memory += self.n_bytes("llm") + 7 * self.n_last
        n_llm, n_others = self.numbers["llm"], sum(self.numbers.values()) - self.numbers["llm"]
        seconds = n_llm / _NUMBERS_PER_S[self.weights] + n_others / _NUMBERS_PER_S["fp16"]
        return Estimate(self.n_read, writes, memory, seconds)


def plan(spec: ModelSpec, weights: str = "int4") -> Plan:
    """spec: of a checkpoint folder.

    Raises ModelDirError: not a checkpoint, tensors missing, an unknown kind of weights, or a package not installed.
    """
    if weights not in KINDS:
        raise ModelDirError(f"weights are {weights!r}; known are {', '.join(KINDS)}")
    if spec.board or spec.openvino:
        raise ModelDirError(f"{spec.folder}: not a checkpoint as published; convert openvino begins with one")
    for package in ("openvino", *(("nncf",) if weights in ("int4", "int8") else ())):
        if importlib.util.find_spec(package) is None:
            raise ModelDirError(f"convert openvino needs the package {package}: pip install {package}")
    checkpoint = Checkpoint(spec.folder)
    sizes = {name: prod(checkpoint.info(name).shape) for name in checkpoint}
    table = "llm.model.embed_tokens.weight"
    if table not in sizes:
        raise ModelDirError(f"{spec.folder}: no tensor {table!r}; give the folder of a whole checkpoint")
    numbers = {
        "text_embeddings": sizes[table],
        "vision": sum(n for name, n in sizes.items() if name.startswith("vpm.")),
        "resampler": sum(n for name, n in sizes.items() if name.startswith("resampler.")),
        "llm": sum(n for name, n in sizes.items() if name.startswith("llm.")) - sizes[table],
    }
    if "llm.lm_head.weight" not in sizes:  # tied
        numbers["llm"] += sizes[table]
    n_read = sum(checkpoint.info(name).end - checkpoint.info(name).start for name in checkpoint)
    return Plan(spec, weights, numbers, sizes.get("llm.lm_head.weight", sizes[table]), n_read)


def run(plan: Plan, target: Path, progress: Progress) -> None:
    """Write the folder; interrupted, it goes on with the model where it was.

    Raises ModelDirError: a target with other files in it, or weights that are not finite.  DiskFull.
    """
    folder = plan.spec.folder
    if target.exists() and target.samefile(folder):
        raise ModelDirError(f"{target}: is the checkpoint's own folder; give another one")
    texts = {name: (folder / name).read_bytes() for name in _COPIED if (folder / name).is_file()}
    texts = {"tokenizer_config.json": _tokenizer_config(folder), **texts}  # config.json comes last
    checkpoint = Checkpoint(folder)
    sources = sorted({checkpoint.file(name).path for name in checkpoint})
    made_from = {
        "step": "openvino",
        "weights": plan.weights,
        "files": [[path.name, *stamp(path)] for path in (*sources, folder / "tokenizer.json")],
    }
    total = sum(plan.numbers.values())
    with only_writer(target):
        work = Work(target, made_from)
        todo = [
            part for part in IR_FILES if not (work.has(f"{IR_FILES[part]}.xml") and work.has(f"{IR_FILES[part]}.bin"))
        ]
        for name in (*IR_FILES.values(), *TOKENIZER_FILES):  # of one that was killed
            shutil.rmtree(_scratch(target, name), ignore_errors=True)
        check_space(target, sum(map(plan.n_bytes, todo)) + (plan.n_scratch if todo else 0))
        done = total - sum(plan.numbers[part] for part in todo)
        for part in todo:
            count = partial(_count, progress, IR_FILES[part], done, total)
            _save(work, IR_FILES[part], partial(_build, plan, part, checkpoint, count))
            done += plan.numbers[part]
            progress(IR_FILES[part], done, total)
        tokenizers = [name for name in TOKENIZER_FILES if not (work.has(f"{name}.xml") and work.has(f"{name}.bin"))]
        if tokenizers and _has_tokenizers():
            try:
                made = dict(zip(TOKENIZER_FILES, _tokenizers(folder), strict=True))
            except Exception as error:  # other people's packages, of releases that need not fit each other
                tokenizers, made = [], {}
                _LOG.warning(
                    "the tokenizer as models, which openvino_genai needs and mmchat does not, is not written (%s)",
                    " ".join(str(error).split()) or type(error).__name__,
                )
            for name in tokenizers:
                _save(work, name, partial(_made, made[name]))
        for name, content in texts.items():
            path = work.prepare(name)
            write_atomic(path, lambda file, content=content: file.write(content))
            work.finish(name)


def _count(progress: Progress, name: str, done: int, total: int, n: int) -> None:
    progress(name, min(done + n, total), total)


def _made(model: Any, scratch: Path) -> tuple[Any, Any]:
    return model, None


def _save(work: Work, name: str, build: Callable[[Path], tuple[Any, Any]]) -> None:
    """Build a model and write its two files.

    build: called with a folder for what it needs meanwhile; gives the model, and what must live as long.
    """
    import openvino

    work.prepare(f"{name}.xml")
    work.prepare(f"{name}.bin")
    scratch = _scratch(work.folder, name)
    scratch.mkdir()
    try:
        model, kept = build(scratch)
        _name(model)
        try:
            openvino.save_model(model, scratch / f"{name}.xml", compress_to_fp16=False)
        except RuntimeError as error:  # what it raises where a write fails
            raise ModelDirError(f"{work.folder}: {name} cannot be written ({error}); is the disk full?") from None
        del model, kept
        for suffix in (".bin", ".xml"):
            descriptor = os.open(scratch / f"{name}{suffix}", os.O_RDWR)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(scratch / f"{name}{suffix}", work.folder / f"{name}{suffix}")
            work.finish(f"{name}{suffix}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(folder: Path, name: str) -> Path:
    """Where a model is made."""
    return folder / f".{name}.tmp"


def _name(model: Any) -> None:
    """By their order, so that the same model is the same file: nodes have numbers that depend on the process."""
    for number, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        node.set_friendly_name(node.output(0).get_any_name() if kind == "Parameter" else f"{kind}_{number}")


def _build(
    plan: Plan, part: str, checkpoint: Checkpoint, count: Callable[[int], None], scratch: Path
) -> tuple[Any, Any]:
    """The model, and the memory that its constants point into."""
    from mmchat import openvino_graphs as graphs

    spec = plan.spec
    kind = {16.0: "F16", 32.0: "F32"}.get(plan.bits(part))
    weights = stored_weights(checkpoint, kind, scratch, count)
    match part:
        case "text_embeddings":
            model = graphs.build_text_embeddings(weights)
        case "vision":
            model = graphs.build_vision_embeddings(weights, spec.vision)
        case "resampler":
            model = graphs.build_resampler(weights, spec.vision)
        case _:
            model = graphs.build_llm(weights, spec.llm, every_position=True)
    return (model if kind else compress(model, plan.weights)), weights.kept


def stored_weights(checkpoint: Checkpoint, kind: str | None, scratch: Path, count: Callable[[int], None]) -> Any:
    """A mmchat.openvino_graphs.Weights whose matrices are mapped: from the checkpoint, or from files in scratch.

    Its list `kept` is the memory that the nodes point into, without holding it: it must outlive them.
    kind: F16 or F32; None leaves each in the type that it has.  count: called with the numbers mapped so far.
    """
    import openvino
    from openvino import opset13 as op

    from mmchat.openvino_graphs import Weights, two_dimensions

    types = {"F32": openvino.Type.f32, "F16": openvino.Type.f16, "BF16": openvino.Type.bf16}

    class Stored(Weights):
        def __init__(self) -> None:
            super().__init__(checkpoint)
            self.kept: list[Any] = []
            self._checked: set[str] = set()
            self._n_done = 0

        def matrix(self, name: str, rows: slice = slice(None)) -> Any:
            info = checkpoint.info(name)
            if info.dtype not in types:
                raise ModelDirError(f"{checkpoint.folder}: {name} is {info.dtype}; {', '.join(types)} can be converted")
            if name not in self._checked:
                for _ in finite_blocks(checkpoint.file(name).path, name, info):
                    pass
                self._checked.add(name)
            array = two_dimensions(checkpoint.array(name)[rows])
            if kind and kind != info.dtype:
                array = _converted(array, kind, scratch / "matrix", name)
            self._n_done += array.size
            count(self._n_done)
            tensor = openvino.Tensor(array, openvino.Shape(array.shape), types[kind or info.dtype])
            constant = openvino.op.Constant(tensor, shared_memory=True)
            self.kept.append((array, tensor))
            return constant if (kind or info.dtype) == "F32" else op.convert(constant, "f32")

    return Stored()


def _converted(array: NDArray[Any], kind: str, path: Path, name: str) -> NDArray[Any]:
    """The same in another type, in a mapped file of its own.  Raises ModelDirError: too large for float16."""
    dtype = np.dtype(np.float16 if kind == "F16" else np.float32)
    with path.open("wb+") as file:
        # Not truncate: what is written to a mapped hole of a full disk kills the process.
        os.posix_fallocate(file.fileno(), 0, array.size * dtype.itemsize)
        mapped = mmap.mmap(file.fileno(), 0)
    path.unlink()  # it lives for as long as it is mapped
    out = np.frombuffer(mapped, dtype).reshape(array.shape)
    for rows in _row_blocks(array):
        with np.errstate(over="ignore"):
            out[rows] = to_float32(array[rows])
        if not np.isfinite(out[rows]).all():
            raise ModelDirError(f"{name}: has values too large for float16; use --weights fp32")
    return out


def _row_blocks(array: NDArray[Any]) -> Iterator[slice]:
    step = max(1, _BLOCK_ROWS_BYTES // (4 * array.shape[1]))
    return (slice(i, i + step) for i in range(0, len(array), step))


def compress(model: Any, weights: str) -> Any:
    """By NNCF: int4, symmetric, in groups of 64, the last layer int8; or int8."""
    nncf: Any = importlib.import_module("nncf")
    nncf.set_log_level(40)
    mode = nncf.CompressWeightsMode.INT4_SYM if weights == "int4" else nncf.CompressWeightsMode.INT8_ASYM
    groups = {"group_size": GROUP_SIZE, "ratio": 1.0} if weights == "int4" else {}
    return nncf.compress_weights(model, mode=mode, **groups)


def _tokenizer_config(folder: Path) -> bytes:
    """The checkpoint's, with a chat template where it has none, and without its own Python class."""
    path = folder / "tokenizer_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelDirError(f"{path}: not JSON ({error})") from None
    values.pop("auto_map", None)
    values = {"chat_template": CHAT_TEMPLATE, **values, "tokenizer_class": "PreTrainedTokenizerFast"}
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _has_tokenizers() -> bool:
    return all(importlib.util.find_spec(package) for package in ("openvino_tokenizers", "transformers"))


def _tokenizers(folder: Path) -> tuple[Any, Any]:
    """openvino_genai's two models of a tokenizer.json: text -> ids, ids -> text."""
    transformers: Any = importlib.import_module("transformers")
    tokenizers: Any = importlib.import_module("openvino_tokenizers")
    generation = folder / "generation_config.json"
    eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    fast.chat_template = json.loads(_tokenizer_config(folder))["chat_template"]
    if eos is not None:
        fast.eos_token = fast.convert_ids_to_tokens(eos[0] if isinstance(eos, list) else eos)
    return tuple(tokenizers.convert_tokenizer(fast, with_detokenizer=True))
