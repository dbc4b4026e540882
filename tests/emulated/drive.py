"""In the emulated system: a conversation through mmchat.open, both workers; then faults.  JSON on the last line.

python drive.py FOLDER STORE PYTHON PICTURE...      # PYTHON starts another emulated interpreter
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import mmchat
from mmchat.errors import EngineError

QUESTIONS = ("Hello!", "What colour is the circle?", "And in this one?")
FAULTS = ("init:-3", "inputs_set:-5", "run:-1", "outputs_get:-9")


def converse(folder: Path, store: Path, pictures: list[Path]) -> list[dict[str, Any]]:
    """The first question without a picture, each of the others with one of them; tokens and counts."""
    told = []
    with mmchat.open(folder, store=store, n_threads=1) as runtime:
        session = runtime.session()
        for question, images in zip(QUESTIONS, ([], *([picture] for picture in pictures)), strict=True):
            reply = session.ask(question, images, temperature=0.0, max_new_tokens=24)
            usage = {name: reply.usage[name] for name in ("n_prompt", "slices_encoded", "slices_cached", "restarts")}
            told.append({"text": reply.text, "ids": list(session.turns[-1].ids), **usage})
            print(told[-1], file=sys.stderr, flush=True)
    return told


def fail(folder: Path, store: Path, picture: Path) -> dict[str, str]:
    """Fault -> the error."""
    told = {}
    with mmchat.open(folder, store=store, n_threads=1) as runtime:
        for fault in FAULTS:
            os.environ["FAKE_RKNN"] = fault
            runtime.vision.worker.kill()  # the next one has this environment
            try:
                told[fault] = runtime.session().ask("What is this?", picture, max_new_tokens=1).text
            except EngineError as error:
                told[fault] = str(error)
            print(fault, told[fault], file=sys.stderr, flush=True)
    return told


if __name__ == "__main__":
    folder, store, *pictures = sys.argv[1:]
    paths = [Path(picture) for picture in pictures]
    answers = converse(Path(folder), Path(store), paths)
    print(json.dumps({"answers": answers, "faults": fail(Path(folder), Path(f"{store} of faults"), paths[0])}))
