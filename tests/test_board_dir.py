"""model_dir on a board's folder: it opens; whatever is missing, foreign or damaged is named with its cure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmchat.checkpoint import write_tensors
from mmchat.errors import ModelDirError
from mmchat.model_dir import MARGIN_ROWS, POSITIONS, RknnSpec, check_digests, open_model
from mmchat.rkllm_detect import LIBRARY
from mmchat.runtime import find_library
from tests.rkllm_standin.__main__ import (
    LLM,
    N_PATCHES,
    POSITION_TABLE,
    RKNN,
    TABLE,
    VISION,
    VISION_MODES,
    write_board_folder,
)
from tests.rkllm_standin.build import library


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for every kind of encoder."""
    library("1.3.0")  # skips where there is no compiler
    return {mode: write_board_folder(tmp_path_factory.mktemp(mode), "1.3.0", vision=mode) for mode in VISION_MODES}


def breakable(folder: Path, copy: Path) -> Path:
    """A copy that a test may break; large files are linked."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, copy)
        elif path.is_file():
            os.link(path, copy / path.name)
    return copy


@pytest.fixture
def folder(written: dict[str, Path], tmp_path: Path) -> Path:
    return breakable(written["openvino"], tmp_path / "board")


@pytest.fixture
def navit(written: dict[str, Path], tmp_path: Path) -> Path:
    return breakable(written["navit"], tmp_path / "navit")


@pytest.fixture
def square(written: dict[str, Path], tmp_path: Path) -> Path:
    return breakable(written["square"], tmp_path / "square")


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


def test_encoders_for_the_npu(navit: Path, square: Path) -> None:
    spec, other = open_model(navit), open_model(square)
    assert spec.board is not None
    assert other.board is not None
    assert spec.board.rknn == RknnSpec("0_1_2", n_patches=N_PATCHES, positions_path=navit / POSITION_TABLE)
    assert spec.slices.max_patches == N_PATCHES
    assert other.board.rknn == RknnSpec("0_1_2", side=112)
    assert other.slices == open_model("demo").slices
    for one in (spec, other):
        check_digests(one)
    change(navit, lambda values: (values["vision"].update(cores="0"), values["slices"].pop("max_patches")))
    spec = open_model(navit)
    assert spec.board is not None
    assert spec.board.rknn is not None
    assert (spec.board.rknn.cores, spec.slices.max_patches) == ("0", N_PATCHES)


def test_another_rknn_encoder_is_another_encoder(navit: Path, square: Path) -> None:
    digests = [open_model(one).encoder_digest for one in ("demo", navit, square)]
    change(navit, lambda values: values["files"][RKNN].update(sha256="0" * 64))
    digests.append(open_model(navit).encoder_digest)
    change(navit, lambda values: values["files"][POSITION_TABLE].update(sha256="0" * 64))
    digests.append(open_model(navit).encoder_digest)
    assert len(set(digests)) == 5


def test_an_encoder_without_a_digest_is_known_by_itself(square: Path) -> None:
    def described(digest: str | None) -> list[str]:
        change(square, lambda values: values["files"][RKNN].update(sha256=digest))
        check_digests(open_model(square))
        found = []
        for last in b"ab":
            data = (square / RKNN).read_bytes()
            (square / RKNN).unlink()
            (square / RKNN).write_bytes(data[:-1] + bytes([last]))
            found.append(open_model(square).encoder_digest)
        return found

    assert len(set(described(""))) == 2
    assert described("") == described(None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["vision"].update(cores="4"), "vision.cores is '4'; known are auto, 0, 1"),
        (lambda v: v["vision"].pop("patches"), "'patches' is None; a whole number"),
        (lambda v: v["vision"].update(patches=True), "'patches' is True"),
        (lambda v: v["slices"].update(max_patches=81), "slices.max_patches is 81, but vision.patches, .*, 80"),
        (lambda v: v["vision"].pop("positions"), 'vision.positions is None, which its "files" does not list'),
        (lambda v: v["vision"].update(positions="../x"), "vision.positions is '../x'"),
        (lambda v: v["vision"].update(positions=TABLE), f"{TABLE}: vpm.* is not there; floats of \\(256, 160\\)"),
        (lambda v: v["vision"].update(positions=RKNN), f"{RKNN}: not a safetensors file"),
        (lambda v: v["vision"].update(file=TABLE), f"{TABLE}: is no RKNN model .it begins with b'.*copy the encoder"),
        (lambda v: v["vision"].update(mode="square", side=0), "'side' is 0"),
        (
            lambda v: v["vision"].update(mode="square"),
            "takes 1x80x588, 1x80x160, 1x1x80, 1x80x192; by mmchat.json .* 1x112x112x3$",
        ),
        (lambda v: v["vision"].update(patches=81), "takes 1x80x588, .*; by mmchat.json .* 1x81x588"),
    ],
)
def test_what_an_encoder_for_the_npu_lacks(navit: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(navit, edit)
    with pytest.raises(ModelDirError, match=message):
        open_model(navit)


def test_a_table_of_positions_of_another_model(navit: Path) -> None:
    path = navit / POSITION_TABLE
    path.unlink()
    write_tensors(path, {POSITIONS: ("F16", (64, 160), [bytes(64 * 160 * 2)])})
    change(navit, lambda values: values["files"][path.name].update(bytes=path.stat().st_size))
    with pytest.raises(ModelDirError, match=r"is F16 \(64, 160\); floats of \(256, 160\) are needed"):
        open_model(navit)


def test_an_encoder_of_another_model(navit: Path) -> None:
    config = json.loads((navit / "config.json").read_text())
    (navit / "config.json").write_text(json.dumps({**config, "query_num": 64}))
    change(navit, lambda values: values["files"]["config.json"].update(bytes=(navit / "config.json").stat().st_size))
    with pytest.raises(ModelDirError, match=f"{RKNN}: gives 1x16x192; by config.json .* 1x64x192"):
        open_model(navit)


@pytest.mark.parametrize(
    ("name", "cure"),
    [(RKNN, "copy the encoder here"), (POSITION_TABLE, f"the safetensors file here that has {POSITIONS}")],
)
def test_a_missing_part_of_an_encoder_is_named_with_its_cure(navit: Path, name: str, cure: str) -> None:
    (navit / name).unlink()
    with pytest.raises(ModelDirError, match=f"lacks {name}; .*{cure}"):
        open_model(navit)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        (LLM, "mmchat convert llm-rkllm makes it"),
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
        (lambda v: v["files"].update({"a\0b": {"bytes": 3}}), "lacks a\0b"),
        (lambda v: v["llm"].update(base_domain_id="one"), "'base_domain_id' is 'one'; a whole number >= 0 is needed"),
        (lambda v: v.update(stop_ids=151645), "'stop_ids' is 151645; a list of whole numbers"),
        (lambda v: v.update(stop_ids=[[1]]), r"'stop_ids' is \[\[1\]\]; a list of whole numbers"),
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


def test_the_library_is_looked_for_where_doctor_looks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMCHAT_RKLLM_LIB", raising=False)
    spec = open_model(folder)
    places = [spec.folder, tmp_path / "lib", tmp_path / "local"]
    monkeypatch.setattr("mmchat.runtime.LIBRARY_FOLDERS", tuple(map(str, places[1:])))
    (spec.folder / LIBRARY).unlink(missing_ok=True)
    with pytest.raises(ModelDirError, match=f"{places[1]}/{LIBRARY}, {places[2]}/{LIBRARY} are not there"):
        find_library(spec)
    for place in reversed(places):
        place.mkdir(exist_ok=True)
        (place / LIBRARY).write_bytes(b"")
        assert find_library(spec) == place / LIBRARY
