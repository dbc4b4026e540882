"""A model folder -> ModelSpec: what it is, what it lacks, and every number that other modules need.

Opened here: the published checkpoint layout (config.json, preprocessor_config.json, tokenizer.json, *.safetensors with
vpm.*, resampler.* and llm.*), of which the demo model is a true miniature; and a board's folder, which has the same
JSON files and, instead of the weights, what its mmchat.json names: the *.rkllm model, the embedding table, the encoder.

This module reads JSON and tensor headers only; it loads no weights and knows no engine.  Sizes of a board's files are
compared with mmchat.json whenever it is opened, digests only when asked for (check_digests): 8 GB take a minute.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from mmchat.checkpoint import Checkpoint, weight_files
from mmchat.engine import Sampling
from mmchat.errors import ModelDirError, PromptError

DEMO = "demo"
BOARD_FILE = "mmchat.json"
# Rows of RKLLM's context that are never used: its own check leaves 4 free, and a shift must not happen.
MARGIN_ROWS = 32
_VISION_MODES = ("openvino", "navit", "square")
_TABLE_HINT = (
    "python -c \"from mmchat.embed_table import build_table; build_table('CHECKPOINT', '{}')\" makes it "
    "from the published checkpoint"
)
_HINTS = {
    "llm": "rkllm-toolkit converts it on a PC; copy it here",
    "embed_table": _TABLE_HINT,
    "vision": "copy the encoder here",
}
# Of all KV caches on the CPU together, at full length; and how many there are at most.
_CACHES_BYTES, MAX_CACHES = 1 << 30, 4
# Patches that one encoder input may have on the CPU: every view of pictures up to about 1000:1.
_CPU_MAX_PATCHES = 2048
# What the published chat() samples with where the folder does not say.
_CHAT_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.05}
_MAX_NEW_TOKENS = 2048


@dataclass(frozen=True)
class LlmSpec:
    """Qwen2.  context_rows: positions that the model knows."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context_rows: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.n_heads


def cpu_caches(spec: LlmSpec, context_rows: int) -> int:
    """How many KV caches the CPU engine keeps: as many as fit into 1 GiB, 1 to 4."""
    row_bytes = 2 * 4 * spec.n_layers * spec.n_kv_heads * spec.head_size  # keys and values, float32
    return max(1, min(MAX_CACHES, _CACHES_BYTES // (row_bytes * context_rows)))


@dataclass(frozen=True)
class VisionSpec:
    """SigLIP tower and resampler.  position_side: side of the square table of learned positions, in patches."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    patch_size: int
    position_side: int
    query_num: int
    output_size: int
    resampler_heads: int
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class SliceSpec:
    """How pictures are cut for this model (mmchat.slicing)."""

    max_slice_nums: int
    scale_resolution: int
    patch_size: int
    max_patches: int


@dataclass(frozen=True)
class BoardSpec:
    """What a board's folder has instead of a checkpoint's weights.

    vision_mode: "openvino" (tensors, for the CPU), "navit" or "square" (*.rknn).  base_domain: RKLLM's base_domain_id.
    digests: SHA-256 of the files, by name.
    """

    llm_path: Path
    table_path: Path
    vision_path: Path
    vision_mode: str
    base_domain: int
    stop_ids: frozenset[int]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class ModelSpec:
    """A folder that was found complete.  board: set where its LLM is RKLLM's."""

    folder: Path
    name: str
    llm: LlmSpec
    vision: VisionSpec
    slices: SliceSpec
    use_image_id: bool
    sampling: Sampling = field(default_factory=Sampling)
    board: BoardSpec | None = None

    @property
    def context_rows(self) -> int:
        """Rows that a prompt and its answer may take together."""
        return self.llm.context_rows - (MARGIN_ROWS if self.board else 0)

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @cached_property
    def embed_table_path(self) -> Path:
        """The file that holds the token embedding rows."""
        if self.board:
            return self.board.table_path
        return Checkpoint(self.folder).file("llm.model.embed_tokens.weight").path

    @cached_property
    def encoder_digest(self) -> str:
        """SHA-256 over the vision tensors and their dimensions: other weights, other embeddings."""
        if self.board and self.board.vision_mode != "openvino":
            text = f"{self.board.vision_mode} {self.board.digests[self.board.vision_path.name]}"
            return hashlib.sha256(text.encode()).hexdigest()
        checkpoint = Checkpoint(self.folder)
        digest = hashlib.sha256(json.dumps(asdict(self.vision), sort_keys=True).encode())
        for name in sorted(checkpoint):
            if name.startswith(("vpm.", "resampler.")):
                info = checkpoint.info(name)
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                digest.update(checkpoint.array(name).data)
        return digest.hexdigest()


def model_folder(name: str | Path) -> Path:
    """Where the model "demo", or a folder as a user gives it, lies; whether it is there is not asked."""
    return Path(__file__).parent / DEMO if str(name) == DEMO else Path(os.path.expanduser(name))


def open_model(name: str | Path) -> ModelSpec:
    """The model "demo", or a folder.

    Raises ModelDirError: no such folder, files missing, or values that do not fit together.
    """
    folder = model_folder(name)
    if not folder.is_dir():
        raise ModelDirError(f'{folder}: no such model folder (give a folder, or "demo" for the built-in model)')
    needed = ("config.json", "preprocessor_config.json", "tokenizer.json")
    missing = [file for file in needed if not (folder / file).is_file()]
    is_board = (folder / BOARD_FILE).is_file()
    if missing and is_board:
        raise ModelDirError(f"{folder}: lacks {', '.join(missing)}: copy them here from the published checkpoint")
    if missing:
        raise ModelDirError(
            f"{folder}: lacks {', '.join(missing)}; a model folder is a checkpoint as published: "
            f"{', '.join(needed)} and *.safetensors"
        )
    if not is_board:
        weight_files(folder)
    config = _Json(folder / "config.json")
    processor = _Json(folder / "preprocessor_config.json")
    vision = config.inner("vision_config")
    hidden_size = config.integer("hidden_size")
    llm = LlmSpec(
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        n_layers=config.integer("num_hidden_layers"),
        n_heads=config.integer("num_attention_heads"),
        n_kv_heads=config.integer("num_key_value_heads"),
        vocab_size=config.integer("vocab_size"),
        context_rows=config.integer("max_position_embeddings"),
        rope_theta=config.number("rope_theta"),
        rms_norm_eps=config.number("rms_norm_eps"),
    )
    patch_size = vision.integer("patch_size")
    tower = VisionSpec(
        hidden_size=vision.integer("hidden_size"),
        intermediate_size=vision.integer("intermediate_size"),
        n_layers=vision.integer("num_hidden_layers"),
        n_heads=vision.integer("num_attention_heads"),
        patch_size=patch_size,
        position_side=vision.integer("image_size") // patch_size,
        query_num=config.integer("query_num"),
        output_size=hidden_size,
        # The published code derives it; small models need another value and say so.
        resampler_heads=config.integer("resampler_num_heads", max(1, hidden_size // 128)),
    )
    slices = SliceSpec(
        max_slice_nums=processor.integer("max_slice_nums"),
        scale_resolution=processor.integer("scale_resolution"),
        patch_size=processor.integer("patch_size"),
        max_patches=_CPU_MAX_PATCHES,
    )
    for good, problem in (
        (config.values.get("model_type") == "minicpmv", f"model_type is {config.values.get('model_type')!r}"),
        (hidden_size % llm.n_heads == 0 and llm.n_heads % llm.n_kv_heads == 0, "attention heads do not divide"),
        (tower.hidden_size % tower.n_heads == 0, "vision attention heads do not divide"),
        (hidden_size % tower.resampler_heads == 0, "resampler heads do not divide"),
        (tower.position_side >= 1, f"image_size is below the patch size of {patch_size}"),
        (slices.scale_resolution >= patch_size, f"scale_resolution is below the patch size of {patch_size}"),
        (slices.patch_size == patch_size, f"patch_size is {patch_size} here and {slices.patch_size} in the processor"),
    ):
        if not good:
            raise ModelDirError(f"{config.path}: {problem}; a MiniCPM-V-2.6 model is needed")
    spec = ModelSpec(
        folder=folder,
        name=DEMO if str(name) == DEMO else folder.name,
        llm=llm,
        vision=tower,
        slices=slices,
        use_image_id=bool(config.values.get("use_image_id", True)),
        sampling=_sampling(folder / "generation_config.json"),
    )
    return _with_board(spec, _Json(folder / BOARD_FILE)) if is_board else spec


def check_digests(spec: ModelSpec, progress: Callable[[str], None] = lambda name: None) -> None:
    """Read every file of a board's folder once.  progress: called with each name before it is read.

    Raises ModelDirError: a file is not the one that mmchat.json describes.
    """
    for name, wanted in spec.board.digests.items() if spec.board else ():
        progress(name)
        with (spec.folder / name).open("rb") as file:
            found = _sha256(file)
        if found != wanted:
            raise ModelDirError(f"{spec.folder / name}: damaged (SHA-256 {found}, not {wanted}); copy it again")


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _with_board(spec: ModelSpec, config: _Json) -> ModelSpec:
    """The spec, with what mmchat.json says of its files.

    Raises ModelDirError: a file is missing or has another size, or a number is not the checkpoint's.
    """
    values, llm, vision = config.values, config.inner("llm"), config.inner("vision")
    context_rows = config.integer("context_rows")
    mode, engine = vision.values.get("mode"), llm.values.get("engine")
    for good, problem in (
        (values.get("format") == 1, f"format is {values.get('format')!r}; this version reads 1"),
        (engine == "rkllm", f"llm.engine is {engine!r}; rkllm is known"),
        (mode in _VISION_MODES, f"vision.mode is {mode!r}; known are {', '.join(_VISION_MODES)}"),
        (
            config.integer("hidden_size") == spec.llm.hidden_size,
            f"hidden_size is {values['hidden_size']}, but {spec.llm.hidden_size} in config.json",
        ),
        (
            MARGIN_ROWS < context_rows <= spec.llm.context_rows,
            f"context_rows is {context_rows}; it must be above {MARGIN_ROWS} and at most the model's "
            f"{spec.llm.context_rows}",
        ),
    ):
        if not good:
            raise ModelDirError(f"{config.path}: {problem}")
    digests = {}
    for name, described in config.inner("files").values.items():
        info = _Json(config.path, described if isinstance(described, dict) else {})
        digests[name] = str(info.values.get("sha256"))
        _check_size(spec.folder / name, info.integer("bytes"), config)
    paths = {part: _board_file(config, part, digests) for part in _HINTS}
    slices = config.inner("slices")
    board = BoardSpec(
        llm_path=paths["llm"],
        table_path=paths["embed_table"],
        vision_path=paths["vision"],
        vision_mode=str(mode),
        base_domain=int(llm.values.get("base_domain_id", 1)),
        stop_ids=frozenset(values.get("stop_ids", ())),
        digests=digests,
    )
    return replace(
        spec,
        name=str(values.get("name", spec.name)),
        llm=replace(spec.llm, context_rows=context_rows),
        slices=replace(spec.slices, max_patches=slices.integer("max_patches", spec.slices.max_patches)),
        board=board,
    )


def _board_file(config: _Json, part: str, digests: Mapping[str, str]) -> Path:
    name = config.inner(part).values.get("file")
    if not isinstance(name, str) or name not in digests:
        raise ModelDirError(f'{config.path}: {part}.file is {name!r}, which its "files" does not list')
    return config.path.parent / name


def _check_size(path: Path, n_bytes: int, config: _Json) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        parts = [part for part in _HINTS if (config.values.get(part) or {}).get("file") == path.name]
        hint = f"; {_HINTS[parts[0]].format(path.name)}" if parts else ""
        raise ModelDirError(f"{config.path.parent}: lacks {path.name}{hint}") from None
    if found != n_bytes:
        raise ModelDirError(f"{path}: has {found} bytes, not {n_bytes}; copy it again")


def _sampling(path: Path) -> Sampling:
    """The folder's own defaults, over those of the published chat()."""
    config = _Json(path).values if path.is_file() else {}
    values: dict[str, Any] = {"max_new_tokens": config.get("max_new_tokens", _MAX_NEW_TOKENS)}
    if config.get("do_sample", True):
        values.update({name: config.get(name, default) for name, default in _CHAT_SAMPLING.items()})
    elif "repetition_penalty" in config:
        values["repetition_penalty"] = config["repetition_penalty"]
    try:
        return Sampling.from_dict(values)
    except PromptError as error:
        raise ModelDirError(f"{path}: {error}") from None


class _Json:
    """A JSON object whose values are taken by name and type."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        self.path = path
        if values is None:
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise ModelDirError(f"{path}: cannot be read ({error.strerror or error})") from None
            except (ValueError, RecursionError) as error:
                raise ModelDirError(f"{path}: not JSON ({error})") from None
            if not isinstance(values, dict):
                raise ModelDirError(f"{path}: not a JSON object")
        self.values = values

    def inner(self, name: str) -> _Json:
        value = self.values.get(name)
        if not isinstance(value, dict):
            of = "a board's folder" if self.path.name == BOARD_FILE else "MiniCPM-V-2.6's config"
            raise ModelDirError(f"{self.path}: has no {name!r}; this is not {of}")
        return _Json(self.path, value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a whole number >= 1 is needed")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a number above 0 is needed")
        return float(value)
