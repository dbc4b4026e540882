"""Two hundred conversations about rendered pictures, through everything, with the shipped weights.

Their answers are known to be right (tools/fixed_questions.py), so one that is wrong is a fault of the pipeline.
"""

from __future__ import annotations

from pathlib import Path

import mmchat
from mmchat.runtime import Runtime
from tests.rkllm_standin.__main__ import write_board_folder
from tests.rkllm_standin.build import library
from tools.fixed_questions import N, answers, conversation, fixed_seeds

_N_ON_THE_STAND_IN = 40


def _wrong(rt: Runtime, seeds: list[int]) -> list[tuple[int, str, str, str]]:
    asked = ((seed, answer) for seed in seeds for answer in answers(rt, conversation(seed)))
    return [(seed, *answer) for seed, answer in asked if answer[1] != answer[2]]


def test_openvino_answers_all_right(tmp_path: Path) -> None:
    seeds = fixed_seeds()
    assert len(set(seeds)) == N
    with mmchat.open("demo", store=tmp_path) as rt:
        assert _wrong(rt, seeds) == []


def test_rkllm_answers_right(tmp_path: Path) -> None:
    library("1.3.0")  # skips where there is no compiler
    folder = write_board_folder(tmp_path / "board", "1.3.0")
    with mmchat.open(folder, store=tmp_path / "store") as rt:
        assert _wrong(rt, fixed_seeds()[:_N_ON_THE_STAND_IN]) == []
