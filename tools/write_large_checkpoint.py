"""Write a checkpoint with the real MiniCPM-V-2.6's dimensions, files and tensor names, but not its weights.

    python -m tools.write_large_checkpoint DIR                                # 16 GB of holes, which take no room
    python -m tools.write_large_checkpoint DIR --random vpm. resampler.      # random vision tower, 1 GB of room
    python -m tools.write_large_checkpoint DIR --layers 4 --random llm. --vocab 151666

To see what a command does with files of that size: time, memory, disk.  bfloat16, in four shards as published (a new
one begins where 4.9 GB are full), with an index and the JSON files; the tokenizer is the demo's.  Tensors named by
--random are normal with a small deviation (norms: near 1), the others zero.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmchat.checkpoint import build_header, write_atomic
from mmchat.model_dir import model_folder

_SHARD_BYTES = 4_900_000_000
_BLOCK = 1 << 20
VISION_LAYERS, VISION_WIDTH, VISION_INNER, SIDE = 27, 1152, 4304, 70
WIDTH, INNER, KV_WIDTH, QUERIES = 3584, 18944, 512, 64


def tensors(n_layers: int, vocab: int, vision_layers: int = VISION_LAYERS) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the published order."""
    found: dict[str, tuple[int, ...]] = {"llm.model.embed_tokens.weight": (vocab, WIDTH)}
    for i in range(n_layers):
        layer = f"llm.model.layers.{i}"
        for name, n_out in (("q", WIDTH), ("k", KV_WIDTH), ("v", KV_WIDTH)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (n_out, WIDTH)
            found[f"{layer}.self_attn.{name}_proj.bias"] = (n_out,)
        found[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        found[f"{layer}.mlp.gate_proj.weight"] = found[f"{layer}.mlp.up_proj.weight"] = (INNER, WIDTH)
        found[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (WIDTH,)
    found["llm.model.norm.weight"] = (WIDTH,)
    found["llm.lm_head.weight"] = (vocab, WIDTH)
    found["vpm.embeddings.patch_embedding.weight"] = (VISION_WIDTH, 3, 14, 14)
    found["vpm.embeddings.patch_embedding.bias"] = (VISION_WIDTH,)
    found["vpm.embeddings.position_embedding.weight"] = (SIDE * SIDE, VISION_WIDTH)
    for i in range(vision_layers):
        layer = f"vpm.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = (VISION_WIDTH, VISION_WIDTH)
            found[f"{layer}.self_attn.{name}.bias"] = (VISION_WIDTH,)
        for name, n_out, n_in in (("fc1", VISION_INNER, VISION_WIDTH), ("fc2", VISION_WIDTH, VISION_INNER)):
            found[f"{layer}.mlp.{name}.weight"], found[f"{layer}.mlp.{name}.bias"] = (n_out, n_in), (n_out,)
        for name in ("layer_norm1", "layer_norm2"):
            found[f"{layer}.{name}.weight"] = found[f"{layer}.{name}.bias"] = (VISION_WIDTH,)
    found["vpm.post_layernorm.weight"] = found["vpm.post_layernorm.bias"] = (VISION_WIDTH,)
    found["resampler.query"], found["resampler.proj"] = (QUERIES, WIDTH), (WIDTH, WIDTH)
    found["resampler.kv_proj.weight"] = (WIDTH, VISION_WIDTH)
    found["resampler.attn.in_proj_weight"], found["resampler.attn.in_proj_bias"] = (3 * WIDTH, WIDTH), (3 * WIDTH,)
    found["resampler.attn.out_proj.weight"], found["resampler.attn.out_proj.bias"] = (WIDTH, WIDTH), (WIDTH,)
    for name in ("ln_q", "ln_kv", "ln_post"):
        found[f"resampler.{name}.weight"] = found[f"resampler.{name}.bias"] = (WIDTH,)
    return found


def config(n_layers: int, vocab: int, vision_layers: int = VISION_LAYERS) -> dict[str, Any]:
    return {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "version": 2.6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 32768,
        "num_attention_heads": WIDTH // 128,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": KV_WIDTH // 128,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "query_num": QUERIES,
        "use_image_id": True,
        "vision_config": {
            "model_type": "siglip",
            "hidden_size": VISION_WIDTH,
            "image_size": 14 * SIDE,
            "intermediate_size": VISION_INNER,
            "num_attention_heads": 16,
            "num_hidden_layers": vision_layers,
            "patch_size": 14,
        },
    }


def write(folder: Path, *, n_layers: int, vocab: int, vision_layers: int, random: tuple[str, ...]) -> list[Path]:
    """Write everything; the weight files, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensors(n_layers, vocab, vision_layers)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(prod, shards[-1].values())) * 2 + 2 * prod(shape) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        _write_shard(path, shard, random)
    index = {
        "metadata": {"total_size": 2 * sum(map(prod, shapes.values()))},
        "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
    }
    processor = json.loads((model_folder("demo") / "preprocessor_config.json").read_text())
    processor.update(scale_resolution=448, image_feature_size=QUERIES)
    for name, value in (
        ("model.safetensors.index.json", index),
        ("config.json", config(n_layers, vocab, vision_layers)),
        ("preprocessor_config.json", processor),
    ):
        (folder / name).write_text(json.dumps(value, indent=2))
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(model_folder("demo") / name, folder / name)
    return paths


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: tuple[str, ...]) -> None:
    def fill(file: IO[bytes]) -> None:
        file.write(build_header({name: ("BF16", shape, 2 * prod(shape)) for name, shape in shapes.items()}))
        for number, (name, shape) in enumerate(shapes.items()):
            if random and name.startswith(random):
                for block in _values(name, prod(shape), number):
                    file.write(block)
            else:
                file.seek(2 * prod(shape), 1)
        file.truncate()

    write_atomic(path, fill)


def _values(name: str, n: int, seed: int) -> Iterator[bytes]:
    """bfloat16, n of them: such that a model of any depth stays finite and its outputs differ."""
    rng = np.random.default_rng(seed)
    is_norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
    while n:
        values = rng.standard_normal(min(n, _BLOCK), np.float32) * np.float32(0.02) + np.float32(is_norm)
        n -= len(values)
        yield (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vision-layers", type=int, default=VISION_LAYERS)
    parser.add_argument("--vocab", type=int, default=151666)
    parser.add_argument("--random", nargs="*", default=[], metavar="PREFIX", help="tensors that get random values")
    given = parser.parse_args()
    paths = write(
        given.folder,
        n_layers=given.layers,
        vocab=given.vocab,
        vision_layers=given.vision_layers,
        random=tuple(given.random),
    )
    status = [path.stat() for path in paths]
    size, room = sum(s.st_size for s in status) / 1e9, sum(s.st_blocks * 512 for s in status) / 1e9
    print(f"{given.folder}: {len(paths)} files, {size:.2f} GB, {room:.2f} GB of the disk")


if __name__ == "__main__":
    main()
