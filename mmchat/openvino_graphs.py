"""Checkpoint tensors -> OpenVINO models, with opsets: no torch, nothing to convert.

The LLM's inputs, outputs and states are those that optimum-intel exports, so a folder of its making is driven the
same way.  The other models of such a folder are built here as well, for `mmchat convert openvino`.

The exact shapes of the attention and rotation subgraphs matter: others compute the same but are not fused
on the CPU (5 times slower decoding; found with OpenVINO 2026.4.1).

This module knows no pictures, no prompts and no requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from mmchat.checkpoint import Checkpoint, to_float32
from mmchat.model_dir import POSITIONS, LlmSpec, VisionSpec

Node = Any  # openvino.Node: its Python bindings are untyped

_INT64_MAX = 2**63 - 1
_MASKED = np.float32(-3.4e38)


def cpu_properties(n_threads: int | None) -> dict[str, Any]:
    """How both models are compiled: the same numbers on every host (the defaults differ), one request at a time."""
    properties: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
    if n_threads:
        properties["INFERENCE_NUM_THREADS"] = n_threads
    return properties


class Weights:
    """A checkpoint's tensors as nodes of float32: constants, each a copy.  Others may keep them in another type."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def small(self, name: str, rows: slice = slice(None)) -> Node:
        """A norm's weight, a bias, or the resampler's queries."""
        return _f32(self.checkpoint.float32(name)[rows])

    def matrix(self, name: str, rows: slice = slice(None)) -> Node:
        """What is multiplied with, or looked up in: two dimensions, all but the first of the tensor joined."""
        return _f32(two_dimensions(to_float32(self.checkpoint.array(name)[rows])))


def two_dimensions(array: NDArray[Any]) -> NDArray[Any]:
    """(n, a, b, ...) -> (n, a * b * ...)."""
    return array.reshape(len(array), -1)


def build_llm(source: Checkpoint | Weights, spec: LlmSpec, *, every_position: bool = False) -> ov.Model:
    """Qwen2 with a stateful KV cache.

    inputs_embeds (1, n, hidden) f32; attention_mask (1, past + n) i64, all ones; position_ids (1, n) i64;
    beam_idx (1,) i32, zero.  Output logits (1, 1, vocab) f32: of the last position only.
    every_position: (1, n, vocab), as exporters write it.
    """
    weights = _weights(source)
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
        normed = _rms_norm(x, weights.small(f"{prefix}.input_layernorm.weight"), spec.rms_norm_eps)
        attended = _attention(
            weights, f"{prefix}.self_attn", normed, (cos, sin), causal, beams, empty_state, layer, spec, sinks
        )
        x = op.add(x, attended)
        normed = _rms_norm(x, weights.small(f"{prefix}.post_attention_layernorm.weight"), spec.rms_norm_eps)
        gate = op.swish(_linear(weights, f"{prefix}.mlp.gate_proj", normed))
        up = _linear(weights, f"{prefix}.mlp.up_proj", normed)
        x = op.add(x, _linear(weights, f"{prefix}.mlp.down_proj", op.multiply(gate, up)))
    if not every_position:
        x = op.gather(x, _i64([-1]), _i64(1))  # before the output layer, which is the largest of all
    x = _rms_norm(x, weights.small("llm.model.norm.weight"), spec.rms_norm_eps)
    head = "llm.lm_head" if "llm.lm_head.weight" in weights else "llm.model.embed_tokens"  # absent: tied
    return _model(_linear(weights, head, x), "logits", [embeds, mask, positions, beams], "llm", sinks)


def build_text_embeddings(source: Checkpoint | Weights) -> ov.Model:
    """input (b, n) i64 -> inputs_embeds (b, n, hidden) f32: the token rows, as a model of its own."""
    ids = _parameter([-1, -1], ov.Type.i64, "input")
    rows = op.gather(_weights(source).matrix("llm.model.embed_tokens.weight"), ids, _i64(0))
    return _model(rows, "inputs_embeds", [ids], "text_embeddings")


def build_vision(source: Checkpoint | Weights, spec: VisionSpec) -> ov.Model:
    """SigLIP tower and resampler (inputs from mmchat.vision_inputs).

    patches (b, n, 3 * patch²), position_rows (b, n, hidden), key_mask (b, 1, 1, n) additive,
    key_positions (b, n, output_size), all f32.  Output embeddings (b, query_num, output_size) f32.
    """
    patches = _parameter([-1, -1, 3 * spec.patch_size**2], ov.Type.f32, "patches")
    position_rows = _parameter([-1, -1, spec.hidden_size], ov.Type.f32, "position_rows")
    key_mask = _parameter([-1, 1, 1, -1], ov.Type.f32, "key_mask")
    key_positions = _parameter([-1, -1, spec.output_size], ov.Type.f32, "key_positions")

    weights = _weights(source)
    x = op.add(_linear(weights, "vpm.embeddings.patch_embedding", patches), position_rows)
    x = _tower(weights, spec, x, key_mask)
    embeddings = _resample(weights, spec, x, key_mask, key_positions)
    return _model(embeddings, "embeddings", [patches, position_rows, key_mask, key_positions], "vision")


def build_vision_embeddings(source: Checkpoint | Weights, spec: VisionSpec) -> ov.Model:
    """The tower alone, as optimum-intel exports it.

    pixel_values (b, 3, patch, patch * n) f32: patches side by side; patch_attention_mask (b, 1, n) f32: 1, or 0 for
    padding; position_ids (b, n) i64.  Output last_hidden_state (b, n, hidden) f32.
    """
    patch = spec.patch_size
    pixels = _parameter([-1, 3, patch, -1], ov.Type.f32, "pixel_values")
    mask = _parameter([-1, 1, -1], ov.Type.f32, "patch_attention_mask")
    ids = _parameter([-1, -1], ov.Type.i64, "position_ids")
    weights = _weights(source)
    split = op.transpose(op.reshape(pixels, _i64([0, 3, patch, -1, patch]), True), _i64([0, 3, 1, 2, 4]))
    patches = op.reshape(split, _i64([0, 0, 3 * patch * patch]), True)
    rows = op.gather(weights.matrix(POSITIONS), ids, _i64(0))
    valid = op.greater(op.unsqueeze(mask, _i64(1)), _f32(0.5))
    x = op.add(_linear(weights, "vpm.embeddings.patch_embedding", patches), rows)
    x = _tower(weights, spec, x, op.select(valid, _f32(0.0), _f32(_MASKED)))
    return _model(x, "last_hidden_state", [pixels, mask, ids], "vision_embeddings")


def build_resampler(source: Checkpoint | Weights, spec: VisionSpec) -> ov.Model:
    """The resampler alone, with optimum-intel's inputs.

    image_feature (b, n, hidden) f32; pos_embed (n, b, output_size) f32; key_padding_mask (b, n) f32: 0, or anything
    else for padding.  (Exported graphs add this mask to the scores; openvino_genai sends 1 for padding, which does not
    hide it there.  Here both that and a large negative number do.)  Output last_hidden_state (b, query_num,
    output_size) f32.
    """
    features = _parameter([-1, -1, spec.hidden_size], ov.Type.f32, "image_feature")
    positions = _parameter([-1, -1, spec.output_size], ov.Type.f32, "pos_embed")
    mask = _parameter([-1, -1], ov.Type.f32, "key_padding_mask")
    valid = op.equal(op.unsqueeze(mask, _i64([1, 2])), _f32(0.0))
    additive = op.select(valid, _f32(0.0), _f32(_MASKED))
    keys = op.transpose(positions, _i64([1, 0, 2]))
    embeddings = _resample(_weights(source), spec, features, additive, keys)
    return _model(embeddings, "last_hidden_state", [features, positions, mask], "resampler")


def _tower(weights: Weights, spec: VisionSpec, x: Node, key_mask: Node) -> Node:
    """SigLIP's layers and last norm."""
    for layer in range(spec.n_layers):
        prefix = f"vpm.encoder.layers.{layer}"
        normed = _layer_norm(weights, f"{prefix}.layer_norm1", x, spec.layer_norm_eps)
        queries, keys, values = (
            _heads(_linear(weights, f"{prefix}.self_attn.{name}_proj", normed), spec.n_heads) for name in "qkv"
        )
        attended = _merge_heads(op.scaled_dot_product_attention(queries, keys, values, key_mask))
        x = op.add(x, _linear(weights, f"{prefix}.self_attn.out_proj", attended))
        normed = _layer_norm(weights, f"{prefix}.layer_norm2", x, spec.layer_norm_eps)
        inner = op.gelu(_linear(weights, f"{prefix}.mlp.fc1", normed), "tanh")
        x = op.add(x, _linear(weights, f"{prefix}.mlp.fc2", inner))
    return _layer_norm(weights, "vpm.post_layernorm", x, spec.layer_norm_eps)


def _resample(weights: Weights, spec: VisionSpec, x: Node, key_mask: Node, key_positions: Node) -> Node:
    """query_num learned queries attend to the patches; positions are added to the keys alone."""
    width = spec.output_size
    values = _layer_norm(weights, "resampler.ln_kv", _linear(weights, "resampler.kv_proj", x), 1e-6)
    keys = op.add(values, key_positions)
    queries = _layer_norm(weights, "resampler.ln_q", op.unsqueeze(weights.small("resampler.query"), _i64(0)), 1e-6)
    projected = []
    for i, node in enumerate((queries, keys, values)):
        rows = slice(i * width, (i + 1) * width)
        product = op.matmul(node, weights.matrix("resampler.attn.in_proj_weight", rows), False, True)
        projected.append(
            _heads(op.add(product, weights.small("resampler.attn.in_proj_bias", rows)), spec.resampler_heads)
        )
    q, k, v = projected
    batch = op.gather(op.shape_of(x), _i64([0]), _i64(0))
    shape = op.concat([batch, _i64([spec.resampler_heads, spec.query_num, width // spec.resampler_heads])], 0)
    q = op.broadcast(q, shape, broadcast_spec="BIDIRECTIONAL")
    attended = _merge_heads(op.scaled_dot_product_attention(q, k, v, key_mask))
    out = _layer_norm(weights, "resampler.ln_post", _linear(weights, "resampler.attn.out_proj", attended), 1e-6)
    return op.matmul(out, weights.matrix("resampler.proj"), False, False)  # as it is: not transposed


def _attention(
    weights: Weights,
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
    q = _rotate(_heads(_linear(weights, f"{prefix}.q_proj", x), spec.n_heads), rotation, spec)
    k = _rotate(_heads(_linear(weights, f"{prefix}.k_proj", x), spec.n_kv_heads), rotation, spec)
    v = _heads(_linear(weights, f"{prefix}.v_proj", x), spec.n_kv_heads)
    keys, values = (
        _with_past(new, beams, empty_state, f"past_key_values.{layer}.{kind}present.{layer}.{kind}", spec, sinks)
        for new, kind in ((k, "key"), (v, "value"))
    )
    attended = op.scaled_dot_product_attention(q, _repeat_heads(keys, spec), _repeat_heads(values, spec), causal)
    return _linear(weights, f"{prefix}.o_proj", _merge_heads(attended))


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


def _weights(source: Checkpoint | Weights) -> Weights:
    return source if isinstance(source, Weights) else Weights(source)


def _linear(weights: Weights, name: str, x: Node) -> Node:
    out = op.matmul(x, weights.matrix(f"{name}.weight"), False, True)
    return op.add(out, weights.small(f"{name}.bias")) if f"{name}.bias" in weights else out


def _layer_norm(weights: Weights, name: str, x: Node, eps: float) -> Node:
    normed = op.mvn(x, _i64([-1]), True, eps, "INSIDE_SQRT")
    scaled = op.multiply(normed, weights.small(f"{name}.weight"))
    return op.add(scaled, weights.small(f"{name}.bias"))


def _rms_norm(x: Node, weight: Node, eps: float) -> Node:
    mean = op.reduce_mean(op.power(x, _f32(2.0)), _i64([-1]), True)
    return op.multiply(op.multiply(x, op.divide(_f32(1.0), op.sqrt(op.add(mean, _f32(eps))))), weight)


def _model(output: Node, name: str, inputs: list[Node], title: str, sinks: list[Node] | None = None) -> ov.Model:
    result = op.result(output)
    result.get_output_tensor(0).set_names({name})
    return ov.Model([result], sinks or [], inputs, title)


def _parameter(shape: list[int], kind: Any, name: str) -> Node:
    parameter = op.parameter(ov.PartialShape(shape), kind, name)
    parameter.get_output_tensor(0).set_names({name})
    return parameter


def _i64(value: Any) -> Node:
    return op.constant(np.array(value, np.int64))


def _f32(value: Any) -> Node:
    return op.constant(np.array(value, np.float32))
