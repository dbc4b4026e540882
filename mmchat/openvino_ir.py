"""The models of an OpenVINO folder, whoever wrote it: optimum-intel's users or `mmchat convert openvino`.

What they differ in is evened out here, so that the engine drives all of them like the graph that it builds itself:
an LLM without states gets them, and its output layer sees the last position only.  Weights stay mapped.

Source of names and shapes: optimum-intel's exporter and openvino_genai, read in 2026; no published folder was opened.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from mmchat.embed_table import EmbedTable
from mmchat.errors import ModelDirError
from mmchat.model_dir import LlmSpec

Node = Any  # openvino.Node: its Python bindings are untyped

_LLM_INPUTS = {"inputs_embeds", "attention_mask", "position_ids", "beam_idx"}


def read(path: Path) -> ov.Model:
    """Raises ModelDirError: no model, or one that this OpenVINO cannot read."""
    try:
        return ov.Core().read_model(path)
    except Exception as error:  # the library raises bare RuntimeError
        said = " ".join(str(error).split())[:300]
        raise ModelDirError(f"{path}: not a model that OpenVINO {ov.get_version()} reads ({said})") from None


def input_names(model: ov.Model) -> set[str]:
    return {name for port in model.inputs for name in port.get_names()}


def check_inputs(model: ov.Model, needed: set[str], path: Path) -> None:
    """Raises ModelDirError where the model does not take all of these."""
    if missing := needed - input_names(model):
        raise ModelDirError(f"{path}: has no input {', '.join(sorted(missing))}: not optimum-intel's MiniCPM-V layout")


def read_llm(path: Path, spec: LlmSpec) -> ov.Model:
    """An LLM with states, of which only the last position is scored.

    Raises ModelDirError: not Qwen2 of these dimensions, or inputs that are not known.
    """
    model = read(path)
    check_inputs(model, {"inputs_embeds", "attention_mask"}, path)
    if not model.get_sinks():
        _make_stateful(model, path)
    if unknown := input_names(model) - _LLM_INPUTS:
        raise ModelDirError(f"{path}: has the input {min(unknown)}, which is not known")
    width = model.input("inputs_embeds").get_partial_shape()[2]
    shapes = {str(variable.info.data_shape) for variable in model.get_variables()}
    wanted = f"[?,{spec.n_kv_heads},?,{spec.head_size}]"
    n_states = len(model.get_variables())
    if width != ov.Dimension(spec.hidden_size) or shapes != {wanted} or n_states != 2 * spec.n_layers:
        raise ModelDirError(
            f"{path}: rows of {width} and {n_states} caches of {' and '.join(sorted(shapes))}; by config.json it would "
            f"be rows of {spec.hidden_size} and {2 * spec.n_layers} caches of {wanted}"
        )
    _score_last_position(model)
    return model


def _make_stateful(model: ov.Model, path: Path) -> None:
    """Turn past_key_values.* inputs and present.* outputs into states that begin empty."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    outputs = {name for port in model.outputs for name in port.get_names()}
    pairs = {
        name: name.replace("past_key_values", "present") for name in input_names(model) if "past_key_values" in name
    }
    if not pairs or not outputs.issuperset(pairs.values()):
        raise ModelDirError(f"{path}: has neither states nor past_key_values.* and present.*: it cannot be driven")
    apply_make_stateful_transformation(model, pairs)
    batch = op.gather(op.shape_of(model.input("inputs_embeds").get_node()), _i64([0]), _i64(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            sizes = [batch, *(_i64([0 if size.is_dynamic else size.get_length()]) for size in list(shape)[1:])]
            zero = op.constant(np.zeros((), np.float32), dtype=node.get_output_element_type(0))
            node.set_arguments([op.broadcast(zero, op.concat(sizes, 0))])
    model.validate_nodes_and_infer_types()


def _score_last_position(model: ov.Model) -> None:
    """Cut before the output layer, the largest of all; where it is not found, every position is scored."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in ("Convert", "Add"):
        node = node.input_value(0).get_node()
    if node.get_type_name() == "MatMul" and len(node.input_value(0).get_partial_shape()) == 3:
        last = op.gather(node.input_value(0), _i64([-1]), _i64(1))
        node.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()


def open_table(path: Path) -> EmbedTable:
    """The token rows.  Those that are stored as floats are mapped; others are looked up by OpenVINO.

    Raises ModelDirError: the model is no table.
    """
    model = read(path)
    gather = _behind(model.outputs[0].get_node().input_value(0).get_node(), "Convert", "Reshape")
    source = _behind(gather.input_value(0).get_node(), "Convert") if gather.get_type_name() == "Gather" else gather
    if gather.get_type_name() != "Gather" or len(gather.input_value(0).get_partial_shape()) != 2:
        raise ModelDirError(f"{path}: not a table of token rows ({gather.get_type_name()})")
    if source.get_type_name() == "Constant" and source.get_element_type() in (ov.Type.f32, ov.Type.f16, ov.Type.bf16):
        # The dtype that OpenVINO gives a bfloat16 array is float16.
        array = source.data.view(np.uint16) if source.get_element_type() == ov.Type.bf16 else source.data
        return _MappedTable(array, path, model)
    n_ids, width = (int(size.get_length()) for size in gather.input_value(0).get_partial_shape())
    return _CompiledTable(model, (n_ids, width), path)


def _behind(node: Node, *kinds: str) -> Node:
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


class _MappedTable(EmbedTable):
    def __init__(self, table: NDArray[Any], path: Path, model: ov.Model) -> None:
        super().__init__(table, path)
        self._model = model  # whose memory the table is


class _CompiledTable(EmbedTable):
    """Rows that are stored compressed."""

    def __init__(self, model: ov.Model, shape: tuple[int, int], path: Path) -> None:
        super().__init__(np.broadcast_to(np.float32(0), shape), path)
        properties = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1}
        self._request = ov.Core().compile_model(model, "CPU", properties).create_infer_request()
        self._lock = threading.Lock()

    def _fill(self, wanted: NDArray[Any], out: NDArray[np.float32]) -> None:
        with self._lock:
            out[...] = self._request.infer({0: wanted.astype(np.int64)[None]})[0][0]


def _i64(value: Any) -> Node:
    return op.constant(np.array(value, np.int64))
