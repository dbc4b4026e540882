"""The vision tower and the resampler -> ONNX of a fixed number of patches, exact for every picture that fits.

Inputs, all float32 and in this order: patches (1, N, 3 * patch²), position_rows (1, N, hidden), key_mask (1, 1, N),
additive, key_positions (1, N, output_size); mmchat.vision_inputs says what is in them.  Output: embeddings
(1, query_num, output_size).  Beside the model goes the table that position_rows are looked up in.

The graph is written for rknn-toolkit2, whose habits were seen with 2.5.0:
* patches come unfolded and are embedded by a matrix product; the published strip convolution aborts the compiler;
* no input has four dimensions, which would be taken for a picture, and no constant is infinite;
* the resampler's queries are constants.  Constants as the first operand of attention break the compiler's fusion, so
  they are the second: keys times queries, then transposed.  With that no rule had to be switched off.

Built with onnx alone; weights go to a file of their own beside the model, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint, to_float32, write_atomic, write_tensors
from mmchat.convert.step import Estimate, Progress
from mmchat.errors import ModelDirError
from mmchat.model_dir import POSITIONS, ModelSpec, VisionSpec
from mmchat.outputs import Work, check_space, only_writer, stamp

MODEL_FILE, DATA_FILE, POSITIONS_FILE = "vision.onnx", "vision.onnx.data", "vision_positions.safetensors"
_OPSET, _IR_VERSION = 19, 9  # the newest that rknn-toolkit2 2.5.0 was seen to take
_ALIGNMENT = 4096  # of weights in their file, as the format recommends
_RESAMPLER_EPS = 1e-6
_WIDENED_BYTES_PER_S = 60e6  # widened and transposed; 2 GB took 69 s on two busy cores

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Weight:
    """A constant that is computed when it is written."""

    shape: tuple[int, ...]
    make: Callable[[], Array]


@dataclass
class Graph:
    """Nodes in order, and the constants they name."""

    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """The name of the result."""
        from onnx import helper

        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def weight(self, name: str, shape: Sequence[int], make: Callable[[], Array]) -> str:
        self.weights[name] = Weight(tuple(shape), make)
        return name

    def scalar(self, value: float) -> str:
        return self.weight(f"scalar_{value:.9g}", (), lambda: np.array(value, np.float32))

    def shape(self, *sizes: int) -> str:
        name = "shape_" + "_".join(map(str, sizes))
        self.shapes[name] = sizes
        return name


def default_patches(spec: ModelSpec) -> int:
    """1056 for MiniCPM-V-2.6: sources up to 5.57:1, and every cell of pictures up to 10:1.

    That is a square view whose sides are half a patch longer, for sides are rounded to whole patches.
    """
    side = spec.slices.scale_resolution / spec.slices.patch_size
    return -(-int((side + 0.5) ** 2) // 16) * 16


@dataclass(frozen=True)
class Plan:
    spec: ModelSpec
    n_patches: int
    graph: Graph
    n_read: int

    @property
    def n_data(self) -> int:
        return sum(4 * math.prod(weight.shape) for weight in self.graph.weights.values())

    @property
    def estimate(self) -> Estimate:
        largest = max(4 * math.prod(weight.shape) for weight in self.graph.weights.values())
        writes = self.n_data + 4 * self.spec.vision.hidden_size * self.spec.vision.position_side**2
        memory = 100_000_000 + 4 * largest + self.n_read  # what was read of the checkpoint stays mapped for a while
        return Estimate(self.n_read, writes, memory, writes / _WIDENED_BYTES_PER_S)


def plan(spec: ModelSpec, n_patches: int | None = None) -> Plan:
    """spec: of a checkpoint folder.  n_patches: N, of every input; default_patches unless given.

    Raises ModelDirError: no vision tensors there, or the package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise ModelDirError("convert vision-onnx needs the package onnx: pip install onnx") from None
    checkpoint = Checkpoint(spec.folder)
    infos = [checkpoint.info(name) for name in checkpoint if name.startswith(("vpm.", "resampler."))]
    n = n_patches or default_patches(spec)
    return Plan(spec, n, build(checkpoint, spec.vision, n), sum(info.end - info.start for info in infos))


def run(plan: Plan, target: Path, progress: Progress) -> None:
    """Write the folder; interrupted, it goes on with the file where it was.

    Raises ModelDirError: a target with other files in it.  DiskFull.
    """
    checkpoint = Checkpoint(plan.spec.folder)
    sources = sorted({checkpoint.file(name).path for name in checkpoint if name.startswith(("vpm.", "resampler."))})
    made_from = {"step": "vision-onnx", "patches": plan.n_patches, "files": [[p.name, *stamp(p)] for p in sources]}
    with only_writer(target):
        work = Work(target, made_from)
        for name in (DATA_FILE, MODEL_FILE):
            if not work.has(name):
                work.prepare(name).unlink(missing_ok=True)
        check_space(target, 0 if work.has(DATA_FILE) else plan.estimate.writes)
        if not work.has(DATA_FILE):
            write_atomic(work.prepare(DATA_FILE), lambda file: _write_data(plan, file, progress))
            work.finish(DATA_FILE)
        info, table = checkpoint.info(POSITIONS), checkpoint.array(POSITIONS)
        positions = work.prepare(POSITIONS_FILE)
        write_tensors(positions, {POSITIONS: (info.dtype, info.shape, [np.ascontiguousarray(table).tobytes()])})
        work.finish(POSITIONS_FILE)
        content = to_onnx(plan).SerializeToString()
        write_atomic(work.prepare(MODEL_FILE), lambda file: file.write(content))
        work.finish(MODEL_FILE)


def to_onnx(plan: Plan) -> Any:
    """The ModelProto, whose weights are in DATA_FILE."""
    from onnx import TensorProto, helper

    spec, n = plan.spec.vision, plan.n_patches
    inputs = {
        "patches": (1, n, 3 * spec.patch_size**2),
        "position_rows": (1, n, spec.hidden_size),
        "key_mask": (1, 1, n),
        "key_positions": (1, n, spec.output_size),
    }
    constants = [
        helper.make_tensor(name, TensorProto.INT64, (len(sizes),), sizes) for name, sizes in plan.graph.shapes.items()
    ]
    for name, offset, weight in _places(plan.graph):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", 4 * math.prod(weight.shape))):
            tensor.external_data.add(key=key, value=str(value))
        constants.append(tensor)
    graph = helper.make_graph(
        plan.graph.nodes,
        "vision",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, (1, spec.query_num, spec.output_size))],
        constants,
    )
    opset = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="mmchat")


def _places(graph: Graph) -> Iterator[tuple[str, int, Weight]]:
    """Every weight and where in its file it lies."""
    offset = 0
    for name, weight in graph.weights.items():
        yield name, offset, weight
        offset += -(-4 * math.prod(weight.shape) // _ALIGNMENT) * _ALIGNMENT


def _write_data(plan: Plan, file: IO[bytes], progress: Progress) -> None:
    for name, offset, weight in _places(plan.graph):
        values = np.asarray(weight.make(), "<f4", order="C")
        if values.shape != weight.shape or not np.isfinite(values).all():
            raise ModelDirError(f"{plan.spec.folder}: {name} is {values.shape}, not {weight.shape}, or not finite")
        file.seek(offset)
        file.write(values.data if values.ndim else values.tobytes())
        progress(DATA_FILE, min(offset + values.nbytes, plan.n_data), plan.n_data)


def build(checkpoint: Checkpoint, spec: VisionSpec, n: int) -> Graph:
    """The graph for n patches.  Raises ModelDirError: a tensor is missing."""
    graph = _Builder(checkpoint)
    heads = spec.n_heads
    x = graph.op("Add", graph.linear("vpm.embeddings.patch_embedding", "patches"), "position_rows")
    mask = graph.op("Reshape", "key_mask", graph.shape(1, 1, 1, n))
    scale = graph.scalar((spec.hidden_size // heads) ** -0.5)
    for layer in range(spec.n_layers):
        prefix = f"vpm.encoder.layers.{layer}"
        normed = graph.norm(f"{prefix}.layer_norm1", x, spec.layer_norm_eps)
        q, k, v = (graph.linear(f"{prefix}.self_attn.{name}_proj", normed) for name in "qkv")
        q = graph.heads(graph.op("Mul", q, scale), n, heads, spec.hidden_size, (0, 2, 1, 3))
        k = graph.heads(k, n, heads, spec.hidden_size, (0, 2, 3, 1))
        v = graph.heads(v, n, heads, spec.hidden_size, (0, 2, 1, 3))
        scores = graph.op("Softmax", graph.op("Add", graph.op("MatMul", q, k), mask), axis=-1)
        attended = graph.merge(graph.op("MatMul", scores, v), n, spec.hidden_size)
        x = graph.op("Add", x, graph.linear(f"{prefix}.self_attn.out_proj", attended))
        normed = graph.norm(f"{prefix}.layer_norm2", x, spec.layer_norm_eps)
        inner = graph.gelu(graph.linear(f"{prefix}.mlp.fc1", normed))
        x = graph.op("Add", x, graph.linear(f"{prefix}.mlp.fc2", inner))
    x = graph.norm("vpm.post_layernorm", x, spec.layer_norm_eps)

    width, heads, size = spec.output_size, spec.resampler_heads, spec.output_size // spec.resampler_heads
    values = graph.norm("resampler.ln_kv", graph.linear("resampler.kv_proj", x), _RESAMPLER_EPS)
    keys = graph.op("Add", values, "key_positions")
    k = graph.heads(graph.in_proj(1, keys, width), n, heads, width, (0, 2, 1, 3))
    v = graph.heads(graph.in_proj(2, values, width), n, heads, width, (0, 2, 1, 3))
    queries = graph.weight(
        "resampler.queries", (1, heads, size, spec.query_num), partial(_queries, checkpoint, heads, width)
    )
    column = graph.op("Reshape", "key_mask", graph.shape(1, 1, n, 1))
    scores = graph.op("Add", graph.op("MatMul", k, queries), column)
    scores = graph.op("Softmax", graph.op("Transpose", scores, perm=(0, 1, 3, 2)), axis=-1)
    attended = graph.merge(graph.op("MatMul", scores, v), spec.query_num, width)
    out = graph.norm("resampler.ln_post", graph.linear("resampler.attn.out_proj", attended), _RESAMPLER_EPS)
    graph.op("MatMul", out, graph.tensor("resampler.proj"), name="embeddings")  # as it is: not transposed
    return graph


def _queries(checkpoint: Checkpoint, heads: int, width: int) -> Array:
    """What the learned queries are after their norm and projection, scaled: (1, heads, size, query_num)."""
    query = checkpoint.float32("resampler.query").astype(np.float64)
    centred = query - query.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + _RESAMPLER_EPS)
    normed = normed * checkpoint.float32("resampler.ln_q.weight") + checkpoint.float32("resampler.ln_q.bias")
    weight = checkpoint.array("resampler.attn.in_proj_weight")[:width]
    bias = checkpoint.float32("resampler.attn.in_proj_bias")[:width]
    projected = (normed @ to_float32(weight).T + bias) * (width // heads) ** -0.5
    split = projected.astype(np.float32).reshape(1, len(query), heads, -1)
    return np.asarray(split.transpose(0, 2, 3, 1))


class _Builder(Graph):
    """The few layers that the tower is made of."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    def tensor(self, name: str) -> str:
        return self.weight(name, self._checkpoint.info(name).shape, lambda: self._checkpoint.float32(name))

    def linear(self, name: str, x: str) -> str:
        """A convolution over whole patches is one too."""
        n_out, *rest = self._checkpoint.info(f"{name}.weight").shape
        n_in = math.prod(rest)
        weight = self.weight(
            f"{name}.weight", (n_in, n_out), lambda: self._checkpoint.float32(f"{name}.weight").reshape(n_out, n_in).T
        )
        out = self.op("MatMul", x, weight)
        return self.op("Add", out, self.tensor(f"{name}.bias")) if f"{name}.bias" in self._checkpoint else out

    def in_proj(self, part: int, x: str, width: int) -> str:
        """One of the three projections that lie in one tensor: 0 queries, 1 keys, 2 values."""
        rows, name = slice(part * width, (part + 1) * width), "resampler.attn.in_proj"
        matrix = self._checkpoint.array(f"{name}_weight")
        weight = self.weight(f"{name}_weight.{part}", (width, width), lambda: to_float32(matrix[rows]).T)
        bias = self.weight(f"{name}_bias.{part}", (width,), lambda: self._checkpoint.float32(f"{name}_bias")[rows])
        return self.op("Add", self.op("MatMul", x, weight), bias)

    def norm(self, name: str, x: str, eps: float) -> str:
        return self.op(
            "LayerNormalization", x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), axis=-1, epsilon=eps
        )

    def gelu(self, x: str) -> str:
        """The tanh form, of the operations that torch exports: compilers know this sequence."""
        cubed = self.op("Mul", x, self.op("Mul", x, x))
        inner = self.op("Add", x, self.op("Mul", self.scalar(0.044715), cubed))
        curve = self.op("Tanh", self.op("Mul", self.scalar(math.sqrt(2 / math.pi)), inner))
        return self.op("Mul", self.scalar(0.5), self.op("Mul", x, self.op("Add", self.scalar(1.0), curve)))

    def heads(self, x: str, n: int, heads: int, width: int, order: tuple[int, ...]) -> str:
        """(1, n, width) -> (1, n, heads, size), its axes in this order."""
        return self.op("Transpose", self.op("Reshape", x, self.shape(1, n, heads, width // heads)), perm=order)

    def merge(self, x: str, n: int, width: int) -> str:
        """(1, heads, n, size) -> (1, n, width)."""
        return self.op("Reshape", self.op("Transpose", x, perm=(0, 2, 1, 3)), self.shape(1, n, width))
