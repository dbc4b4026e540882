"""Checkpoint tensors -> OpenVINO models, with opsets: no torch, nothing to convert.

The LLM's inputs, outputs and states are those that optimum-intel exports, so a folder of its making is driven the
same way.  The exact shapes of the attention and rotation subgraphs matter: others compute the same but are not fused
on the CPU (5 times slower decoding; found with OpenVINO 2026.4.1).

This module knows no pictures, no prompts and no requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from mmchat.checkpoint import Checkpoint
from mmchat.model_dir import LlmSpec, VisionSpec

Node = Any  # openvino.Node: its Python bindings are untyped

_INT64_MAX = 2**63 - 1
_MASKED = np.float32(-3.4e38)


def cpu_properties(n_threads: int | None) -> dict[str, Any]:
    """How both models are compiled: the same numbers on every host (the defaults differ), one request at a time."""
    properties: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
    if n_threads:
        properties["INFERENCE_NUM_THREADS"] = n_threads
    return properties


def build_llm(checkpoint: Checkpoint, spec: LlmSpec) -> ov.Model:
    """Qwen2 with a stateful KV cache.

    inputs_embeds (1, n, hidden) f32; attention_mask (1, past + n) i64, all ones; position_ids (1, n) i64;
    beam_idx (1,) i32, zero.  Output logits (1, 1, vocab) f32: of the last position only.
    """
    embeds = _parameter([-1, -1, spec.hidden_size], ov.Type.f32, "inputs_embeds")
    mask = _parameter([-1, -1], ov.Type.i64, "attention_mask")
    positions = _parameter([-1, -1], ov.Type.i64, "position_ids")
    beams = _parameter([-1], ov.Type.i32, "beam_idx")

    batch = op.gather(op.shape_of(embeds), _i64([0]), _i64(0))
    empty_state = op.broadcast(
        _f32(0.0), op.concat([batch, _i64([spec.n_kv_heads]), _i64([0]), _i64([spec.head_size])], 0)
    )
    cos, sin = _rotation(positions, spec)
    causal = _causal_mask(mask, positions)
    sinks: list[Node] = []
    x: Node = embeds
    for layer in range(spec.n_layers):
        prefix = f"llm.model.layers.{layer}"
        normed = _rms_norm(x, checkpoint.float32(f"{prefix}.input_layernorm.weight"), spec.rms_norm_eps)
        attended = _attention(
            checkpoint, f"{prefix}.self_attn", normed, (cos, sin), causal, beams, empty_state, layer, spec, sinks
        )
        x = op.add(x, attended)
        normed = _rms_norm(x, checkpoint.float32(f"{prefix}.post_attention_layernorm.weight"), spec.rms_norm_eps)
        gate = op.swish(_linear(checkpoint, f"{prefix}.mlp.gate_proj", normed))
        up = _linear(checkpoint, f"{prefix}.mlp.up_proj", normed)
        x = op.add(x, _linear(checkpoint, f"{prefix}.mlp.down_proj", op.multiply(gate, up)))
    last = op.gather(x, _i64([-1]), _i64(1))  # before the output layer, which is the largest of all
    last = _rms_norm(last, checkpoint.float32("llm.model.norm.weight"), spec.rms_norm_eps)
    head = "llm.lm_head" if "llm.lm_head.weight" in checkpoint else "llm.model.embed_tokens"  # absent: tied
    logits = op.result(_linear(checkpoint, head, last))
    logits.get_output_tensor(0).set_names({"logits"})
    return ov.Model([logits], sinks, [embeds, mask, positions, beams], "llm")


def build_vision(checkpoint: Checkpoint, spec: VisionSpec) -> ov.Model:
    """SigLIP tower and resampler (inputs from mmchat.vision_inputs).

    patches (b, n, 3 * patch²), position_rows (b, n, hidden), key_mask (b, 1, 1, n) additive,
    key_positions (b, n, output_size), all f32.  Output embeddings (b, query_num, output_size) f32.
    """
    patches = _parameter([-1, -1, 3 * spec.patch_size**2], ov.Type.f32, "patches")
    position_rows = _parameter([-1, -1, spec.hidden_size], ov.Type.f32, "position_rows")
    key_mask = _parameter([-1, 1, 1, -1], ov.Type.f32, "key_mask")
    key_positions = _parameter([-1, -1, spec.output_size], ov.Type.f32, "key_positions")

    weight = checkpoint.float32("vpm.embeddings.patch_embedding.weight").reshape(spec.hidden_size, -1)
    bias = checkpoint.float32("vpm.embeddings.patch_embedding.bias")
    x: Node = op.add(op.add(op.matmul(patches, _f32(weight), False, True), _f32(bias)), position_rows)
    for layer in range(spec.n_layers):
        prefix = f"vpm.encoder.layers.{layer}"
        normed = _layer_norm(checkpoint, f"{prefix}.layer_norm1", x, spec.layer_norm_eps)
        queries, keys, values = (
            _heads(_linear(checkpoint, f"{prefix}.self_attn.{name}_proj", normed), spec.n_heads) for name in "qkv"
        )
        attended = _merge_heads(op.scaled_dot_product_attention(queries, keys, values, key_mask))
        x = op.add(x, _linear(checkpoint, f"{prefix}.self_attn.out_proj", attended))
        normed = _layer_norm(checkpoint, f"{prefix}.layer_norm2", x, spec.layer_norm_eps)
        inner = op.gelu(_linear(checkpoint, f"{prefix}.mlp.fc1", normed), "tanh")
        x = op.add(x, _linear(checkpoint, f"{prefix}.mlp.fc2", inner))
    x = _layer_norm(checkpoint, "vpm.post_layernorm", x, spec.layer_norm_eps)

    result = op.result(_resample(checkpoint, spec, x, key_mask, key_positions))
    result.get_output_tensor(0).set_names({"embeddings"})
    return ov.Model([result], [patches, position_rows, key_mask, key_positions], "vision")


def _resample(checkpoint: Checkpoint, spec: VisionSpec, x: Node, key_mask: Node, key_positions: Node) -> Node:
    """query_num learned queries attend to the patches; positions are added to the keys alone."""
    width = spec.output_size
    values = _layer_norm(checkpoint, "resampler.ln_kv", _linear(checkpoint, "resampler.kv_proj", x), 1e-6)
    keys = op.add(values, key_positions)
    queries = _layer_norm(checkpoint, "resampler.ln_q", _f32(checkpoint.float32("resampler.query")[None]), 1e-6)
    weights = checkpoint.float32("resampler.attn.in_proj_weight").reshape(3, width, width)
    biases = checkpoint.float32("resampler.attn.in_proj_bias").reshape(3, width)
    q, k, v = (
        _heads(op.add(op.matmul(node, _f32(weights[i]), False, True), _f32(biases[i])), spec.resampler_heads)
        for i, node in enumerate((queries, keys, values))
    )
    batch = op.gather(op.shape_of(x), _i64([0]), _i64(0))
    shape = op.concat([batch, _i64([spec.resampler_heads, spec.query_num, width // spec.resampler_heads])], 0)
    q = op.broadcast(q, shape, broadcast_spec="BIDIRECTIONAL")
    attended = _merge_heads(op.scaled_dot_product_attention(q, k, v, key_mask))
    out = _layer_norm(checkpoint, "resampler.ln_post", _linear(checkpoint, "resampler.attn.out_proj", attended), 1e-6)
    return op.matmul(out, _f32(checkpoint.float32("resampler.proj")), False, False)  # as it is: not transposed


def _attention(
    checkpoint: Checkpoint,
    prefix: str,
    x: Node,
    rotation: tuple[Node, Node],
    causal: Node,
    beams: Node,
    empty_state: Node,
    layer: int,
    spec: LlmSpec,
    sinks: list[Node],
) -> Node:
    """Grouped-query attention over everything that was ever fed; the new keys and values join the state."""
    q = _rotate(_heads(_linear(checkpoint, f"{prefix}.q_proj", x), spec.n_heads), rotation, spec)
    k = _rotate(_heads(_linear(checkpoint, f"{prefix}.k_proj", x), spec.n_kv_heads), rotation, spec)
    v = _heads(_linear(checkpoint, f"{prefix}.v_proj", x), spec.n_kv_heads)
    keys, values = (
        _with_past(new, beams, empty_state, f"past_key_values.{layer}.{kind}present.{layer}.{kind}", spec, sinks)
        for new, kind in ((k, "key"), (v, "value"))
    )
    attended = op.scaled_dot_product_attention(q, _repeat_heads(keys, spec), _repeat_heads(values, spec), causal)
    return _linear(checkpoint, f"{prefix}.o_proj", _merge_heads(attended))


def _with_past(new: Node, beams: Node, empty: Node, name: str, spec: LlmSpec, sinks: list[Node]) -> Node:
    shape = ov.PartialShape([-1, spec.n_kv_heads, -1, spec.head_size])
    past = op.gather(op.read_value(empty, name, ov.Type.f32, shape), beams, _i64(0))
    joined = op.concat([past, new], -2)
    sinks.append(op.assign(joined, name))
    return joined


def _repeat_heads(x: Node, spec: LlmSpec) -> Node:
    groups = spec.n_heads // spec.n_kv_heads
    repeated = op.broadcast(op.unsqueeze(x, _i64(2)), _i64([1, 1, groups, 1, 1]), broadcast_spec="BIDIRECTIONAL")
    return op.reshape(repeated, _i64([0, spec.n_heads, -1, spec.head_size]), True)


def _rotation(positions: Node, spec: LlmSpec) -> tuple[Node, Node]:
    exponents = np.arange(0, spec.head_size, 2, dtype=np.float32) / spec.head_size
    frequencies = (1.0 / spec.rope_theta**exponents).astype(np.float32)
    angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), _i64(-1)), _f32(frequencies[None, None]))
    both = op.concat([angles, angles], -1)
    return op.unsqueeze(op.cos(both), _i64(1)), op.unsqueeze(op.sin(both), _i64(1))


def _rotate(x: Node, rotation: tuple[Node, Node], spec: LlmSpec) -> Node:
    half = spec.head_size // 2
    upper = op.slice(x, _i64([half]), _i64([_INT64_MAX]), _i64([1]), _i64([3]))
    lower = op.slice(x, _i64([0]), _i64([half]), _i64([1]), _i64([3]))
    turned = op.concat([op.multiply(upper, _f32(-1.0)), lower], -1)
    return op.add(op.multiply(x, rotation[0]), op.multiply(turned, rotation[1]))


def _causal_mask(mask: Node, positions: Node) -> Node:
    """(1, 1, n, past + n) f32: 0 where the key's index is at most the query's position, else very negative."""
    total = op.gather(op.shape_of(mask), _i64(1), _i64(0))
    keys = op.range(_i64(0), total, _i64(1), "i64")
    seen = op.less_equal(op.unsqueeze(keys, _i64([0, 1])), op.unsqueeze(positions, _i64(-1)))
    return op.unsqueeze(op.select(seen, _f32(0.0), _f32(_MASKED)), _i64(1))


def _heads(x: Node, n_heads: int) -> Node:
    """(b, n, heads * size) -> (b, heads, n, size)."""
    size = int(x.get_output_partial_shape(0)[2].get_length()) // n_heads
    return op.transpose(op.reshape(x, _i64([0, 0, n_heads, size]), True), _i64([0, 2, 1, 3]))


def _merge_heads(x: Node) -> Node:
    shape = x.get_output_partial_shape(0)
    width = int(shape[1].get_length()) * int(shape[3].get_length())
    return op.reshape(op.transpose(x, _i64([0, 2, 1, 3])), _i64([0, 0, width]), True)


def _linear(checkpoint: Checkpoint, name: str, x: Node) -> Node:
    out = op.matmul(x, _f32(checkpoint.float32(f"{name}.weight")), False, True)
    return op.add(out, _f32(checkpoint.float32(f"{name}.bias"))) if f"{name}.bias" in checkpoint else out


def _layer_norm(checkpoint: Checkpoint, name: str, x: Node, eps: float) -> Node:
    normed = op.mvn(x, _i64([-1]), True, eps, "INSIDE_SQRT")
    scaled = op.multiply(normed, _f32(checkpoint.float32(f"{name}.weight")))
    return op.add(scaled, _f32(checkpoint.float32(f"{name}.bias")))


def _rms_norm(x: Node, weight: Any, eps: float) -> Node:
    mean = op.reduce_mean(op.power(x, _f32(2.0)), _i64([-1]), True)
    return op.multiply(op.multiply(x, op.divide(_f32(1.0), op.sqrt(op.add(mean, _f32(eps))))), _f32(weight))


def _parameter(shape: list[int], kind: Any, name: str) -> Node:
    parameter = op.parameter(ov.PartialShape(shape), kind, name)
    parameter.get_output_tensor(0).set_names({name})
    return parameter


def _i64(value: Any) -> Node:
    return op.constant(np.array(value, np.int64))


def _f32(value: Any) -> Node:
    return op.constant(np.array(value, np.float32))
