"""A conversation as a file for people (Markdown) or programs (JSON).  Pictures are named, not included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmchat.checkpoint import write_atomic
from mmchat.errors import SessionError
from mmchat.session import Session


def transcript(session: Session) -> dict[str, Any]:
    """Turns as JSON values."""
    turns = []
    for turn in session.turns:
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "id": part.id, "size": list(part.size), "name": part.name}
            for part in turn.parts
        ]
        turns.append(
            {"user": parts, "assistant": turn.text, "stop_reason": turn.stop_reason, "usage": turn.usage.to_dict()}
        )
    return {"system": session.system, "turns": turns}


def to_markdown(session: Session) -> str:
    lines = ["# Conversation", ""]
    if session.system:
        lines += [f"*{session.system}*", ""]
    for turn in session.turns:
        for part in turn.parts:
            if isinstance(part, str):
                lines += [f"**{part}**", ""]
            else:
                lines += [f"[{part.id}: {part.name or 'picture'}, {part.size[0]}x{part.size[1]}]", ""]
        lines += [turn.text, ""]
    return "\n".join(lines)


def save_transcript(session: Session, path: Path) -> None:
    """Whole or not at all; JSON where the name ends in .json, else Markdown.  Raises SessionError."""
    if path.suffix.lower() == ".json":
        text = json.dumps(transcript(session), ensure_ascii=False, indent=2) + "\n"
    else:
        text = to_markdown(session)
    try:
        write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))
    except OSError as error:
        raise SessionError(f"{path}: cannot be written ({error.strerror or error})") from None
