"""convert board: a folder that opens, in steps that are done once, whatever stands in between.

With stand-ins for both toolkits (tests/toolkits); the real rknn-toolkit2 is tried in test_vision_rknn.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from mmchat import outputs
from mmchat.checkpoint import Checkpoint
from mmchat.convert import board, llm_rkllm
from mmchat.convert.steps import WORK
from mmchat.errors import DiskFull, ModelDirError, OptionError, ToolkitError
from mmchat.half_made import BOARD_STATE
from mmchat.model_dir import check_digests, open_model
from mmchat.prompt import ChatTokenizer
from tests.test_cli import mmchat_command, refused
from tests.test_convert import RUN, digests, quiet, sharded
from tests.toolkits import write_python

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
OPTIONS = llm_rkllm.Options("rk3588", "w8a8", max_context=1024)


def convert(folder: Path, checkpoint: Path | str = "demo", told: list[str] | None = None, **words: Any) -> list[str]:
    """What it told.  words: of board.plan."""
    told = [] if told is None else told
    python = folder.parent / "python"
    if not python.exists():
        write_python(python)
    given = {"rknn_python": lambda: python, "rkllm_python": lambda: python, **words}
    options = given.pop("options", OPTIONS)
    board.run(board.plan(checkpoint, options, **given), folder, told.append, quiet)
    return told


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one; not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "board"
    convert(folder)
    return folder


def test_the_folder_opens_and_says_what_it_is(made: Path) -> None:
    spec = open_model(made)
    check_digests(spec)
    assert spec.board is not None
    assert spec.board.rknn is not None
    assert (spec.board.vision_mode, spec.board.rknn.n_patches, spec.slices.max_patches) == ("navit", 80, 80)
    assert spec.llm.context_rows == 1024
    assert spec.board.stop_ids == ChatTokenizer(spec.tokenizer_path).stop_ids
    assert spec.sampling == open_model("demo").sampling
    assert sorted(os.listdir(made)) == [
        ".mmchat-board.json", "config.json", "conversion.json", "embed_table.safetensors", "generation_config.json",
        "mmchat.json", "model.rkllm", "preprocessor_config.json", "tokenizer.json", "vision.rknn",
        "vision_positions.safetensors",
    ]  # fmt: skip
    report = json.loads((made / "conversion.json").read_text())
    assert report["encoder"]["simulator_against_onnx"][0]["cosine"] > 0.999
    assert report["LLM"]["max_context"] == 1024


def test_what_is_done_is_not_done_again(made: Path, tmp_path: Path) -> None:
    """Unless its file is damaged or gone, or it is asked for with other options."""
    folder = tmp_path / "board"
    shutil.copytree(made, folder)
    wanted = digests(folder)
    done = [f"{step}: done before" for step in ("small files", "embedding table", "encoder", "LLM")]
    assert [line for line in convert(folder) if not line.startswith("checking")] == done
    assert convert(folder, skip=("llm",)) == done[:-1]
    assert digests(folder) == wanted
    data = bytearray((folder / "embed_table.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "embed_table.safetensors").write_bytes(data)
    (folder / "model.rkllm").unlink()
    told = convert(folder)
    assert [line for line in told if line.endswith("done before")] == [
        "small files: done before",
        "encoder: done before",
    ]
    assert digests(folder) == wanted
    told = convert(folder, options=llm_rkllm.Options("rk3588", "w8a8_g128", max_context=1024))
    assert "LLM: done before" not in told
    assert json.loads((folder / "conversion.json").read_text())["LLM"]["dtype"] == "w8a8_g128"
    model = (folder / "model.rkllm").read_bytes()
    convert(folder, llm=folder / "model.rkllm")  # its own, as somebody's
    assert (folder / "model.rkllm").read_bytes() == model


def test_without_rkllm_toolkit_the_folder_is_finished_later(tmp_path: Path) -> None:
    """It is told what is missing, and with somebody's model, which must not be touched, it is whole."""
    folder = tmp_path / "board"
    env = {"MMCHAT_RKNN_PYTHON": str(write_python(tmp_path / "python")), "MMCHAT_RKLLM_PYTHON": ""}
    words = ("convert", "board", "demo", folder, "--target", "rk3588", "--max-context", "1024")
    out, _ = mmchat_command(*words, "--skip", "llm", "--dry-run", "--json", env=env)
    said = json.loads(out)
    assert [step["name"] for step in said["steps"]] == ["small files", "embedding table", "encoder"]
    assert "model.rkllm" in said["lacks"][0]
    assert not folder.exists()
    out, err = mmchat_command(*words, env=env, code=1)
    assert "--rkllm-python or $MMCHAT_RKLLM_PYTHON" in err
    assert not (folder / "vision.rknn").exists(), "it worked before it looked for its toolkits"
    out, err = mmchat_command(*words, "--skip", "llm", env=env)
    assert out == f"{folder}\n"
    assert "the folder is not complete: it lacks model.rkllm, the LLM: mmchat convert llm-rkllm" in err
    with pytest.raises(ModelDirError, match=r"convert board began; it has small files.* lacks model\.rkllm"):
        open_model(folder)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"an LLM")
    (tmp_path / "theirs.rkllm").symlink_to("blobs/abc")  # as the hub's cache has it
    out, err = mmchat_command(*words, "--llm", tmp_path / "theirs.rkllm", env=env)
    assert "encoder: done before" in err
    assert open_model(folder).board is not None
    assert (tmp_path / "theirs.rkllm").read_bytes() == b"an LLM"
    assert not (folder / "model.rkllm").is_symlink()


def test_without_rknn_toolkit_the_cpu_encodes(tmp_path: Path) -> None:
    folder = tmp_path / "board"

    def no() -> Path:
        raise ToolkitError("none here")

    with pytest.raises(ToolkitError):
        convert(folder, rknn_python=no)
    convert(folder, rknn_python=no, skip=("vision",))
    spec = open_model(folder)
    assert spec.board is not None
    assert spec.board.vision_mode == "openvino"
    source, cut = Checkpoint(open_model("demo").folder), Checkpoint(spec.folder)
    for name in source:
        if name.startswith(("vpm.", "resampler.")):
            np.testing.assert_array_equal(cut.array(name), source.array(name))
    convert(folder)  # the toolkit was installed
    assert not (folder / "vision.safetensors").exists()
    assert open_model(folder).encoder_digest != spec.encoder_digest


def test_a_full_disk_is_told_before_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 51_000_000)  # for the table, but not for all
    with pytest.raises(DiskFull, match="make room"):
        convert(tmp_path / "board")
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == [BOARD_STATE, WORK]


def test_what_a_killed_step_left_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is looked at before hours of work, but not for what is written already."""
    folder = tmp_path / "board"
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "free_bytes", lambda folder: 51_000_000)
        with pytest.raises(DiskFull):
            convert(folder)
        left = folder / WORK / "model.rkllm.qwen2.tmp"
        left.write_bytes(bytes(60_000_000))
        told: list[str] = []
        with contextlib.suppress(DiskFull):  # of a later step, which has no room
            convert(folder, told=told)
    assert told[0].startswith("small files: ")
    convert(folder)
    assert not (folder / WORK).exists()


def test_no_place_for_a_folder(tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "c", 1)
    before = digests(checkpoint)
    with pytest.raises(ModelDirError, match="own folder"):
        convert(checkpoint, checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(ModelDirError, match="has files already"):
        convert(tmp_path / "full", checkpoint)
    assert digests(checkpoint) == before
    with pytest.raises(OptionError, match="table cannot be skipped"):
        convert(tmp_path / "b", checkpoint, skip=("table",))
    with pytest.raises(ModelDirError, match="no such file"):
        convert(tmp_path / "b", checkpoint, llm=tmp_path / "no.rkllm")
    words = ("convert", "board", "demo", tmp_path / "b", "--target", "rk3588", "--dtype", "w4a16")
    assert "w8a8_g128" in refused(*words, code=2)


GO = RUN + (
    "from pathlib import Path; from mmchat.convert import board, llm_rkllm\n"
    "print('go', flush=True)\n"
    "folder, python = map(Path, sys.argv[1:])\n"
    "options = llm_rkllm.Options('rk3588', 'w8a8', max_context=1024)\n"
    "plan = board.plan('demo', options, rknn_python=lambda: python, rkllm_python=lambda: python)\n"
    "board.run(plan, folder, lambda line: None, lambda *_: None)"
)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files(made: Path, tmp_path: Path) -> None:
    """kill -9, again and again, until one run is left alone."""
    n_kills = 50 if settings().max_examples > 1000 else 3
    folder, python = tmp_path / "board", write_python(tmp_path / "python")

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", GO, str(folder), str(python)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        return process

    rng, interrupted, longest_s = random.Random(0), 0, 1.0
    for i in range(n_kills):
        if i % 6 == 0:  # from the beginning again
            shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        with start() as process:
            try:
                process.wait(timeout=rng.uniform(0, longest_s) if i else 0.05)  # the first is not over by then
                longest_s = max(1.0, time.perf_counter() - began)
            except subprocess.TimeoutExpired:
                process.kill()
                longest_s *= 1.1
            interrupted += process.wait(timeout=120) != 0
    with start() as process:
        assert process.wait(timeout=240) == 0
    assert interrupted
    assert digests(folder) == digests(made)
    check_digests(open_model(folder))
    assert not (folder / WORK).exists()
    print(f"{interrupted} of {n_kills} runs were killed")
