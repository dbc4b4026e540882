"""convert.steps: what a killed run finished is not done again, wherever it was killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmchat.convert import steps as module
from mmchat.convert.steps import Steps
from tests.test_convert import quiet


class Killed(BaseException):
    pass


def make(steps: Steps, content: bytes) -> None:
    steps.begin("llm", ["a", "b"])
    for name in ("a", "b"):
        (steps.work / name).write_bytes(content)
    steps.finish("llm", len(content), ["a", "b"], {}, quiet)


@pytest.mark.parametrize("where", ["os.replace", "sha256"])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_finished_step_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, nth: int
) -> None:
    """Killed while its digests are taken or its files moved, over the files of an earlier run."""
    make(Steps(tmp_path), b"old")
    again, n_left = Steps(tmp_path), nth

    def hook(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: Any) -> object:
            nonlocal n_left
            n_left -= Path(given[0]).parent.name == module.WORK  # not what the state is written with
            if n_left < 0:
                raise Killed
            return real(*given)

        return call

    with monkeypatch.context() as patched:
        if where == "sha256":
            patched.setattr(module, "sha256", hook(module.sha256))
        else:
            patched.setattr(os, "replace", hook(os.replace))
        with pytest.raises(Killed):
            make(again, b"newer")
    assert Steps(tmp_path).is_done("llm", 5, quiet)
    assert [(tmp_path / name).read_bytes() for name in ("a", "b")] == [b"newer"] * 2
    assert not list((tmp_path / module.WORK).iterdir())


def test_what_is_not_what_was_written_down_is_done_again(tmp_path: Path) -> None:
    make(Steps(tmp_path), b"one")
    assert Steps(tmp_path).is_done("llm", 3, quiet)
    assert not Steps(tmp_path).is_done("llm", 4, quiet)
    (tmp_path / "b").write_bytes(b"two")
    assert not Steps(tmp_path).is_done("llm", 3, quiet)


def test_bytes_begun(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    (steps.work / "plain").mkdir()
    (steps.work / "plain" / "model.safetensors").write_bytes(bytes(1000))
    (steps.work / "a").write_bytes(bytes(24))
    assert steps.n_bytes_begun == 1024
