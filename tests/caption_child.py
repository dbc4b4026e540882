"""mmchat's command line with a runtime that has no model: python -m tests.caption_child STORE caption ...

Quick to start and to kill; everything but the model is real.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmchat.runtime
from mmchat.cli import main
from mmchat.engine import Event, Piece
from tests.video_kit import Engine, FakeRuntime

ANSWER_S = 0.01


class Slow(Engine):
    """Takes its time, so that a kill finds it at work.  Says yes or no, as the whole prompt has it."""

    def generate(self, pieces: Sequence[Piece], *args: Any, **kwargs: Any) -> Iterator[Event]:
        time.sleep(ANSWER_S)
        number = zlib.crc32(repr(pieces).encode())
        self.script = [f"{'yes' if number % 2 else 'no'} {number}"]
        return super().generate(pieces, *args, **kwargs)


def run(store: Path) -> None:
    fake = FakeRuntime(store)
    fake.engine = Slow(fake.store, 2048)
    mmchat.runtime.open = lambda *args, **kwargs: fake  # type: ignore[assignment]
    main()


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)))
