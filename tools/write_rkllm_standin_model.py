"""Write a checkpoint's LLM as the file that the stand-in library loads as its "rkllm" model.

    python tools/write_rkllm_standin_model.py CHECKPOINT MODEL.rkllm

The stand-in (tests/rkllm_standin) is for tests: it is not Rockchip's runtime, the file is not one of RKLLM's, and the
real library cannot load it.  Little-endian: the header (`_HEADER`), stop ids (i32), where each token's text begins
(u32, one more than tokens), one byte per token (1: special), the texts, zeros up to a multiple of 64; then float32
tensors without names in the order of `_tensors`, matrices as `_panels` lays them out.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint, write_atomic
from mmchat.errors import ModelDirError
from mmchat.model_dir import LlmSpec, open_model
from mmchat.prompt import ChatTokenizer

# magic; hidden, inner, layers, heads, kv heads, head size; tokens, head columns, stop ids, context; eps; where the
# tensors begin; bytes of the file
_HEADER = struct.Struct("<8s6I4IfIQ")
_MAGIC = b"RKSTAND1"
_COLUMNS = 16  # the library multiplies so many columns at a time


def write_model(checkpoint: str | Path, path: str | Path) -> None:
    """Raises ModelDirError: no MiniCPM-V-2.6 checkpoint, or dimensions that the stand-in has no loops for."""
    spec = open_model(checkpoint)
    llm, tensors = spec.llm, Checkpoint(spec.folder)
    tokenizer = ChatTokenizer(spec.tokenizer_path)
    n_tokens = tokenizer.n_ids  # a padded table has more rows; no engine chooses those
    widths = (llm.hidden_size, llm.intermediate_size, llm.n_kv_heads * llm.head_size)
    if llm.head_size % 8 or any(width % _COLUMNS for width in widths):
        raise ModelDirError(f"{checkpoint}: widths {widths} and heads of {llm.head_size} are no multiples of 16 and 8")
    texts = [tokenizer.token_bytes(i) for i in range(n_tokens)]
    special = bytes(i in tokenizer.special.values() for i in range(n_tokens))
    stop_ids = sorted(tokenizer.stop_ids)
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4")
    head = np.array(stop_ids, "<i4").tobytes() + ends.tobytes() + special + b"".join(texts)
    tensors_at = -(-(_HEADER.size + len(head)) // 64) * 64
    arrays = [array.astype("<f4").tobytes() for array in _tensors(tensors, llm, n_tokens)]
    header = _HEADER.pack(
        _MAGIC,
        *(llm.hidden_size, llm.intermediate_size, llm.n_layers, llm.n_heads, llm.n_kv_heads, llm.head_size),
        *(n_tokens, _padded(n_tokens), len(stop_ids), llm.context_rows, llm.rms_norm_eps),
        *(tensors_at, tensors_at + sum(map(len, arrays))),
    )

    def write(file: IO[bytes]) -> None:
        file.write((header + head).ljust(tensors_at, b"\0"))
        file.writelines(arrays)

    write_atomic(Path(path), write)


def _tensors(checkpoint: Checkpoint, spec: LlmSpec, n_tokens: int) -> Iterator[NDArray[np.float32]]:
    exponents = np.arange(0, spec.head_size, 2, dtype=np.float32) / spec.head_size
    yield (1.0 / spec.rope_theta**exponents).astype(np.float32)
    table = checkpoint.float32("llm.model.embed_tokens.weight")[:n_tokens]
    yield table
    for layer in range(spec.n_layers):
        prefix = f"llm.model.layers.{layer}"
        yield checkpoint.float32(f"{prefix}.input_layernorm.weight")
        for name in "qkv":
            weight = checkpoint.float32(f"{prefix}.self_attn.{name}_proj.weight")
            yield _panels(weight)
            bias = f"{prefix}.self_attn.{name}_proj.bias"
            yield checkpoint.float32(bias) if bias in checkpoint else np.zeros(len(weight), np.float32)
        yield _panels(checkpoint.float32(f"{prefix}.self_attn.o_proj.weight"))
        yield checkpoint.float32(f"{prefix}.post_attention_layernorm.weight")
        for name in ("gate", "up", "down"):
            yield _panels(checkpoint.float32(f"{prefix}.mlp.{name}_proj.weight"))
    yield checkpoint.float32("llm.model.norm.weight")
    tied = "llm.lm_head.weight" not in checkpoint
    head = table if tied else checkpoint.float32("llm.lm_head.weight")[:n_tokens]
    yield _panels(np.pad(head, ((0, _padded(n_tokens) - n_tokens), (0, 0))))


def _panels(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(outputs, inputs) -> (outputs / 16, inputs, 16): what the inner loop reads is then in one piece."""
    panels: NDArray[np.float32] = weight.reshape(-1, _COLUMNS, weight.shape[1]).transpose(0, 2, 1)
    return panels


def _padded(n: int) -> int:
    return -(-n // _COLUMNS) * _COLUMNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help='a MiniCPM-V-2.6 checkpoint folder, or "demo"')
    parser.add_argument("path", type=Path, help="the file to write")
    options = parser.parse_args()
    write_model(options.checkpoint, options.path)


if __name__ == "__main__":
    main()
