"""Checks for a user's own board: conversations made up by hypothesis, and what must hold for each of them.

    mmchat regress --model DIR --minutes 10
    pytest -p mmchat.regress --mmchat-model DIR

    from hypothesis import given
    from mmchat.regress import check
    from mmchat.regress.strategies import conversations, prompts_of_rows

    @given(talk=conversations())
    def test_my_board(mmchat_runtime, talk):
        check(mmchat_runtime, talk)

mmchat.regress.play says what is checked, mmchat.regress.trial how a failure is told from the state of a worker,
mmchat.regress.hunt how the command looks for one.  Only strategies and hunt need hypothesis, only plugin pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmchat.regress.broken import Broken
    from mmchat.regress.talk import Sketch, Step, Talk
    from mmchat.regress.trial import check

pytest_plugins = ["mmchat.regress.plugin"]  # so that this package is a plugin itself

_HOME = {"broken": ("Broken",), "talk": ("Sketch", "Step", "Talk"), "trial": ("check",)}

__all__ = ["Broken", "Sketch", "Step", "Talk", "check"]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"mmchat.regress.{module}"), name)
    raise AttributeError(f"module 'mmchat.regress' has no attribute {name!r}")
