"""The tool that holds a very long conversation, on a short one.  `python -m tools.long_chat` is the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import long_chat


def test_a_conversation_that_outgrows_its_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = ["--turns", "12", "--pictures", "6", "--context", "400", "--max-new-tokens", "40", "--json", str(file)]
    assert long_chat.main(words) == 0
    figures = json.loads(file.read_text())["figures"]
    assert (figures["turns"], figures["over_the_cap"], figures["untold"], figures["restarts"]) == (12, 0, 0, 0)
    assert 0 < figures["trims"] < 8
    assert figures["rows_prefilled_without_trims"] <= figures["rows_new_without_trims"] + 12
    assert set(figures["memory_mb"]) == {"program", "LLM worker", "vision worker", "all together"}
    assert figures["answers"]["in context"]["n"] > 6
    shown = capsys.readouterr().out
    assert "over the cap of 400: 0 turns" in shown
    assert "in a fresh chat" in shown
