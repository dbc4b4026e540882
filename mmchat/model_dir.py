"""A model folder -> ModelSpec: what it is, what it lacks, and every number that other modules need.

Opened here: the published checkpoint layout (config.json, preprocessor_config.json, tokenizer.json, *.safetensors with
vpm.*, resampler.* and llm.*), of which the demo model is a true miniature.

This module reads JSON and tensor headers only; it loads no weights and knows no engine.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmchat.checkpoint import Checkpoint
from mmchat.engine import Sampling
from mmchat.errors import ModelDirError, PromptError

DEMO = "demo"
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
class ModelSpec:
    """A folder that was found complete."""

    folder: Path
    name: str
    llm: LlmSpec
    vision: VisionSpec
    slices: SliceSpec
    use_image_id: bool
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @cached_property
    def embed_table_path(self) -> Path:
        """The file that holds the token embedding rows."""
        return Checkpoint(self.folder).file("llm.model.embed_tokens.weight").path

    @cached_property
    def encoder_digest(self) -> str:
        """SHA-256 over the vision tensors and their dimensions: other weights, other embeddings."""
        checkpoint = Checkpoint(self.folder)
        digest = hashlib.sha256(json.dumps(asdict(self.vision), sort_keys=True).encode())
        for name in sorted(checkpoint):
            if name.startswith(("vpm.", "resampler.")):
                info = checkpoint.info(name)
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                digest.update(checkpoint.array(name).data)
        return digest.hexdigest()


def open_model(name: str | Path) -> ModelSpec:
    """The model "demo", or a folder.

    Raises ModelDirError: no such folder, files missing, or values that do not fit together.
    """
    folder = Path(__file__).parent / DEMO if str(name) == DEMO else Path(name).expanduser()
    if not folder.is_dir():
        raise ModelDirError(f'{folder}: no such model folder (give a folder, or "demo" for the built-in model)')
    needed = ("config.json", "preprocessor_config.json", "tokenizer.json")
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise ModelDirError(
            f"{folder}: lacks {', '.join(missing)}; a model folder is a checkpoint as published: "
            f"{', '.join(needed)} and *.safetensors"
        )
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
        (slices.patch_size == patch_size, f"patch_size is {patch_size} here and {slices.patch_size} in the processor"),
    ):
        if not good:
            raise ModelDirError(f"{config.path}: {problem}; a MiniCPM-V-2.6 model is needed")
    return ModelSpec(
        folder=folder,
        name=DEMO if str(name) == DEMO else folder.name,
        llm=llm,
        vision=tower,
        slices=slices,
        use_image_id=bool(config.values.get("use_image_id", True)),
        sampling=_sampling(folder / "generation_config.json"),
    )


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
            except ValueError as error:
                raise ModelDirError(f"{path}: not JSON ({error})") from None
            if not isinstance(values, dict):
                raise ModelDirError(f"{path}: not a JSON object")
        self.values = values

    def inner(self, name: str) -> _Json:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise ModelDirError(f"{self.path}: has no {name!r}; this is not MiniCPM-V-2.6's config")
        return _Json(self.path, value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a whole number >= 1 is needed")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ModelDirError(f"{self.path}: {name!r} is {value!r}; a number above 0 is needed")
        return float(value)
