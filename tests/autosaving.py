"""A program for test_kill.py: talks without a model, saves after every turn, and says when a turn is over.

    python -m tests.autosaving FILE STORE [BYTES]

The disk is a slow one, so that most of the time goes into writing.  Every third turn takes the two before it back.
With BYTES it kills itself when it has written so many, to whatever file.
Prints {"turns": [texts so far]} after each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mmchat.bundle import Bundle
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer
from mmchat.saving import Restored
from mmchat.session import Session
from mmchat.store import Store
from tests.fakes import FakeEngine, FakeVision

PICTURE = b"P6 800 600 255\n"  # 1.4 MB of noise


real_pwrite = os.pwrite
left = sys.maxsize  # bytes to be written before it kills itself


def slow_pwrite(descriptor: int, data: Any, at: int) -> int:
    global left
    time.sleep(0.001)
    n = real_pwrite(descriptor, data[: min(10_000, left)], at)
    left -= n
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def main(file: Path, root: Path) -> None:
    os.pwrite = slow_pwrite
    spec = open_model("demo")
    tokenizer, store = ChatTokenizer(spec.tokenizer_path), Store(root)
    engine = FakeEngine(tokenizer, store, spec.llm.hidden_size, context_rows=1_000_000)
    vision = FakeVision(store, spec.vision.query_num, spec.llm.hidden_size)
    if file.exists():
        bundle = Bundle(file, write=True)
        restored = Restored(bundle, spec, tokenizer, store)
        chat = Session(spec, tokenizer, store, vision, engine, **restored.options)
        chat.resume(bundle)
    else:
        chat = Session(spec, tokenizer, store, vision, engine)
        chat.autosave(file)
    while True:
        number = len(chat.turns)
        noise = PICTURE + os.urandom(800 * 600 * 3)  # always another: a picture is saved once
        engine.script.append(f"answer {number}")
        assert chat.ask(f"question {number}", images=[noise]).text
        told([turn.text for turn in chat.turns])
        if number % 3 == 2:
            chat.undo(2)
            told([turn.text for turn in chat.turns])


def told(turns: list[str]) -> None:
    print(json.dumps({"turns": turns}), flush=True)


if __name__ == "__main__":
    left = int(sys.argv[3]) if len(sys.argv) > 3 else left
    main(Path(sys.argv[1]), Path(sys.argv[2]))
