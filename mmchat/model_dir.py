"""A model folder -> ModelSpec: what it is, what it lacks, and every number that other modules need.

Opened here: the published checkpoint layout (config.json, preprocessor_config.json, tokenizer.json, *.safetensors with
vpm.*, resampler.* and llm.*), of which the demo model is a true miniature; and a board's folder, which has the same
JSON files and, instead of the weights, what its mmchat.json names: the *.rkllm model, the embedding table, the encoder.
Without mmchat.json the files are found by their kind (mmchat.board_files), and the encoder is one for a fixed square.
And an OpenVINO folder as optimum-intel writes it, which has four models (IR_FILES) instead of the weights.

This module reads JSON and tensor headers only; it loads no weights and knows no engine.  Sizes of a board's files are
compared with mmchat.json whenever it is opened, digests only when asked for (check_digests): 8 GB take a minute.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from mmchat import half_made
from mmchat.board_files import board_files, file_mark
from mmchat.checkpoint import Checkpoint, read_header, weight_files
from mmchat.engine import Sampling
from mmchat.errors import ModelDirError, PromptError
from mmchat.rknn_file import RknnFile, read_rknn
from mmchat.slicing import Size, SlicePlan, plan_slices

DEMO = "demo"
# The end of a sentence about the CPU engine.
OPENVINO_CURE = (
    "which needs the package openvino: pip install openvino (on aarch64 its wheels need glibc 2.35: Ubuntu 22.04, "
    "Debian 12)"
)
BOARD_FILE = "mmchat.json"
# Rows of RKLLM's context that are never used: its own check leaves 4 free, and a shift must not happen.
MARGIN_ROWS = 32
POSITIONS = "vpm.embeddings.position_embedding.weight"
# An OpenVINO folder's models: each is NAME.xml and NAME.bin.
IR_FILES = {
    "text_embeddings": "openvino_text_embeddings_model",
    "vision": "openvino_vision_embeddings_model",
    "resampler": "openvino_resampler_model",
    "llm": "openvino_language_model",
}
_VISION_MODES = ("openvino", "navit", "square")
# Of Lite2's NPU_CORE_*.  The encoder has the NPU for itself; three cores took 3.2 s where one took 4.8 (reported).
_CORES = ("auto", "0", "1", "2", "0_1", "0_1_2", "all")
_DEFAULT_CORES = "0_1_2"
_TABLE_HINT = (
    "mmchat convert table CHECKPOINT {} makes it from the published checkpoint; "
    "mmchat pull --only table fetches no more than it"
)
_HINTS = {
    "llm": "mmchat convert llm-rkllm makes it on a PC, with rkllm-toolkit; copy it here",
    "embed_table": _TABLE_HINT,
    "vision": "copy the encoder here; mmchat convert vision-rknn makes one on a PC",
}
_JSON_HINT = "huggingface-cli download openbmb/MiniCPM-V-2_6 {} --local-dir {} fetches that"
# What a *.rkllm allows without telling: a guess, which rkllm_init refuses where it is too much.
_FOUND_CONTEXT_ROWS = 4096
_POSITIONS_HINT = f"copy the safetensors file here that has {POSITIONS}; the published checkpoint's shard will do"
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

    def plan(self, size: Size, max_slice_nums: int | None = None) -> SlicePlan:
        """Of a picture (width, height).  max_slice_nums: instead of the model's.  Raises ImageError."""
        return plan_slices(
            *size,
            max_slice_nums=self.max_slice_nums if max_slice_nums is None else max_slice_nums,
            scale_resolution=self.scale_resolution,
            patch_size=self.patch_size,
            max_patches=self.max_patches,
        )


@dataclass(frozen=True)
class RknnSpec:
    """An encoder for the NPU (mmchat.rknn_vision says what it takes and gives).

    cores: which of the NPU's, as Lite2 names them (NPU_CORE_...).
    n_patches, positions_path: of a navit encoder, the patches of its inputs, and the safetensors file with the table
    of learned positions.  side: of a square encoder's picture, in pixels.
    """

    cores: str
    n_patches: int = 0
    positions_path: Path | None = None
    side: int = 0


@dataclass(frozen=True)
class BoardSpec:
    """What a board's folder has instead of a checkpoint's weights.

    vision_mode: "openvino" (tensors, for the CPU), "navit" or "square" (*.rknn, with what rknn says).
    base_domain: RKLLM's base_domain_id.  stop_ids: empty where nothing says them but the tokenizer.
    digests: SHA-256 of the files, by name; "" where it is not known.
    """

    llm_path: Path
    table_path: Path
    vision_path: Path
    vision_mode: str
    base_domain: int
    stop_ids: frozenset[int]
    digests: Mapping[str, str]
    rknn: RknnSpec | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A folder that was found complete.  board: set where its LLM is RKLLM's.

    openvino: set where it is an OpenVINO folder; its models by the names of IR_FILES.
    """

    folder: Path
    name: str
    llm: LlmSpec
    vision: VisionSpec
    slices: SliceSpec
    use_image_id: bool
    sampling: Sampling = field(default_factory=Sampling)
    board: BoardSpec | None = None
    openvino: Mapping[str, Path] | None = None

    @property
    def context_rows(self) -> int:
        """Rows that a prompt and its answer may take together."""
        return self.llm.context_rows - (MARGIN_ROWS if self.board else 0)

    def context_of(self, rows: int | None) -> int:
        """The context that is asked for; None is the model's.  Raises ModelDirError: none, or more than it has."""
        if rows is not None and rows < 1:
            raise ModelDirError(f"context_rows is {rows}; it must be at least 1")
        if rows is not None and rows > self.context_rows:
            raise ModelDirError(f"context_rows is {rows}; {self.name} has {self.context_rows}")
        return rows or self.context_rows

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @cached_property
    def embed_table_path(self) -> Path:
        """The file that holds the token embedding rows."""
        if self.board:
            return self.board.table_path
        if self.openvino:
            return self.openvino["text_embeddings"]
        return Checkpoint(self.folder).file("llm.model.embed_tokens.weight").path

    @cached_property
    def encoder_digest(self) -> str:
        """SHA-256 over the vision tensors and their dimensions: other weights, other embeddings."""
        if self.board and self.board.rknn:
            files = [path for path in (self.board.vision_path, self.board.rknn.positions_path) if path]
            marks = (self.board.digests.get(path.name) or file_mark(path) for path in files)
            text = " ".join([self.board.vision_mode, *marks])
            return hashlib.sha256(text.encode()).hexdigest()
        if self.openvino:
            return _ir_digest([self.openvino["vision"], self.openvino["resampler"]])
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
    return Path(__file__).parent / DEMO if str(name) == DEMO else Path(os.path.abspath(os.path.expanduser(name)))


def open_model(name: str | Path) -> ModelSpec:
    """The model "demo", or a folder.

    Raises ModelDirError: no such folder, files missing, or values that do not fit together.
    """
    folder = model_folder(name)
    if not folder.is_dir():
        raise ModelDirError(f'{folder}: no such model folder (give a folder, or "demo" for the built-in model)')
    if half := half_made.look(folder):
        raise ModelDirError(f"{half.what}; {half.cure}")
    needed = ("config.json", "preprocessor_config.json", "tokenizer.json")
    missing = [file for file in needed if not (folder / file).is_file()]
    is_board = (folder / BOARD_FILE).is_file()
    models = None if is_board else _ir_files(folder)
    found = None if is_board or models else board_files(folder)
    if missing and is_board:
        raise ModelDirError(f"{folder}: lacks {', '.join(missing)}: copy them here from the published checkpoint")
    if found:
        _check_found(folder, found, missing)
    if missing:
        raise ModelDirError(
            f"{folder}: lacks {', '.join(missing)}; a model folder is a checkpoint as published: "
            f"{', '.join(needed)} and *.safetensors"
        )
    if not is_board and not found and not models:
        weight_files(folder)
    config = _Json(folder / "config.json")
    processor = _Json(folder / "preprocessor_config.json")
    llm, tower = _llm(config), _tower(config)
    slices = SliceSpec(
        max_slice_nums=processor.integer("max_slice_nums"),
        scale_resolution=processor.integer("scale_resolution"),
        patch_size=processor.integer("patch_size"),
        max_patches=_CPU_MAX_PATCHES,
    )
    _check_fit(config, llm, tower, slices)
    spec = ModelSpec(
        folder=folder,
        name=DEMO if str(name) == DEMO else folder.name,
        llm=llm,
        vision=tower,
        slices=slices,
        use_image_id=bool(config.values.get("use_image_id", True)),
        sampling=_sampling(folder / "generation_config.json"),
        openvino=models,
    )
    if found:
        return _with_found(spec, {part: path for part, path in found.items() if path})
    return _with_board(spec, _Json(folder / BOARD_FILE)) if is_board else spec


def _llm(config: _Json) -> LlmSpec:
    return LlmSpec(
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        n_layers=config.integer("num_hidden_layers"),
        n_heads=config.integer("num_attention_heads"),
        n_kv_heads=config.integer("num_key_value_heads"),
        vocab_size=config.integer("vocab_size"),
        context_rows=config.integer("max_position_embeddings"),
        rope_theta=config.number("rope_theta"),
        rms_norm_eps=config.number("rms_norm_eps"),
    )


def _tower(config: _Json) -> VisionSpec:
    vision, output_size = config.inner("vision_config"), config.integer("hidden_size")
    patch_size = vision.integer("patch_size")
    return VisionSpec(
        hidden_size=vision.integer("hidden_size"),
        intermediate_size=vision.integer("intermediate_size"),
        n_layers=vision.integer("num_hidden_layers"),
        n_heads=vision.integer("num_attention_heads"),
        patch_size=patch_size,
        position_side=vision.integer("image_size") // patch_size,
        query_num=config.integer("query_num"),
        output_size=output_size,
        # The published code derives it; small models need another value and say so.
        resampler_heads=config.integer("resampler_num_heads", max(1, output_size // 128)),
    )


def _check_fit(config: _Json, llm: LlmSpec, tower: VisionSpec, slices: SliceSpec) -> None:
    """Raises ModelDirError: values that do not fit together."""
    patch_size = tower.patch_size
    for good, problem in (
        (config.values.get("model_type") == "minicpmv", f"model_type is {config.values.get('model_type')!r}"),
        (llm.hidden_size % llm.n_heads == 0 and llm.n_heads % llm.n_kv_heads == 0, "attention heads do not divide"),
        (tower.hidden_size % tower.n_heads == 0, "vision attention heads do not divide"),
        (tower.output_size % tower.resampler_heads == 0, "resampler heads do not divide"),
        (tower.position_side >= 1, f"image_size is below the patch size of {patch_size}"),
        (slices.scale_resolution >= patch_size, f"scale_resolution is below the patch size of {patch_size}"),
        (slices.patch_size == patch_size, f"patch_size is {patch_size} here and {slices.patch_size} in the processor"),
    ):
        if not good:
            raise ModelDirError(f"{config.path}: {problem}; a MiniCPM-V-2.6 model is needed")


def _ir_files(folder: Path) -> dict[str, Path] | None:
    """The models of an OpenVINO folder; None where it is none.  Raises ModelDirError: some files are missing."""
    paths = {part: folder / f"{name}.xml" for part, name in IR_FILES.items()}
    if not paths["llm"].is_file():
        return None
    files = [path.with_suffix(suffix) for path in paths.values() for suffix in (".xml", ".bin")]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelDirError(
            f"{folder}: an OpenVINO folder that lacks {', '.join(missing)}; copy them here, or make it anew: "
            "mmchat convert openvino CHECKPOINT DIR"
        )
    return paths


def _ir_digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for file in (path, path.with_suffix(".bin")):
            with file.open("rb") as opened:
                digest.update(_sha256(opened).encode())
    return digest.hexdigest()


def _check_found(folder: Path, found: Mapping[str, Path | None], missing: Sequence[str]) -> None:
    """Raises ModelDirError: everything that a board's folder without mmchat.json lacks, with what makes it."""
    table, names = folder / "embed_tokens.safetensors", " ".join(missing)
    lacks = [f"{', '.join(missing)} ({_JSON_HINT.format(names, shlex.quote(str(folder)))})"] if missing else []
    if not found["embed_table"]:
        lacks.append(f"the embedding table ({_HINTS['embed_table'].format(table)})")
    if not found["vision"]:
        lacks.append("vision_transformer.rknn (copy it here; mmchat convert board makes a folder with an exact one)")
    if lacks:
        raise ModelDirError(f"{folder}: has a model for RKLLM, but lacks {'; '.join(lacks)}")


def _with_found(spec: ModelSpec, paths: Mapping[str, Path]) -> ModelSpec:
    """The spec of a board's folder without mmchat.json.

    Raises ModelDirError: the encoder is not one for a square picture.
    """
    file = read_rknn(paths["vision"])
    inputs = file.inputs
    if inputs and len(inputs[0][1]) != 4:
        raise ModelDirError(
            f"{paths['vision']}: takes {_by([shape for _, shape in inputs])}, not a square picture; an encoder of "
            f"mmchat's needs the {BOARD_FILE} that was written with it"
        )
    # (1, 3, side, side) or (1, side, side, 3)
    side = inputs[0][1][2] if inputs else spec.slices.scale_resolution
    _check_shapes(paths["vision"], file, spec, [(1, side, side, 3)])
    board = BoardSpec(
        llm_path=paths["llm"],
        table_path=paths["embed_table"],
        vision_path=paths["vision"],
        vision_mode="square",
        base_domain=1,
        stop_ids=frozenset(),
        digests={},
        rknn=RknnSpec(_DEFAULT_CORES, side=side),
    )
    context_rows = min(_FOUND_CONTEXT_ROWS, spec.llm.context_rows)
    return replace(spec, llm=replace(spec.llm, context_rows=context_rows), board=board)


def check_digests(spec: ModelSpec, progress: Callable[[str], None] = lambda name: None) -> None:
    """Read every file of a board's folder once.  progress: called with each name before it is read.

    Raises ModelDirError: a file is not the one that mmchat.json describes.
    """
    for name, wanted in spec.board.digests.items() if spec.board else ():
        if not wanted:
            continue
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
        digests[name] = str(info.values.get("sha256") or "")
        _check_size(spec.folder / name, info.integer("bytes"), config)
    paths = {part: _board_file(config, part, config.inner(part).values.get("file"), digests) for part in _HINTS}
    slices = config.inner("slices")
    rknn = _rknn(spec, vision, paths["vision"], digests) if mode != "openvino" else None
    max_patches = slices.integer("max_patches", (rknn and rknn.n_patches) or spec.slices.max_patches)
    if rknn and rknn.n_patches and max_patches > rknn.n_patches:
        raise ModelDirError(
            f"{config.path}: slices.max_patches is {max_patches}, but vision.patches, the encoder's, {rknn.n_patches}"
        )
    board = BoardSpec(
        llm_path=paths["llm"],
        table_path=paths["embed_table"],
        vision_path=paths["vision"],
        vision_mode=str(mode),
        base_domain=llm.integer("base_domain_id", 1, low=0),
        stop_ids=frozenset(config.integers("stop_ids")),
        digests=digests,
        rknn=rknn,
    )
    return replace(
        spec,
        name=str(values.get("name", spec.name)),
        llm=replace(spec.llm, context_rows=context_rows),
        slices=replace(spec.slices, max_patches=max_patches),
        board=board,
    )


def _rknn(spec: ModelSpec, vision: _Json, path: Path, digests: Mapping[str, str]) -> RknnSpec:
    """What mmchat.json says of an encoder for the NPU.

    Raises ModelDirError: a value is missing or impossible, or a file is not what it should be.
    """
    cores = str(vision.values.get("cores", _DEFAULT_CORES))
    if cores not in _CORES:
        raise ModelDirError(f"{vision.path}: vision.cores is {cores!r}; known are {', '.join(_CORES)}")
    file = read_rknn(path)
    if vision.values["mode"] == "square":
        side = vision.integer("side", spec.slices.scale_resolution)
        _check_shapes(path, file, spec, [(1, side, side, 3)])
        return RknnSpec(cores, side=side)
    table_path = _board_file(vision, "vision", vision.values.get("positions"), digests, key="positions")
    info, shape = read_header(table_path).get(POSITIONS), (spec.vision.position_side**2, spec.vision.hidden_size)
    if info is None or info.shape != shape or info.dtype not in ("F32", "F16", "BF16"):
        found = f"{info.dtype} {info.shape}" if info else "not there"
        raise ModelDirError(f"{table_path}: {POSITIONS} is {found}; floats of {shape} are needed")
    n, tower = vision.integer("patches"), spec.vision
    widths = 3 * tower.patch_size**2, tower.hidden_size, tower.output_size
    _check_shapes(path, file, spec, [(1, n, widths[0]), (1, n, widths[1]), (1, 1, n), (1, n, widths[2])])
    return RknnSpec(cores, n_patches=n, positions_path=table_path)


def _check_shapes(path: Path, file: RknnFile, spec: ModelSpec, wanted: list[tuple[int, ...]]) -> None:
    """Raises ModelDirError where the file tells of other inputs or outputs; Lite2 itself would not look."""
    inputs, outputs = ([shape for _, shape in side] for side in (file.inputs, file.outputs))
    pictures = [(one[0], one[3], one[1], one[2]) if len(one) == 4 else one for one in wanted]  # as in ONNX, NCHW
    output = (spec.vision.query_num, spec.vision.output_size)
    if inputs and inputs not in (wanted, pictures):
        raise ModelDirError(f"{path}: takes {_by(inputs)}; by mmchat.json and config.json it would be {_by(wanted)}")
    if outputs and outputs not in ([output], [(1, *output)]):
        raise ModelDirError(f"{path}: gives {_by(outputs)}; by config.json it would be {_by([(1, *output)])}")


def _by(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _board_file(config: _Json, part: str, name: object, digests: Mapping[str, str], *, key: str = "file") -> Path:
    if not isinstance(name, str) or name not in digests:
        raise ModelDirError(f'{config.path}: {part}.{key} is {name!r}, which its "files" does not list')
    return config.path.parent / name


def _check_size(path: Path, n_bytes: int, config: _Json) -> None:
    try:
        found = path.stat().st_size
    except (OSError, ValueError):  # ValueError: no file can have that name
        parts = [part for part in _HINTS if config.inner(part).values.get("file") == path.name]
        hint = f"; {_HINTS[parts[0]].format(path.name)}" if parts else ""
        if config.inner("vision").values.get("positions") == path.name:
            hint = f"; {_POSITIONS_HINT}"
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


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelDirError: it cannot be read, or is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelDirError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ModelDirError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelDirError(f"{path}: not a JSON object")
    return values


class _Json:
    """A JSON object whose values are taken by name and type."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        self.path = path
        self.values = read_json(path) if values is None else values

    def inner(self, name: str) -> _Json:
        value = self.values.get(name)
        if not isinstance(value, dict):
            of = "a board's folder" if self.path.name == BOARD_FILE else "MiniCPM-V-2.6's config"
            raise ModelDirError(f"{self.path}: has no {name!r}; this is not {of}")
        return _Json(self.path, value)

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a whole number >= {low} is needed")
        return value

    def integers(self, name: str) -> list[int]:
        """[] where it is not there."""
        value = self.values.get(name, [])
        if not isinstance(value, list) or any(type(number) is not int or number < 0 for number in value):
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a list of whole numbers >= 0 is needed")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a number above 0 is needed")
        return float(value)
