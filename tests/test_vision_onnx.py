"""convert vision-onnx: equal to the encoder on OpenVINO for every shape of picture, and made for the NPU's compiler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmchat import vision_inputs
from mmchat.checkpoint import Checkpoint, TensorFile
from mmchat.convert import vision_onnx
from mmchat.errors import ModelDirError
from mmchat.model_dir import open_model
from mmchat.slicing import plan_slices, slice_image
from tests.test_cli import mmchat_command
from tests.test_convert import digests, quiet

onnx: Any = pytest.importorskip("onnx")
SPEC = open_model("demo")
N = vision_onnx.default_patches(SPEC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "v"
    vision_onnx.run(vision_onnx.plan(SPEC), path, quiet)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return onnx.load(folder / "vision.onnx")


def inputs(pixels: NDArray[np.uint8], n: int, positions: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What the host feeds, padded to n patches."""
    return vision_inputs.host_inputs(
        vision_inputs.patches(pixels, 14),
        pixels.shape[0] // 14,
        pixels.shape[1] // 14,
        positions=positions,
        output_size=SPEC.vision.output_size,
        n=n,
    )


def views(n: int) -> list[NDArray[np.uint8]]:
    """Of n pictures, narrow to wide and small to large: the source view and a cell."""
    rng = np.random.default_rng(0)
    found: list[NDArray[np.uint8]] = []
    for _ in range(n):
        ratio, area = np.exp(rng.uniform(-2.3, 2.3)), np.exp(rng.uniform(np.log(500), np.log(200_000)))
        width, height = max(1, round((area * ratio) ** 0.5)), max(1, round((area / ratio) ** 0.5))
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        plan = plan_slices(width, height, scale_resolution=SPEC.slices.scale_resolution)
        found += slice_image(picture, plan)[:2]
    return found


def test_equal_to_openvino_for_views_of_every_shape(folder: Path) -> None:
    """200 pictures; each view padded for ONNX, and as it is for OpenVINO."""
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    from mmchat.openvino_graphs import cpu_properties
    from mmchat.openvino_vision import OpenVinoEncoder

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "vision.onnx", options, providers=["CPUExecutionProvider"])
    encoder = OpenVinoEncoder(Checkpoint(SPEC.folder), SPEC.vision, cpu_properties(1))
    positions = Checkpoint(SPEC.folder).float32("vpm.embeddings.position_embedding.weight")
    all_views = views(200)
    fitting = [view for view in all_views if view.shape[0] * view.shape[1] <= N * 14 * 14]
    assert len(fitting) > 0.9 * len(all_views)  # the others are sources beyond 5:1
    assert len({view.shape for view in fitting}) > 40
    for view in fitting:
        wanted = encoder.encode(view)
        found = session.run(["embeddings"], inputs(view, N, positions))[0]
        assert found.shape == (1, *wanted.shape)
        assert np.abs(found[0] - wanted).max() < 1e-4, view.shape
        assert wanted.std() > 0.1


@pytest.mark.parametrize(("resolution", "n"), [(448, 1056), (112, 80)])
def test_as_many_patches_as_ordinary_pictures_need(resolution: int, n: int) -> None:
    """Every view of pictures up to 5:1, and of every slice of ones up to 10:1."""
    from dataclasses import replace

    spec = replace(SPEC, slices=replace(SPEC.slices, scale_resolution=resolution))
    assert vision_onnx.default_patches(spec) == n
    for ratio in np.geomspace(0.1, 10, 200):
        for area in np.geomspace(0.2, 12, 25) * resolution**2:
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            plan = plan_slices(width, height, scale_resolution=resolution)
            if plan.cell:
                assert plan.cell[0] * plan.cell[1] <= n * 14 * 14
            if 0.2 <= ratio <= 5:
                assert plan.source[0] * plan.source[1] <= n * 14 * 14


def test_the_model_is_what_the_board_feeds(model: Any, folder: Path) -> None:
    """Names, order and shapes of the inputs; all float32; a valid model of the opset that the compiler knows."""
    onnx.checker.check_model(str(folder / "vision.onnx"), full_check=True)
    described = [
        (one.name, one.type.tensor_type.elem_type, [d.dim_value for d in one.type.tensor_type.shape.dim])
        for one in (*model.graph.input, *model.graph.output)
    ]
    assert described == [
        ("patches", 1, [1, N, 588]),
        ("position_rows", 1, [1, N, 160]),
        ("key_mask", 1, [1, 1, N]),
        ("key_positions", 1, [1, N, 192]),
        ("embeddings", 1, [1, 16, 192]),
    ]
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]


def test_the_graph_has_nothing_that_the_compiler_stumbles_over(model: Any) -> None:
    """No convolution, no gather, no constant before a product, and none that float16 cannot hold."""
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"MatMul", "Add", "Mul", "Reshape", "Transpose", "Softmax", "LayerNormalization", "Tanh"}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            assert node.input[0] not in constants, node.name
        if node.op_type == "Softmax":
            assert onnx.helper.get_attribute_value(node.attribute[0]) == -1
    assert all(np.abs(value).max() < 65504 for value in constants.values() if value.dtype == np.float32)


def test_the_table_of_positions_lies_beside_it(folder: Path) -> None:
    name = "vpm.embeddings.position_embedding.weight"
    table = TensorFile(folder / "vision_positions.safetensors").array(name)
    np.testing.assert_array_equal(table, Checkpoint(SPEC.folder).array(name))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """The same files; interrupted before the last of them, it goes on; another size is another model."""
    out, _ = mmchat_command("convert", "vision-onnx", "demo", tmp_path / "v", "--dry-run", "--json")
    assert json.loads(out)["writes"] > 6_000_000
    assert not (tmp_path / "v").exists()
    mmchat_command("convert", "vision-onnx", "demo", tmp_path / "v")
    assert digests(tmp_path / "v") == digests(folder)
    data = tmp_path / "v" / "vision.onnx.data"
    written = data.stat().st_mtime_ns
    (tmp_path / "v" / "vision.onnx").unlink()
    vision_onnx.run(vision_onnx.plan(SPEC), tmp_path / "v", quiet)
    assert digests(tmp_path / "v") == digests(folder)
    assert data.stat().st_mtime_ns == written
    vision_onnx.run(vision_onnx.plan(SPEC, 64), tmp_path / "v", quiet)
    assert digests(tmp_path / "v") != digests(folder)


def test_without_onnx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelDirError, match=r"pip install onnx"):
        vision_onnx.plan(SPEC)


def test_a_checkpoint_without_the_tower_is_named(tmp_path: Path) -> None:
    from tests.test_convert import sharded

    folder = sharded(tmp_path / "c", 1)
    path = folder / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes().replace(b"vpm.", b"vpn."))
    with pytest.raises(ModelDirError, match=r"no tensor 'vpm\."):
        vision_onnx.plan(open_model(folder))
