"""tools.average_weights: the mean of runs is a run, and a folder that opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmchat.model_dir import open_model

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

DEMO = open_model("demo").folder


def run(folder: Path, seed: int, tokenizer: str) -> dict[str, Any]:
    """A run's folder with random weights; its running averages."""
    from mmchat.prompt import ChatTokenizer
    from tools.demo_torch import DemoConfig, DemoModel

    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    torch.manual_seed(seed)
    n_ids = ChatTokenizer(folder / "tokenizer.json").n_ids
    average: dict[str, Any] = DemoModel(DemoConfig.of(n_ids)).state_dict()
    torch.save({"model": {}, "average": average, "tokenizer": tokenizer}, folder / "checkpoint.pt")
    for name in ("heads.pt", "fact_heads.pt"):
        torch.save({}, folder / name)
    return average


def test_the_mean_of_two_runs(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tools.average_weights import main

    tokenizer = (DEMO / "tokenizer.json").read_text(encoding="utf-8")
    one, other = (run(tmp_path / name, seed, tokenizer) for seed, name in enumerate(("a", "b")))
    assert main([str(tmp_path / "out"), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    made = load_file(tmp_path / "out" / "model-float32" / "model.safetensors")
    for name, value in made.items():
        torch.testing.assert_close(value, (one[name] + other[name]) / 2)
    again = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert set(again["model"]) == set(one)
    assert open_model(tmp_path / "out" / "model").llm == open_model("demo").llm


def test_runs_with_other_tokenizers_have_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.average_weights import main

    tokenizer = (DEMO / "tokenizer.json").read_text(encoding="utf-8")
    run(tmp_path / "a", 0, tokenizer)
    run(tmp_path / "b", 1, tokenizer + "\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), str(tmp_path / "a"), str(tmp_path / "b")])
    assert "different tokenizers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
