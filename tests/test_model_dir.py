"""model_dir: the demo model opens; whatever is missing or wrong in a folder is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmchat.checkpoint import read_header
from mmchat.embed_table import EmbedTable
from mmchat.errors import ModelDirError
from mmchat.model_dir import open_model

DEMO = Path(__file__).resolve().parents[1] / "mmchat" / "demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model that a test may break; the weights are linked, not copied."""
    copy = tmp_path / "my model"
    copy.mkdir()
    for path in DEMO.iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).symlink_to(path)
        elif path.is_file():
            shutil.copy(path, copy)
    return copy


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_the_demo_opens_by_name_and_by_folder(folder: Path) -> None:
    demo = open_model("demo")
    assert demo.name == "demo"
    assert demo.tokenizer_path.is_file()
    copy = open_model(folder)
    assert (copy.name, copy.folder) == ("my model", folder)
    assert (copy.llm, copy.vision, copy.slices, copy.sampling) == (demo.llm, demo.vision, demo.slices, demo.sampling)
    assert open_model(str(folder)).llm == demo.llm


def test_the_demos_numbers_fit_together() -> None:
    """And its files: the table has a row per id and is as wide as the model."""
    spec = open_model("demo")
    assert spec.vision.output_size == spec.llm.hidden_size == spec.llm.n_heads * spec.llm.head_size
    assert spec.slices.patch_size == spec.vision.patch_size
    assert spec.sampling.temperature == 0
    table = EmbedTable.open(spec.embed_table_path)
    assert (table.n_ids, table.width) == (spec.llm.vocab_size, spec.llm.hidden_size)


def test_a_folder_in_the_home_directory_opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_model("~/my model").folder == folder


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_every_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelDirError, match=name.replace("model.", r"\*\.")) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match=r"config\.json, preprocessor_config\.json, tokenizer\.json"):
        open_model(tmp_path)


def test_what_is_no_folder_is_named(folder: Path) -> None:
    for name in (folder / "none", folder / "config.json", "no such model"):
        with pytest.raises(ModelDirError, match="no such model folder"):
            open_model(name)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"demo"', b"\xff\xfe{}", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(folder: Path, name: str, text: str | bytes) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelDirError, match=rf"/{name}: not "):
        open_model(folder)


INTEGERS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings", "query_num",
]  # fmt: skip
VISION = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"]


@pytest.mark.parametrize("name", INTEGERS)
def test_every_number_of_the_config_is_checked(folder: Path, name: str) -> None:
    whole = (folder / "config.json").read_text()
    for bad in (0, -1, 1.5, "8", None, True, [8]):
        (folder / "config.json").write_text(json.dumps({**json.loads(whole), name: bad}))
        with pytest.raises(ModelDirError, match=rf"config\.json: '{name}' is "):
            open_model(folder)
    (folder / "config.json").write_text(whole)
    change(folder / "config.json", lambda config: config.pop(name))
    with pytest.raises(ModelDirError, match=f"'{name}' is None"):
        open_model(folder)


@pytest.mark.parametrize("name", VISION)
def test_every_number_of_the_vision_config_is_checked(folder: Path, name: str) -> None:
    change(folder / "config.json", lambda config: config["vision_config"].update({name: 0}))
    with pytest.raises(ModelDirError, match=f"'{name}' is 0"):
        open_model(folder)
    change(folder / "config.json", lambda config: config["vision_config"].pop(name))
    with pytest.raises(ModelDirError, match=f"'{name}' is None"):
        open_model(folder)
    change(folder / "config.json", lambda config: config.pop("vision_config"))
    with pytest.raises(ModelDirError, match="'vision_config'"):
        open_model(folder)


@pytest.mark.parametrize("name", ["max_slice_nums", "scale_resolution", "patch_size"])
def test_every_number_of_the_processor_is_checked(folder: Path, name: str) -> None:
    change(folder / "preprocessor_config.json", lambda config: config.update({name: "nine"}))
    with pytest.raises(ModelDirError, match=rf"preprocessor_config\.json: '{name}' is 'nine'"):
        open_model(folder)


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("bad", [0, -1e-6, "1e6", None, True, float("nan"), float("inf")])
def test_every_fraction_is_checked(folder: Path, name: str, bad: Any) -> None:
    change(folder / "config.json", lambda config: config.update({name: bad}))
    with pytest.raises(ModelDirError, match=f"'{name}' is "):
        open_model(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c.update(model_type="llava"), "model_type is 'llava'"),
        (lambda c: c.pop("model_type"), "model_type is None"),
        (lambda c: c.update(num_attention_heads=7), "attention heads do not divide"),
        (lambda c: c.update(num_key_value_heads=4), "attention heads do not divide"),
        (lambda c: c.update(resampler_num_heads=7), "resampler heads do not divide"),
        (lambda c: c.update(resampler_num_heads=0), "'resampler_num_heads' is 0"),
        (lambda c: c["vision_config"].update(num_attention_heads=7), "vision attention heads do not divide"),
        (lambda c: c["vision_config"].update(patch_size=16), "patch_size is 16 here and 14 in the processor"),
        (lambda c: c["vision_config"].update(image_size=13), "image_size"),
    ],
)
def test_values_that_do_not_fit_together_are_named(
    folder: Path, edit: Callable[[dict[str, Any]], object], named: str
) -> None:
    change(folder / "config.json", edit)
    with pytest.raises(ModelDirError, match=named):
        open_model(folder)


def test_a_resolution_below_the_patch_size_is_named(folder: Path) -> None:
    change(folder / "preprocessor_config.json", lambda config: config.update(scale_resolution=13))
    with pytest.raises(ModelDirError, match="scale_resolution"):
        open_model(folder)


def test_sampling_is_the_folders_or_the_published_chats(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text('{"do_sample": true, "top_p": 0.5}')
    sampling = open_model(folder).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.7, 0.5, 100, 1.05)
    path.write_text('{"do_sample": false, "repetition_penalty": 1.2, "max_new_tokens": 7}')
    sampling = open_model(folder).sampling
    assert (sampling.temperature, sampling.repetition_penalty, sampling.max_new_tokens) == (0, 1.2, 7)
    path.unlink()
    assert open_model(folder).sampling.top_p == 0.8
    path.write_text('{"temperature": "hot"}')
    with pytest.raises(ModelDirError, match=r"generation_config\.json: temperature is 'hot'"):
        open_model(folder)


def test_image_ids_are_the_configs_choice(folder: Path) -> None:
    assert open_model(folder).use_image_id
    change(folder / "config.json", lambda config: config.update(use_image_id=False))
    assert not open_model(folder).use_image_id
    change(folder / "config.json", lambda config: config.pop("use_image_id"))
    assert open_model(folder).use_image_id


# --- the encoder's digest ---------------------------------------------------------------------------------------


def test_the_digest_is_the_encoders_content(folder: Path) -> None:
    """One changed bit in any vision tensor gives another digest; a change in any other tensor does not."""
    original = open_model("demo").encoder_digest
    assert open_model(folder).encoder_digest == original
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()  # a link to the demo's own file
    weights.write_bytes(data)
    seen = {original}
    n_vision = 0
    with weights.open("r+b", buffering=0) as file:
        for name, info in read_header(weights).items():
            at = info.start if len(seen) % 2 else info.end - 1
            file.seek(at)
            file.write(bytes([data[at] ^ 1]))
            digest = open_model(folder).encoder_digest
            file.seek(at)
            file.write(data[at : at + 1])
            if name.startswith(("vpm.", "resampler.")):
                assert digest not in seen, name
                seen.add(digest)
                n_vision += 1
            else:
                assert digest == original, name
    assert n_vision > 50
    assert open_model(folder).encoder_digest == original


def test_the_digest_covers_the_encoders_dimensions(folder: Path) -> None:
    """The same weights read with other heads make other embeddings; the LLM's sizes do not matter."""
    original = open_model(folder).encoder_digest
    change(folder / "config.json", lambda config: config.update(rope_theta=5.0, max_position_embeddings=99))
    assert open_model(folder).encoder_digest == original
    change(folder / "config.json", lambda config: config.update(resampler_num_heads=4))
    assert open_model(folder).encoder_digest != original


def test_the_digest_does_not_depend_on_where_the_folder_is(folder: Path) -> None:
    moved = folder.rename(folder.with_name("elsewhere"))
    assert open_model(moved).encoder_digest == open_model("demo").encoder_digest
