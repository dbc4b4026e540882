"""SigLIP's tower and MiniCPM-V's resampler in numpy, float32; written for itself, not from mmchat's graph."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def encode(w: dict[str, Array], model: dict[str, Any], patches: Array, rows: Array, mask: Array, keys: Array) -> Array:
    """patches (1, N, 3 * patch²), rows (1, N, hidden), mask (1, 1, N), keys (1, N, D) -> (1, Q, D)."""
    x = _linear(w, "vpm.embeddings.patch_embedding", patches[0]) + rows[0]
    for layer in range(model["n_layers"]):
        prefix = f"vpm.encoder.layers.{layer}"
        normed = _norm(w, f"{prefix}.layer_norm1", x)
        q, k, v = (_linear(w, f"{prefix}.self_attn.{name}_proj", normed) for name in "qkv")
        x = x + _linear(w, f"{prefix}.self_attn.out_proj", _attend(q, k, v, mask[0], model["n_heads"]))
        inner = _gelu(_linear(w, f"{prefix}.mlp.fc1", _norm(w, f"{prefix}.layer_norm2", x)))
        x = x + _linear(w, f"{prefix}.mlp.fc2", inner)
    x = _norm(w, "vpm.post_layernorm", x)

    values = _norm(w, "resampler.ln_kv", x @ w["resampler.kv_proj.weight"].T)
    queries = _norm(w, "resampler.ln_q", w["resampler.query"])
    width = values.shape[1]
    weights = w["resampler.attn.in_proj_weight"].reshape(3, width, width)
    biases = w["resampler.attn.in_proj_bias"].reshape(3, width)
    q, k, v = (a @ weights[i].T + biases[i] for i, a in enumerate((queries, values + keys[0], values)))
    attended = _linear(w, "resampler.attn.out_proj", _attend(q, k, v, mask[0], model["resampler_heads"]))
    return (_norm(w, "resampler.ln_post", attended) @ w["resampler.proj"])[None]


def encode_picture(w: dict[str, Array], model: dict[str, Any], picture: Array) -> Array:
    """(1, side, side, 3) RGB from 0 to 255 -> (1, Q, D): normalisation, positions and all are in the model."""
    side, size = picture.shape[1] // model["patch_size"], model["patch_size"]
    scaled = (picture[0] / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    tiles = scaled.reshape(side, size, side, size, 3).transpose(0, 2, 4, 1, 3).reshape(1, side * side, -1)
    mask = np.zeros((1, 1, side * side), np.float32)
    return encode(w, model, tiles, w["position_rows"][None], mask, w["key_positions"][None])


def _linear(w: dict[str, Array], name: str, x: Array) -> Array:
    weight = w[f"{name}.weight"]
    return x @ weight.reshape(len(weight), -1).T + w[f"{name}.bias"]


def _norm(w: dict[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(1e-6))
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attend(q: Array, k: Array, v: Array, mask: Array, n_heads: int) -> Array:
    """Rows of q attend to rows of k and v; mask (1, rows of k) is added to the scores."""
    q, k, v = (a.reshape(len(a), n_heads, -1).transpose(1, 0, 2) for a in (q, k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(q.shape[2])) + mask
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (scores / scores.sum(-1, keepdims=True)) @ v
    return attended.transpose(1, 0, 2).reshape(attended.shape[1], -1)


def _gelu(x: Array) -> Array:
    return x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x))) / 2
