"""OpenVINO folders: convert writes what the checkpoint says, and whoever wrote one, it chats as the layout has it."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from openvino import opset13 as op

import mmchat
from mmchat import openvino_graphs, outputs
from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.convert import openvino_folder
from mmchat.embed_table import EmbedTable
from mmchat.engine import Engine, Sampling, Tokens
from mmchat.errors import DiskFull, ModelDirError
from mmchat.model_dir import IR_FILES, open_model
from mmchat.openvino_engine import OpenVinoEngine, open_engine
from mmchat.openvino_ir import open_table
from mmchat.openvino_vision import IrEncoder, OpenVinoEncoder, open_encoder
from mmchat.prompt import CHAT_TEMPLATE, ChatTokenizer, Message, Text, render
from mmchat.store import Store
from tests.contract_engine import CONTEXT_ROWS, ENDLESS, EngineContract, Kit, run
from tests.test_cli import mmchat_command, refused
from tests.test_convert import RUN, digests, quiet, sharded
from tests.test_demo import run_chat
from tests.test_engine_contract import forgotten
from tests.test_openvino_vision import pixels

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
CHECKPOINT = Checkpoint(SPEC.folder)
PROPERTIES = openvino_graphs.cpu_properties(1)
PROMPT = Tokens(tuple(np.random.default_rng(0).integers(0, 700, 60).tolist()))


def convert(target: Path, weights: str = "fp32", source: str | Path = "demo") -> Path:
    """Without the tokenizers of another program, which take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_folder, "_has_tokenizers", lambda: False)
        openvino_folder.run(openvino_folder.plan(open_model(source), weights), target, quiet)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32; not to be changed."""
    return convert(tmp_path_factory.mktemp("ir") / "fp32")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def answer(engine: Engine) -> tuple[int, ...]:
    return run(engine, [PROMPT], Sampling(max_new_tokens=24, repetition_penalty=1.3)).done.ids


@pytest.fixture(scope="module")
def wanted() -> tuple[int, ...]:
    """Of the engine that is built from the checkpoint."""
    ids = answer(open_engine(SPEC, TOKENIZER, lambda key: None, n_threads=1))
    assert len(set(ids)) > 5
    return ids


def engine_of(folder: Path) -> OpenVinoEngine:
    return open_engine(open_model(folder), TOKENIZER, lambda key: None, n_threads=1)


# --- the same answers -------------------------------------------------------------------------------------------


def test_a_chat_is_token_for_token_the_checkpoints(folder: Path, tmp_path: Path) -> None:
    """Six turns and six pictures, through both workers; the pictures are encoded anew, to the same embeddings."""
    chats: list[Any] = []
    for model in ("demo", folder):
        with mmchat.open(model, store=tmp_path / str(len(chats)), n_threads=1) as runtime:
            session = runtime.session()
            replies = run_chat(session)
            chats.append([(turn.ids, turn.usage.n_prompt, turn.usage.n_reused) for turn in session.turns])
            assert sum(reply.usage.slices_encoded for reply in replies) > 6
    assert chats[0] == chats[1]
    assert sum(len(ids) for ids, *_ in chats[0]) > 30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def from_models(folder: Path, store: Store) -> Engine:
    return open_engine(open_model(folder), TOKENIZER, store.get, context_rows=CONTEXT_ROWS)


class TestContract(EngineContract):
    """Several caches, rewinding, failing, resuming: as with the checkpoint's own graph."""

    @pytest.fixture
    def kit(self, store: Store, from_models: Engine) -> Kit:
        return Kit(lambda: forgotten(from_models), TOKENIZER, store, SPEC.llm.hidden_size)


def test_attention_and_rotation_are_fused(folder: Path) -> None:
    model = engine_of(folder)._compiled.get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in model.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == SPEC.llm.n_layers
    assert kinds.count("RoPE") == 2 * SPEC.llm.n_layers


def test_an_llm_without_states_gets_them(copy: Path, wanted: tuple[int, ...]) -> None:
    """As `optimum-cli export openvino --disable-stateful` leaves it: past_key_values.* in, present.* out."""
    transformations: Any = pytest.importorskip("openvino._offline_transformations")
    model = ov.Core().read_model(copy / "openvino_language_model.xml")
    transformations.stateful_to_stateless_transformation(model)
    for port in [*model.inputs, *model.outputs]:
        for name in port.get_names():
            if "present." in name and port in model.outputs:
                port.get_tensor().set_names({name})
    assert not model.get_sinks()
    save(model, copy / "openvino_language_model.xml")
    engine = engine_of(copy)
    assert answer(engine) == wanted
    again = run(engine, [Tokens((*PROMPT.ids[:40], 1, 2))], ENDLESS)
    assert (again.done.n_reused, again.ids) == (
        40,
        run(engine_of(copy), [Tokens((*PROMPT.ids[:40], 1, 2))], ENDLESS).ids,
    )


def save(model: ov.Model, path: Path) -> None:
    """Not while the old one is mapped."""
    other = path.with_name("other.xml")
    ov.save_model(model, other, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        other.with_suffix(suffix).replace(path.with_suffix(suffix))


@pytest.fixture(scope="module")
def encoder() -> OpenVinoEncoder:
    return OpenVinoEncoder(CHECKPOINT, SPEC.vision, PROPERTIES)


def resampler(kind: Any) -> ov.Model:
    """As exporters trace it: the mask is added to the scores, or is one of booleans."""
    vision = SPEC.vision
    shapes = {"image_feature": [-1, -1, vision.hidden_size], "pos_embed": [-1, -1, vision.output_size]}
    inputs = [openvino_graphs._parameter(shape, ov.Type.f32, name) for name, shape in shapes.items()]
    inputs.append(openvino_graphs._parameter([-1, -1], kind, "key_padding_mask"))
    mask = op.unsqueeze(inputs[2], op.constant([1, 2]))
    if kind == ov.Type.boolean:
        mask = op.select(mask, op.constant(np.float32(-3e38)), op.constant(np.float32(0)))
    keys = op.transpose(inputs[1], op.constant([1, 0, 2]))
    weights = openvino_graphs.Weights(CHECKPOINT)
    out = openvino_graphs._resample(weights, vision, inputs[0], mask, keys)
    return ov.Model([op.result(out)], inputs, "resampler")


@pytest.mark.parametrize("mask", ["ours", "added", "boolean"])
def test_padding_is_hidden_from_every_kind_of_resampler(
    folder: Path, tmp_path: Path, encoder: OpenVinoEncoder, mask: str
) -> None:
    path = folder / "openvino_resampler_model.xml"
    if mask != "ours":
        path = tmp_path / "resampler.xml"
        ov.save_model(resampler(ov.Type.boolean if mask == "boolean" else ov.Type.f32), path, compress_to_fp16=False)
    found = IrEncoder(folder / "openvino_vision_embeddings_model.xml", path, SPEC.vision, PROPERTIES)
    for shape in ((8, 8), (1, 1), (5, 12), (25, 2)):
        picture = pixels(*shape)
        alone = encoder.encode(picture)
        assert np.abs(found.encode(picture) - alone).max() < 1e-5
        assert np.abs(found.encode(picture, pad_to=300) - alone).max() < 2e-5


def test_padding_by_ones_is_hidden_from_ours_alone(folder: Path) -> None:
    """openvino_genai sends 1 for padding; exported graphs add it to the scores, where it hides nothing."""
    rng = np.random.default_rng(0)
    inputs = {
        "image_feature": rng.standard_normal((1, 20, SPEC.vision.hidden_size)).astype(np.float32),
        "pos_embed": np.zeros((20, 1, SPEC.vision.output_size), np.float32),
    }
    mask = np.zeros((1, 20), np.float32)
    mask[:, 12:] = 1
    errors = {}
    for name, model in (
        ("ours", ov.Core().read_model(folder / "openvino_resampler_model.xml")),
        ("exported", resampler(ov.Type.f32)),
    ):
        request = ov.Core().compile_model(model, "CPU", PROPERTIES).create_infer_request()
        found = request.infer({**inputs, "key_padding_mask": mask})[0].copy()
        right = request.infer({**inputs, "key_padding_mask": mask * np.float32(-3e38)})[0].copy()
        errors[name] = float(np.abs(found - right).max())
    assert errors["ours"] < 1e-5
    assert errors["exported"] > 1e-2


# --- weights ----------------------------------------------------------------------------------------------------


def test_int4_is_small_and_nearly_right(folder: Path, tmp_path: Path, wanted: tuple[int, ...]) -> None:
    if settings().max_examples < 1000:
        pytest.skip("deep runs only: NNCF takes ten seconds; tests/test_docs.py converts and asks in every run")
    pytest.importorskip("nncf")
    small = convert(tmp_path / "int4", "int4")
    names = ("openvino_language_model.bin", "openvino_vision_embeddings_model.bin")
    sizes = [(small / name).stat().st_size / (folder / name).stat().st_size for name in names]
    assert sizes[0] < 0.17  # its last layer, a sixth of it, is int8
    assert sizes[1] == pytest.approx(0.5, rel=0.02)  # float16
    types = {
        str(node.get_element_type())
        for node in ov.Core().read_model(small / "openvino_language_model.xml").get_ops()
        if node.get_type_name() == "Constant" and node.get_output_partial_shape(0).rank.get_length() > 1
    }
    assert "<Type: 'int4_t'>" in types
    assert answer(engine_of(small))[:3] == wanted[:3]


def test_rows_that_are_compressed_are_looked_up(tmp_path: Path) -> None:
    """8 bits and a scale per row, as optimum-intel compresses the table."""
    right = EmbedTable.open(SPEC.embed_table_path).rows(range(800))
    scales = np.abs(right).max(1, keepdims=True) / 127
    stored = op.convert(op.constant(np.round(right / scales).astype(np.int8)), "f32")
    ids = openvino_graphs._parameter([-1, -1], ov.Type.i64, "input")
    rows = op.gather(op.multiply(stored, op.constant(scales)), ids, op.constant(0))
    path = tmp_path / "table.xml"
    ov.save_model(ov.Model([op.result(rows)], [ids], "table"), path, compress_to_fp16=False)
    table, wanted = open_table(path), [3, 700, 3, 0]
    found = table.rows(wanted)
    assert 0 < np.abs(found - right[wanted]).max() < 0.01 * np.abs(right).max()
    assert (table.n_ids, table.width) == (800, 192)
    with pytest.raises(mmchat.PromptError, match="token id 800"):
        table.rows([800])


@pytest.mark.parametrize("kind", [ov.Type.f32, ov.Type.f16, ov.Type.bf16])
def test_a_table_of_floats_is_read_in_its_own_type(tmp_path: Path, kind: ov.Type) -> None:
    rows = np.array([[1.0, 2.0], [3.0, -0.5]], np.float32)
    ids = op.parameter(ov.PartialShape([-1, -1]), ov.Type.i64, "input")
    table = op.convert(op.constant(rows, dtype=kind), "f32")
    model = ov.Model([op.result(op.gather(table, ids, op.constant(np.array(0, np.int64))))], [ids], "table")
    ov.save_model(model, tmp_path / "table.xml", compress_to_fp16=False)
    np.testing.assert_array_equal(open_table(tmp_path / "table.xml").rows([1, 0]), rows[::-1])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("kind", ["F16", "F32", None])
def test_matrices_are_mapped_in_the_type_that_was_asked_for(tmp_path: Path, dtype: str, kind: str | None) -> None:
    values = (np.random.default_rng(0).standard_normal((5, 7)) * 3).astype(np.float32).view(np.uint32) >> 16 << 16
    array: NDArray[Any] = values.view(np.float32)
    data = array.tobytes() if dtype == "F32" else (values >> 16).astype(np.uint16).tobytes()
    write_tensors(tmp_path / "w.safetensors", {"w": (dtype, array.shape, [data])})
    weights = openvino_folder.stored_weights(Checkpoint(tmp_path), kind, tmp_path, lambda n: None)
    node = weights.matrix("w", slice(1, 4))
    stored = node if node.get_type_name() == "Constant" else node.input_value(0).get_node()
    assert (
        str(stored.get_element_type())
        == {
            "F16": "<Type: 'float16'>",
            "F32": "<Type: 'float32'>",
            "BF16": "<Type: 'bfloat16'>",
        }[kind or dtype]
    )
    compiled = ov.Core().compile_model(ov.Model([op.result(op.abs(node))], [], "m"), "CPU", PROPERTIES)
    np.testing.assert_allclose(compiled.create_infer_request().infer({})[0], np.abs(array[1:4]), rtol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_numbers_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    array = np.array([[1, 1e5]], np.float32)
    write_tensors(tmp_path / "w.safetensors", {"w": ("F32", (1, 2), [array.tobytes()])})
    weights = openvino_folder.stored_weights(Checkpoint(tmp_path), "F16", tmp_path, lambda n: None)
    with pytest.raises(ModelDirError, match="w: has values too large for float16; use --weights fp32"):
        weights.matrix("w")


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_takes_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "ir"
    out, _ = mmchat_command("convert", "openvino", "demo", target, "--weights", "fp32", "--dry-run", "--json")
    said = json.loads(out)
    assert said["writes"] == pytest.approx(sum(path.stat().st_size for path in folder.glob("*.bin")), rel=0.01)
    assert not target.exists()
    convert(target)
    for name in ("openvino_language_model", "openvino_resampler_model"):
        assert (target / f"{name}.bin").read_bytes() == (folder / f"{name}.bin").read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in target.glob("*.bin")}
    (target / "openvino_language_model.xml").unlink()
    left = target / ".openvino_language_model.tmp"
    left.mkdir()
    (left / "openvino_language_model.bin").write_bytes(b"half")
    convert(target)
    again = {path.name: path.stat().st_mtime_ns for path in target.glob("*.bin")}
    assert {name for name in times if times[name] != again[name]} == {"openvino_language_model.bin"}
    assert not left.exists()
    assert open_model(target).openvino is not None


def test_without_the_tokenizers_of_another_program_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """openvino_tokenizers of another release than openvino; the models are hours of work."""

    def fail(folder: Path) -> Any:
        raise RuntimeError("Cannot add extension:\n another release")

    monkeypatch.setattr(openvino_folder, "_has_tokenizers", lambda: True)
    monkeypatch.setattr(openvino_folder, "_tokenizers", fail)
    with caplog.at_level(logging.WARNING):
        openvino_folder.run(openvino_folder.plan(SPEC, "fp16"), tmp_path / "out", quiet)
    assert "is not written (Cannot add extension: another release)" in caplog.text
    assert open_model(tmp_path / "out").openvino is not None


GO = RUN + (
    "from pathlib import Path; from mmchat.convert import openvino_folder as step; from mmchat.model_dir import *\n"
    "step._has_tokenizers = lambda: False\n"
    "print('go', flush=True)\n"
    "step.run(step.plan(open_model('demo'), 'fp16'), Path(sys.argv[1]), lambda *_: None)"
)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    """kill -9, again and again, until one run is left alone; each in a process with other names for its nodes."""
    n_kills = 30 if settings().max_examples > 1000 else 2
    wanted = digests(convert(tmp_path / "wanted", "fp16"))
    rng, target = random.Random(0), tmp_path / "out"
    whole_s = interrupted = 0.0
    for i in range(n_kills + 2):
        with subprocess.Popen([sys.executable, "-c", GO, str(target)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"go\n"
            began = time.perf_counter()
            if 0 < i <= n_kills:
                time.sleep(rng.uniform(0, whole_s) if i > 1 else 0.05)  # the first is not over by then
                process.kill()
            interrupted += process.wait(timeout=120) != 0
        if i == 0:
            whole_s = time.perf_counter() - began
        if i % 3 == 0 and i <= n_kills:  # from the beginning again
            shutil.rmtree(target)
    assert interrupted
    assert digests(target) == wanted
    assert [path.name for path in target.glob(".*")] == [".mmchat-convert.json"]


def test_half_made_it_says_so_and_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill left of a model is removed before the disk is looked at."""
    target = shutil.copytree(folder, tmp_path / "half")
    (target / "config.json").unlink()
    left = target / ".openvino_language_model.tmp"
    left.mkdir()
    (left / "openvino_language_model.bin").write_bytes(bytes(1000))
    with pytest.raises(ModelDirError, match="half made; run the same command again"):
        open_model(target)
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "free_bytes", lambda folder: 0)
        with pytest.raises(DiskFull):
            convert(target)
    assert not left.exists()
    assert digests(convert(target)) == digests(folder)


def test_the_chat_template_is_the_one_that_prompts_are_made_of() -> None:
    jinja2: Any = pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A star."}]
    text = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    prompt = render([Message(m["role"], (Text(m["content"]),)) for m in messages], TOKENIZER, query_num=16)
    assert b"".join(map(TOKENIZER.token_bytes, prompt.ids)).decode() == text


def test_what_cannot_be_converted_is_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "weights are 'int2'" in refused("convert", "openvino", "demo", tmp_path / "x", "--weights", "int2")
    assert "not a checkpoint as published" in refused("convert", "openvino", folder, tmp_path / "x")
    source = sharded(tmp_path / "c", 1)
    plan = openvino_folder.plan(open_model(source), "fp32")
    with pytest.raises(ModelDirError, match="own folder"):
        openvino_folder.run(plan, source, quiet)
    with pytest.raises(ModelDirError, match="has files already"):
        openvino_folder.run(openvino_folder.plan(SPEC, "fp32"), source, quiet)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else 1)
    assert "needs the package nncf: pip install" in refused("convert", "openvino", "demo", tmp_path / "x")
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 60_000_000)
    with pytest.raises(DiskFull, match="make room"):
        openvino_folder.run(openvino_folder.plan(SPEC, "fp32"), tmp_path / "y", quiet)
    assert not (tmp_path / "x").exists()


# --- folders that are not whole ---------------------------------------------------------------------------------


def test_what_a_folder_lacks_is_named(copy: Path) -> None:
    (copy / "openvino_resampler_model.bin").unlink()
    with pytest.raises(ModelDirError, match=r"lacks openvino_resampler_model\.bin.*mmchat convert openvino"):
        open_model(copy)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda f: (f / "openvino_language_model.xml").write_text("<net/>"), "not a model that OpenVINO"),
    "other layers": (lambda f: edit(f, num_hidden_layers=5), "8 caches of .*; by config.json .* 10 caches"),
    "other heads": (lambda f: edit(f, num_key_value_heads=3), r"caches of \[\?,2,\?,32\]"),
    "another model": (lambda f: swap(f, "openvino_language_model", "openvino_resampler_model"), "has no input"),
    "no table": (lambda f: swap(f, "openvino_text_embeddings_model", "openvino_language_model"), "not a table"),
}


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def swap(folder: Path, name: str, other: str) -> None:
    for suffix in (".xml", ".bin"):
        shutil.copy(folder / f"{other}{suffix}", folder / f"{name}{suffix}")


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_whose_models_do_not_fit_is_refused(copy: Path, what: str) -> None:
    break_, said = BROKEN[what]
    break_(copy)
    spec = open_model(copy)
    assert spec.openvino
    with pytest.raises(ModelDirError, match=said):
        open_engine(spec, TOKENIZER, lambda key: None)


def test_an_encoder_of_another_layout_is_refused(copy: Path) -> None:
    swap(copy, "openvino_vision_embeddings_model", "openvino_resampler_model")
    with pytest.raises(ModelDirError, match="has no input patch_attention_mask, pixel_values, position_ids"):
        open_encoder(open_model(copy), 1)


def test_other_encoder_weights_are_another_encoder(copy: Path, folder: Path) -> None:
    """Their embeddings are kept apart in the store."""
    assert open_model(copy).encoder_digest == open_model(folder).encoder_digest
    path = copy / f"{IR_FILES['vision']}.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert open_model(copy).encoder_digest != open_model(folder).encoder_digest
