"""model_dir on a board's folder: it opens; whatever is missing, foreign or damaged is named with its cure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmchat.errors import ModelDirError
from mmchat.model_dir import MARGIN_ROWS, check_digests, open_model
from tests.rkllm_standin.__main__ import LLM, TABLE, VISION, write_board_folder
from tests.rkllm_standin.build import library


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library("1.3.0")  # skips where there is no compiler
    return write_board_folder(tmp_path_factory.mktemp("board"), "1.3.0")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may break; large files are linked."""
    copy = tmp_path / "board"
    copy.mkdir()
    for path in written.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, copy)
        else:
            os.link(path, copy / path.name)
    return copy


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "mmchat.json").read_text())
    edit(values)
    (folder / "mmchat.json").write_text(json.dumps(values))


def test_it_opens_and_is_the_checkpoint_it_was_made_from(folder: Path) -> None:
    spec, demo = open_model(folder), open_model("demo")
    assert spec.board is not None
    assert (spec.llm, spec.vision, spec.slices, spec.sampling) == (demo.llm, demo.vision, demo.slices, demo.sampling)
    assert spec.encoder_digest == demo.encoder_digest  # so that embeddings in a store serve both
    assert (spec.board.llm_path.name, spec.embed_table_path.name) == (LLM, TABLE)
    assert (demo.context_rows, spec.context_rows) == (demo.llm.context_rows, demo.llm.context_rows - MARGIN_ROWS)
    assert spec.name == "demo (stand-in)"
    check_digests(spec)


def test_another_rknn_encoder_is_another_encoder(folder: Path) -> None:
    change(folder, lambda values: values["vision"].update(mode="square"))
    square = open_model(folder).encoder_digest
    change(folder, lambda values: values["files"][VISION].update(sha256="0" * 64))
    assert len({square, open_model(folder).encoder_digest, open_model("demo").encoder_digest}) == 3


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        (LLM, "rkllm-toolkit converts it"),
        (TABLE, f"mmchat convert table CHECKPOINT {TABLE} makes it"),
        (VISION, "copy the encoder"),
        ("tokenizer.json", "from the published checkpoint"),
    ],
)
def test_what_is_missing_is_named_with_its_cure(folder: Path, name: str, cure: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelDirError, match=f"lacks {name}.*{cure}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(format=2), "format is 2"),
        (lambda v: v.update(hidden_size=7), "hidden_size is 7, but 192"),
        (lambda v: v.update(context_rows=4096), "context_rows is 4096; it must be .* at most the model's 2048"),
        (lambda v: v.update(context_rows=8), "context_rows is 8"),
        (lambda v: v.pop("llm"), "has no 'llm'; this is not a board's folder"),
        (lambda v: v["llm"].update(engine="onnx"), "llm.engine is 'onnx'"),
        (lambda v: v["llm"].update(file="other.rkllm"), "llm.file is 'other.rkllm'"),
        (lambda v: v["vision"].update(mode="round"), "vision.mode is 'round'"),
        (lambda v: v["files"][LLM].update(bytes=3), f"{LLM}: has .* bytes, not 3; copy it again"),
        (lambda v: v["files"].update({LLM: 5}), "'bytes' is None"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(folder, edit)
    with pytest.raises(ModelDirError, match=message):
        open_model(folder)


def test_damage_that_keeps_the_size_is_found_when_asked_for(folder: Path) -> None:
    change(folder, lambda values: values["files"][LLM].update(sha256="0" * 64))
    spec, read = open_model(folder), list[str]()
    with pytest.raises(ModelDirError, match=f"{LLM}: damaged"):
        check_digests(spec, read.append)
    assert read == [LLM]
