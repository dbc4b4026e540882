"""Record what transformers' Qwen2 says to some prompts, for tests/test_openvino_engine.py to compare with.

    python tools/record_logits.py            # writes tests/data/demo_logits.npz

Runs the demo model's llm.* weights in torch (float32, eager attention) from input embeddings: rows of the embedding
table, random rows as a picture would bring, and both.  Run it again when the weights change: the file carries their
digest.  Needs the extra "train" (torch, transformers).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint
from mmchat.model_dir import LlmSpec, open_model

TARGET = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo_logits.npz"

# Rows of each prompt: ids of the embedding table ("t") or random rows of its size ("r"), in this order.
PROMPTS = ("t1", "t7", "t40", "r1", "r16", "t9 r16 t12", "t3 r5 t1 r5 t20", "t300 r16 t30")


def weights_digest(folder: Path) -> str:
    """SHA-256 over the LLM's tensors."""
    checkpoint, digest = Checkpoint(folder), hashlib.sha256()
    for name in sorted(name for name in checkpoint if name.startswith("llm.")):
        info = checkpoint.info(name)
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(checkpoint.array(name).data)
    return digest.hexdigest()


def prompt(form: str, spec: LlmSpec, scale: float) -> list[NDArray[Any]]:
    """Its pieces: ids (n,) int16, or rows (n, hidden) float16 with the given standard deviation."""
    rng = np.random.default_rng(len(form))
    pieces: list[NDArray[Any]] = []
    for part in form.split():
        n = int(part[1:])
        if part[0] == "t":
            pieces.append(rng.integers(0, min(500, spec.vocab_size), n).astype(np.int16))
        else:
            pieces.append((scale * rng.standard_normal((n, spec.hidden_size))).astype(np.float16))
    return pieces


def reference_model(folder: Path) -> Any:
    """transformers' Qwen2ForCausalLM with the folder's llm.* weights."""
    import torch

    transformers: Any = importlib.import_module("transformers")  # its types change with every version
    spec, checkpoint = open_model(folder).llm, Checkpoint(folder)
    config = transformers.Qwen2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        max_position_embeddings=spec.context_rows,
        rope_theta=spec.rope_theta,
        rms_norm_eps=spec.rms_norm_eps,
        tie_word_embeddings="llm.lm_head.weight" not in checkpoint,
        attn_implementation="eager",
    )
    rope = getattr(config, "rope_parameters", None)
    assert rope is None or rope["rope_theta"] == spec.rope_theta, "transformers took another rope_theta"
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    weights = {
        name.removeprefix("llm."): torch.from_numpy(checkpoint.float32(name))
        for name in checkpoint
        if name.startswith("llm.")
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def reference_logits(model: Any, pieces: list[NDArray[Any]]) -> NDArray[np.float32]:
    """(vocab,) scores after the last row."""
    import torch

    rows = [
        model.model.embed_tokens(torch.from_numpy(piece.astype(np.int64)))
        if piece.ndim == 1
        else torch.from_numpy(piece.astype(np.float32))
        for piece in pieces
    ]
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0, -1]
    return np.asarray(logits.numpy(), np.float32)


def record(folder: Path, target: Path) -> None:
    spec, model = open_model(folder).llm, reference_model(folder)
    scale = float(Checkpoint(folder).float32("llm.model.embed_tokens.weight").std())
    arrays: dict[str, Any] = {"digest": np.array(weights_digest(folder))}
    for number, form in enumerate(PROMPTS):
        pieces = prompt(form, spec, scale)
        arrays[f"{number}.n"] = np.array(len(pieces))
        arrays[f"{number}.logits"] = reference_logits(model, pieces)
        arrays.update({f"{number}.{i}": piece for i, piece in enumerate(pieces)})
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, **arrays)
    print(f"{target}: {len(PROMPTS)} prompts, {target.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: the demo model)")
    parser.add_argument("--out", type=Path, default=TARGET)
    given = parser.parse_args()
    record(given.model or open_model("demo").folder, given.out)


if __name__ == "__main__":
    main()
