"""Folders in the layout that people have already: qwen.rkllm, vision_transformer.rknn and no mmchat.json."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmchat
from mmchat.errors import ModelDirError
from mmchat.model_dir import MARGIN_ROWS, ModelSpec, check_digests, open_model
from mmchat.profile import Profile
from tests.conversation import GREEDY, picture
from tests.rkllm_standin.__main__ import LIBRARY, LLM, RKNN, TABLE, write_board_folder
from tests.rkllm_standin.build import library
from tests.rknn_standin.model import LITE2, write_encoder

DEMO = open_model("demo")
RENAMED = {LLM: "qwen.rkllm", RKNN: "vision_transformer.rknn"}


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library("1.2.1-1.2.3")  # skips where there is no compiler
    return write_board_folder(tmp_path_factory.mktemp("square"), "1.2.1-1.2.3", vision="square")


@pytest.fixture
def folder(square: Path, tmp_path: Path) -> Path:
    """As people have it, given an embedding table."""
    found = tmp_path / "their model"
    found.mkdir()
    for path in square.iterdir():
        if path.is_file() and path.name != "mmchat.json":
            os.link(path, found / RENAMED.get(path.name, path.name))
    return found


@pytest.fixture
def lite2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(LITE2))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "rknnlite"]:
        del sys.modules[name]


def test_it_opens(folder: Path, square: Path) -> None:
    spec, described = open_model(folder), open_model(square)
    assert spec.board is not None
    assert (spec.board.llm_path.name, spec.board.vision_path.name) == tuple(RENAMED.values())
    assert spec.embed_table_path.name == TABLE
    assert (spec.board.vision_mode, spec.board.rknn) == ("square", described.board and described.board.rknn)
    assert (spec.name, spec.context_rows) == ("their model", DEMO.llm.context_rows - MARGIN_ROWS)
    assert (spec.llm, spec.slices, spec.sampling) == (described.llm, described.slices, described.sampling)
    check_digests(spec)  # of nothing


@pytest.mark.usefixtures("lite2")
def test_it_chats_as_the_described_folder_does(folder: Path, square: Path, tmp_path: Path) -> None:
    answers = []
    for model in (folder, square):
        with mmchat.open(model, store=tmp_path / f"store {model.name}", n_threads=1) as runtime:
            session = runtime.session()
            assert session.ask("What colour is the circle?", picture(0), **GREEDY).text
            assert session.ask("And in this one?", picture(1), **GREEDY).text
            answers.append([turn.ids for turn in session.turns])
    assert answers[0] == answers[1]


def test_other_files_are_another_encoder_and_another_profile(folder: Path) -> None:
    before = open_model(folder)
    digest, key = before.encoder_digest, Profile.open(before, folder / LIBRARY).key
    for name in RENAMED.values():
        data = bytearray((folder / name).read_bytes())
        data[100] ^= 1
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    after = open_model(folder)
    assert after.encoder_digest != digest
    assert Profile.open(after, folder / LIBRARY).key != key


def test_files_of_other_names_are_found_where_there_is_one_of_a_kind(folder: Path) -> None:
    (folder / "qwen.rkllm").rename(folder / "MiniCPM-V-2_6_w8a8.rkllm")
    (folder / "vision_transformer.rknn").rename(folder / "encoder.rknn")
    (folder / TABLE).rename(folder / "model-00001-of-00004.safetensors")
    found = paths(open_model(folder))
    assert found == ["MiniCPM-V-2_6_w8a8.rkllm", "model-00001-of-00004.safetensors", "encoder.rknn"]
    shutil.copy(folder / "encoder.rknn", folder / "older.rknn")
    with pytest.raises(ModelDirError, match=r"several \*\.rknn \(encoder\.rknn, older\.rknn\); keep one, or name"):
        open_model(folder)
    (folder / "older.rknn").rename(folder / "vision_transformer.rknn")
    assert paths(open_model(folder))[2] == "vision_transformer.rknn"
    shutil.copy(folder / "model-00001-of-00004.safetensors", folder / "again.safetensors")
    with pytest.raises(ModelDirError, match=r"again\.safetensors and model-.* have an embedding table; keep one"):
        open_model(folder)


def paths(spec: ModelSpec) -> list[str]:
    assert spec.board is not None
    return [path.name for path in (spec.board.llm_path, spec.board.table_path, spec.board.vision_path)]


def test_everything_that_is_missing_is_named_with_what_makes_it(folder: Path) -> None:
    for name in (TABLE, "tokenizer.json", "config.json", "vision_transformer.rknn"):
        (folder / name).unlink()
    with pytest.raises(ModelDirError) as caught:
        open_model(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}: has a model for RKLLM, but lacks config.json, tokenizer.json (huggingface-cli ")
    assert f"download openbmb/MiniCPM-V-2_6 config.json tokenizer.json --local-dir '{folder}' fetches" in text
    assert f"mmchat convert table CHECKPOINT {folder / 'embed_tokens.safetensors'} makes it" in text
    assert "vision_transformer.rknn (copy it here; mmchat convert board" in text


def test_an_encoder_that_needs_its_description_says_so(folder: Path) -> None:
    (folder / "vision_transformer.rknn").unlink()
    write_encoder(DEMO, folder / "vision_transformer.rknn", "navit", n_patches=80)
    with pytest.raises(ModelDirError, match=r"not a square picture; an encoder of mmchat's needs the mmchat\.json"):
        open_model(folder)


def test_a_checkpoint_with_a_model_for_rkllm_beside_it_stays_one(tmp_path: Path, square: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DEMO.folder, checkpoint)
    os.link(square / LLM, checkpoint / "qwen.rkllm")
    assert open_model(checkpoint).board is None
    os.link(square / RKNN, checkpoint / "vision_transformer.rknn")  # now it is for the board
    assert paths(open_model(checkpoint)) == ["qwen.rkllm", "model.safetensors", "vision_transformer.rknn"]
