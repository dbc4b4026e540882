"""The stand-in for rknn-toolkit-lite2 behaves as the real one was recorded to (tests/emulated)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rknn_standin import manners
from tests.rknn_standin.model import LITE2, write_echo

RECORDED: dict[str, Any] = json.loads((Path(manners.__file__).parent / "manners.json").read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own, as the real one is asked."""
    folder = tmp_path_factory.mktemp("manners")
    write_echo(folder / "echo.rknn")
    (folder / "no model").write_text("this is no model\n")
    command = [sys.executable, manners.__file__, str(folder / "echo.rknn"), str(folder / "no model")]
    environ = {**os.environ, "PYTHONPATH": str(LITE2)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, timeout=120, check=True)
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_the_same_questions(told: dict[str, Any]) -> None:
    assert list(told) == list(RECORDED)


@pytest.mark.parametrize("question", RECORDED)
def test_it_answers_as_the_real_one(told: dict[str, Any], question: str) -> None:
    assert told[question] == RECORDED[question]
