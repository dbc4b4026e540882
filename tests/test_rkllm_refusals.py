"""What cannot work is refused before rkllm_init, in one line that says why: through the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mmchat
from mmchat.checkpoint import write_tensors
from mmchat.cli import app
from mmchat.errors import ModelDirError
from tests.rkllm_standin.__main__ import LIBRARY, LLM, TABLE
from tests.rkllm_standin.build import library


def describe(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "mmchat.json").read_text())
    edit(values)
    (folder / "mmchat.json").write_text(json.dumps(values))


def replace(path: Path, data: bytes) -> None:
    """Not through the link that a test's folder has."""
    path.unlink()
    path.write_bytes(data)


def cut_library(folder: Path) -> None:
    replace(folder / LIBRARY, (folder / LIBRARY).read_bytes()[:5000])


def cut_model(folder: Path) -> None:
    replace(folder / LLM, (folder / LLM).read_bytes()[:5000])


def old_library(folder: Path) -> None:
    replace(folder / LIBRARY, library("1.1").read_bytes())


def narrow_table(folder: Path) -> None:
    (folder / TABLE).unlink()
    rows = np.zeros((592, 64), np.float16)
    write_tensors(folder / TABLE, {"embed_tokens.weight": ("F16", rows.shape, [rows.tobytes()])})
    describe(folder, lambda values: values["files"][TABLE].update(bytes=(folder / TABLE).stat().st_size))


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, str], list[str], str]] = {
    "a family that all findings speak against": (
        lambda folder: None, {"MMCHAT_RKLLM_FAMILY": "1.2.3"}, [],
        r"RKLLM 1\.2\.1-1\.2\.3 was named \(MMCHAT_RKLLM_FAMILY\), but all that was found agrees on 1\.3\.0",
    ),
    "a family that needs functions the library lacks": (
        old_library, {"MMCHAT_RKLLM_FAMILY": "1.3.0"}, [], r"cannot be RKLLM 1\.3\.0, for it lacks rkllm_c",
    ),
    "a family that there is none of": (
        lambda folder: None, {"MMCHAT_RKLLM_FAMILY": "9"}, [], "RKLLM family '9' is not known; known are 1\\.1, 1\\.2",
    ),
    "no library": (
        lambda folder: (folder / LIBRARY).unlink(), {}, [], "no RKLLM library: .* copy the board's librkllmrt.so into",
    ),
    "a library that is not where it was named": (
        lambda folder: None, {"MMCHAT_RKLLM_LIB": "/nowhere.so"}, [], "no RKLLM library: /nowhere.so is not there",
    ),
    "a truncated library": (cut_library, {}, [], "truncated or damaged .5000 bytes.; copy it again"),
    "no model": (lambda folder: (folder / LLM).unlink(), {}, [], f"lacks {LLM}; mmchat convert llm-rkllm makes it"),
    "a truncated model": (cut_model, {}, [], f"{LLM}: has 5000 bytes, not [0-9]+; copy it again"),
    "a table of another width than the model": (
        narrow_table, {}, [], f"{TABLE}: rows 592 x 64, but the model is 192 wide",
    ),
    "another width in mmchat.json": (
        lambda folder: describe(folder, lambda values: values.update(hidden_size=3584)), {}, [],
        "hidden_size is 3584, but 192 in config.json",
    ),
    "a context beyond the model's": (
        lambda folder: None, {}, ["--context", "4000"], r"context_rows is 4000; demo \(stand-in\) has 2016",
    ),
    "a context beyond the model's in mmchat.json": (
        lambda folder: describe(folder, lambda values: values.update(context_rows=4096)), {}, [],
        "context_rows is 4096; it must be above 32 and at most the model's 2048",
    ),
    "stop ids of another tokenizer": (
        lambda folder: describe(folder, lambda values: values.update(stop_ids=[1, 2])), {}, [],
        r"answers end with .*, but with \[1, 2\] in mmchat.json",
    ),
    "the other engine": (lambda folder: None, {}, ["--engine", "openvino"], "no weights for OpenVINO"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_rkllm_init(
    case: str, board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, environment, options, message = REFUSED[case]
    folder = board()
    spoil(folder)
    monkeypatch.setenv("RKLLM_STANDIN_TRACE", str(tmp_path / "trace"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = CliRunner().invoke(app, ["ask", "Hello.", "--model", str(folder), *options])
    assert (told.exit_code, told.stdout) == (1, "")
    (line,) = told.stderr.splitlines()
    assert line.startswith("mmchat: ")
    assert re.search(message, line), line
    assert not (tmp_path / "trace").exists()  # rkllm_init writes to it
    if not options:
        again = CliRunner().invoke(app, ["calibrate", "--model", str(folder)])
        assert (again.exit_code, again.stdout) == (1, "")
        assert re.search(message, again.stderr.splitlines()[-1])
        assert not (tmp_path / "trace").exists()


def test_the_trace_would_tell(board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_TRACE", str(tmp_path / "trace"))
    told = CliRunner().invoke(app, ["ask", "Hello.", "--model", str(board())])
    assert told.exit_code == 0
    assert '"call": "init", "result": "ok"' in (tmp_path / "trace").read_text()


def test_a_checkpoint_is_not_for_rkllm() -> None:
    with pytest.raises(ModelDirError, match="has no model for RKLLM"):
        mmchat.open("demo", engine="rkllm")
