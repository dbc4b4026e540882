"""mmchat bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmchat.bench import chat, host, peers, record, work
from mmchat.cli.options import UsageError, say
from mmchat.errors import ModelDirError
from mmchat.model_dir import open_model

SECTIONS = {"work": work.run, "chat": chat.run, "host": host.run}
OTHERS = {"peers": peers.run}  # not among all: needs another program
FOLDER = Path("benchmarks")


def bench(section: str, model: str, as_json: bool, save: bool) -> None:
    if section not in (*SECTIONS, *OTHERS, "all"):
        raise UsageError(f"there is no section {section!r}; there are {', '.join((*SECTIONS, *OTHERS))} and all")
    chosen = [section] if section != "all" else list(SECTIONS)
    spec = open_model(model)
    if spec.board and chosen != ["work"]:
        raise ModelDirError(
            f"{spec.folder}: on a board only `mmchat bench work` runs: the others compare with OpenVINO"
        )
    found: dict[str, Any] = record.context()
    for name in chosen:
        found.update({**SECTIONS, **OTHERS}[name](model, say))
    print(json.dumps(found) if as_json else record.to_markdown(found))
    if save:
        for path in record.save(found, FOLDER):
            say(f"wrote {path}")
