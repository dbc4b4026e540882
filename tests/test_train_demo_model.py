"""tools.train_demo_model: two runs that meet go on from the mean of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mmchat.model_dir import open_model

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

if TYPE_CHECKING:
    from tools.train_demo_model import Trainer

DEMO = open_model("demo").folder


def trainer(folder: Path, *words: str | Path) -> Trainer:
    from tools.train_demo_model import Trainer, _parser

    common = ("--init", DEMO, "--keep-tokenizer", "--no-compile", "--device", "cpu", "--bfloat16")
    return Trainer(_parser().parse_args([str(word) for word in (folder, *common, *words)]))


def test_runs_that_meet_go_on_from_their_mean(tmp_path: Path) -> None:
    one, other = trainer(tmp_path / "a", "--beside", tmp_path / "b"), trainer(tmp_path / "b")
    assert not one.meet()  # the other has not saved yet
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    for value in (*other.model.state_dict().values(), *other.average.values()):
        value += 1.0
    for head in other.heads.state_dict().values():
        head.zero_()
    heads = {name: value / 2 for name, value in one.heads.state_dict().items()}
    means = {name: (value + before[name]) / 2 for name, value in other.model.state_dict().items()}
    other.save()
    assert one.meet()
    assert not other.meet()  # nobody is beside it
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, means[name])
        torch.testing.assert_close(one.average[name], means[name])
        torch.testing.assert_close(one.work.state_dict()[name], value.bfloat16())
    for name, value in one.heads.state_dict().items():
        torch.testing.assert_close(value, heads[name])


@pytest.mark.parametrize(("stage", "stage_s"), [(1, 0.0), (0, 1000.0), (0, -100.0)])
def test_a_run_that_is_elsewhere_is_let_alone(
    tmp_path: Path, stage: int, stage_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another stage, far ahead, or a save behind that does not come."""
    monkeypatch.setattr("tools.train_demo_model._MEETING_S", 0.0)
    one, other = trainer(tmp_path / "a", "--beside", tmp_path / "b"), trainer(tmp_path / "b")
    other.stage, other.stage_s = stage, stage_s
    other.save()
    assert not one.meet()
    one.stage, one.stage_s = other.stage, other.stage_s
    assert one.meet()
