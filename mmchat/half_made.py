"""Folders that are no models yet: what the command that makes one left there, and how it goes on.

The commands' hidden state files are named here, and read for others; what is in them is each command's own affair.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONVERT_STATE = ".mmchat-convert.json"  # llm-checkpoint, vision-onnx (outputs.Work)
BOARD_STATE = ".mmchat-board.json"  # board (convert.steps)
PULL_RECORD = ".mmchat-pull.json"
_BOARD_FILE = "mmchat.json"
# What pull --only fetches: its word for that, and what it is.
_PARTS = {
    "embed_table.safetensors": ("table", "the token rows"),
    "vision.safetensors": ("vision", "the vision encoder"),
}
# Step -> (what its folder is, the file that it writes last, what is done with it; "": it is then a model).
_STEPS = {
    "llm-checkpoint": (
        "the LLM alone, as a plain Qwen2 folder (mmchat convert llm-checkpoint)",
        "config.json",
        "it is for transformers or rkllm-toolkit; mmchat convert llm-rkllm takes the whole checkpoint",
    ),
    "vision-onnx": (
        "the vision encoder alone, as ONNX (mmchat convert vision-onnx)",
        "vision.onnx",
        "it is for mmchat convert vision-rknn {} vision.rknn --target CHIP",
    ),
    "openvino": ("an OpenVINO folder (mmchat convert openvino)", "config.json", ""),
}


@dataclass(frozen=True)
class HalfMade:
    """what: the folder is, and what it has and lacks.  cure: the command that goes on."""

    what: str
    cure: str


def look(folder: Path) -> HalfMade | None:
    """None for a folder that is whole, or that none of these commands made."""
    quoted = shlex.quote(str(folder))
    state = read_state(folder / BOARD_STATE)
    if state and not (folder / _BOARD_FILE).is_file():
        return _board(folder, state)
    if (parts := _parts(folder)) is not None:
        return parts
    state = read_state(folder / CONVERT_STATE)
    source = state.get("source")
    known = _STEPS.get(str(source.get("step"))) if isinstance(source, dict) else None
    if known is None or (folder / _BOARD_FILE).is_file():
        return None
    what, last, use = known
    if (folder / last).is_file():
        return HalfMade(f"{folder}: {what}, not a model folder", use.format(quoted)) if use else None
    return HalfMade(f"{folder}: {what}, half made", "run the same command again: it goes on where it was")


def _parts(folder: Path) -> HalfMade | None:
    """Of a checkpoint, without an LLM: they belong to a board's folder."""
    record = read_state(folder / PULL_RECORD)
    if not record:  # so that there is such a folder
        return None
    weights = {path.name for path in folder.glob("*.safetensors")}
    if not weights or not weights <= set(_PARTS) or any([*folder.glob("*.rkllm"), *folder.glob(".*.part")]):
        return None
    repo = record.get("repo")
    has = " and ".join(_PARTS[name][1] for name in sorted(weights))
    lacks = ["the LLM (*.rkllm) with mmchat.json", *(_PARTS[name][1] for name in sorted(set(_PARTS) - weights))]
    name = shlex.quote(repo) if isinstance(repo, str) else "REPO"
    return HalfMade(
        f"{folder}: parts of a checkpoint (mmchat pull --only): {has}; lacks {' and '.join(lacks)}",
        "docs/board.md, With somebody's .rkllm, tells how they become a board's folder; the whole checkpoint goes into "
        f"another one: mmchat pull {name} --to DIR",
    )


def interrupted_pull(folder: Path) -> HalfMade | None:
    """Of a download that has not come to its end."""
    try:
        parts = sorted(path.name[1 : -len(".part")] for path in folder.glob(".*.part"))
    except (OSError, ValueError):
        return None
    if not parts:
        return None
    repo = read_state(folder / PULL_RECORD).get("repo")
    name = shlex.quote(repo) if isinstance(repo, str) else "REPO"
    only = next((f"--only {_PARTS[part][0]} " for part in parts if part in _PARTS), "")
    cure = f"mmchat pull {name} {only}--to {shlex.quote(str(folder))} goes on where it was"
    return HalfMade(f"{folder}: a download that was interrupted at {', '.join(parts)}", cure)


def read_state(path: Path) -> dict[str, Any]:
    """{} where there is none, or none that can be read."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _board(folder: Path, state: dict[str, Any]) -> HalfMade:
    facts, done = ({} if not isinstance(value := state.get(name), dict) else value for name in ("facts", "steps"))
    several, lacks = (_texts(facts.get(name)) for name in ("steps", "lacks"))
    todo = [one for one in several if one not in done]
    what = f"{folder}: a board's folder that mmchat convert board began; it has {', '.join(done) or 'nothing'}"
    command = f"mmchat convert board {shlex.quote(str(facts.get('checkpoint', 'CHECKPOINT')))} "
    command += f"{shlex.quote(str(folder))} --target {facts.get('target', 'CHIP')}"
    if lacks and not todo:
        return HalfMade(
            f"{what}, and lacks {'; '.join(lacks)}",
            f"that command is: {command} --llm FILE (with the other options it had)",
        )
    more = f", and lacks {', '.join(todo)}" if todo else ", and was not checked yet"
    return HalfMade(what + more, f"{command} (with the options it had) goes on where it was")


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
