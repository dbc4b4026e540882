"""The Qwen2 inside a MiniCPM-V checkpoint -> a plain Qwen2 folder, as transformers and rkllm-toolkit open it.

Tensors keep their bytes and lose the prefix `llm.`: headers are rewritten, data is copied, nothing is loaded.  Each
source file becomes one file, so that an interrupted run goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat.checkpoint import TensorInfo, blocks, read_header, weight_files, write_atomic, write_raw_tensors
from mmchat.convert.step import COPIED_BYTES_PER_S, Estimate, Progress
from mmchat.errors import ModelDirError
from mmchat.model_dir import read_json
from mmchat.outputs import Work, check_space, only_writer, stamp

_PREFIX = "llm."
_TABLE, _HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
_MEMORY = 100_000_000
# What of MiniCPM-V's config is Qwen2's.
_CONFIG_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Shard:
    """One file to write.  tensors: where they lie in the source, under their old names."""

    source: Path
    name: str
    tensors: dict[str, TensorInfo]

    @property
    def n_bytes(self) -> int:
        return sum(info.end - info.start for info in self.tensors.values())


@dataclass(frozen=True)
class Plan:
    folder: Path
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]

    @property
    def estimate(self) -> Estimate:
        n_bytes = sum(shard.n_bytes for shard in self.shards)
        return Estimate(n_bytes, n_bytes, _MEMORY, n_bytes / COPIED_BYTES_PER_S)


def plan(source: Path) -> Plan:
    """Raises ModelDirError: files missing or damaged, or no Qwen2 under `llm.`."""
    found = []
    for path in weight_files(source):
        tensors = {name: info for name, info in read_header(path).items() if name.startswith(_PREFIX)}
        if tensors:
            found.append((path, dict(sorted(tensors.items(), key=lambda item: item[1].start))))
    names = {name for _, tensors in found for name in tensors}
    if _TABLE not in names:
        raise ModelDirError(f"{source}: no tensor {_TABLE!r}: not a MiniCPM-V-2.6 checkpoint, or its LLM is missing")
    if not (source / "tokenizer.json").is_file():
        raise ModelDirError(f"{source}: lacks tokenizer.json; copy it here from the published checkpoint")
    config = _config(source, has_head=_HEAD in names)
    n_layers = len({name.split(".")[3] for name in names if name.startswith("llm.model.layers.")})
    if n_layers != config.get("num_hidden_layers"):
        raise ModelDirError(f"{source}: has {n_layers} layers of {config.get('num_hidden_layers')}; files are missing")
    n = len(found)
    shards = tuple(
        Shard(path, f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors", tensors)
        for i, (path, tensors) in enumerate(found, 1)
    )
    return Plan(source, shards, config, _tokenizer_config(source))


def run(plan: Plan, target: Path, progress: Progress) -> None:
    """Write the folder; interrupted, it goes on with the file where it was.

    Raises ModelDirError: a target with other files in it.  DiskFull.
    """
    if target.exists() and target.samefile(plan.folder):
        raise ModelDirError(f"{target}: is the checkpoint's own folder; give another one")
    texts = {name: (plan.folder / name).read_bytes() for name in _COPIED if (plan.folder / name).is_file()}
    texts["config.json"] = _json(plan.config)
    texts["tokenizer_config.json"] = _json(plan.tokenizer_config)
    if len(plan.shards) > 1:
        texts["model.safetensors.index.json"] = _json(_index(plan.shards))
    made_from = {shard.name: [shard.source.name, *stamp(shard.source)] for shard in plan.shards}
    with only_writer(target):
        work = Work(target, {"step": "llm-checkpoint", "shards": made_from})
        todo = [shard for shard in plan.shards if not work.has(shard.name)]
        for shard in todo:
            work.prepare(shard.name).unlink(missing_ok=True)
        check_space(target, sum(shard.n_bytes for shard in todo))
        total = sum(shard.n_bytes for shard in plan.shards)
        done = total - sum(shard.n_bytes for shard in todo)
        for shard in todo:
            _copy(shard, work.prepare(shard.name), lambda n, shard=shard: progress(shard.name, n, total), done)
            work.finish(shard.name)
            done += shard.n_bytes
        for name, content in texts.items():  # config.json comes when the weights are there
            path = work.prepare(name)
            write_atomic(path, lambda file, content=content: file.write(content))
            work.finish(name)


def _copy(shard: Shard, path: Path, progress: Any, done: int) -> None:
    def counted(info: TensorInfo) -> Iterator[bytes]:
        nonlocal done
        for block in blocks(shard.source, info):
            yield block
            done += len(block)
            progress(done)

    write_raw_tensors(
        path,
        {
            name.removeprefix(_PREFIX): (info.dtype, info.shape, info.end - info.start, counted(info))
            for name, info in shard.tensors.items()
        },
    )


def _index(shards: tuple[Shard, ...]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.n_bytes for shard in shards)},
        "weight_map": {name.removeprefix(_PREFIX): shard.name for shard in shards for name in sorted(shard.tensors)},
    }


def _config(source: Path, has_head: bool) -> dict[str, Any]:
    values = read_json(source / "config.json")
    if values.get("model_type") != "minicpmv":
        raise ModelDirError(f"{source / 'config.json'}: model_type is {values.get('model_type')!r}, not 'minicpmv'")
    config = {key: values[key] for key in _CONFIG_KEYS if key in values}
    if not has_head and not config.get("tie_word_embeddings", False):
        raise ModelDirError(f"{source}: no tensor {_HEAD!r}, which its config asks for (tie_word_embeddings)")
    config["tie_word_embeddings"] = not has_head
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **config}


def _tokenizer_config(source: Path) -> dict[str, Any]:
    """The checkpoint's, without its own Python class: tokenizer.json says all that there is to say."""
    path = source / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    values.pop("auto_map", None)
    return {**values, "tokenizer_class": "PreTrainedTokenizerFast"}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
