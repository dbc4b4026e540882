"""mmchat session show and mmchat session export: saved conversations without a model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import typer

from mmchat.bundle import Bundle, SavedImage, visible
from mmchat.cli.options import UsageError, say
from mmchat.errors import SessionError
from mmchat.record import Marks
from mmchat.saving import marks_of
from mmchat.sections import same_place
from mmchat.transcript import SUFFIXES, caption, transcript
from mmchat.transcript import export as write_export


def show(file: str, as_json: bool) -> None:
    bundle = Bundle(Path(os.path.expanduser(file)))
    if as_json:
        print(json.dumps(_to_json(bundle), ensure_ascii=False))
    else:
        _print(bundle)
    _tell(bundle)


def export(file: str, to: str) -> None:
    path = Path(os.path.expanduser(to))
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--to {to}: the name must end in {', '.join(SUFFIXES)}")
    bundle = Bundle(Path(os.path.expanduser(file)))
    if same_place(path, bundle.path):
        raise UsageError(f"--to {to}: is the conversation itself; give the page another name")
    missing = write_export(bundle.record, lambda image: bundle.picture(image.picture), path)
    for line in missing:
        say(line)
    _tell(bundle)


def _tell(bundle: Bundle) -> None:
    """What is lost, and the exit code for it."""
    for what in bundle.lost:
        say(f"{bundle.path}: lost: {what}")
    if bundle.lost:
        raise typer.Exit(1)


def _to_json(bundle: Bundle) -> dict[str, object]:
    sizes, marks = bundle.pictures, _marks(bundle)
    images = {image.id: image for image in bundle.record.images}.values()
    return {
        **transcript(bundle.record),
        "settings": asdict(bundle.record.settings),
        "model": asdict(bundle.record.model),
        "images": [
            {
                "id": image.id,
                "size": list(image.size),
                "name": image.name,
                "slices": len(image.keys),
                "bytes": sizes.get(image.picture, 0),
                "embeddings": sum(key in bundle.keys for key in image.keys),
            }
            for image in images
        ],
        "marks": {
            "forms": dict(marks.forms),
            "dropped": sorted(marks.dropped),
            "pinned": sorted(marks.pinned),
            "pinned_turns": sorted(marks.pinned_turns),
        },
        "lost": list(bundle.lost),
        "gaps": list(bundle.gaps),
        "torn": bundle.torn,
    }


def _print(bundle: Bundle) -> None:
    record = bundle.record
    kept = sum(bundle.pictures.values())
    print(f"model     {visible(record.model.name) or 'unknown'}")
    if record.settings.system:
        print(f"system    {_indented(record.settings.system, 10)}")
    if record.settings.sampling:
        print(f"sampling  {visible(json.dumps(dict(record.settings.sampling), ensure_ascii=False))}")
    pictures = f"{len(bundle.pictures)} picture(s) ({kept:,} bytes)"
    print(f"holds     {len(record.turns) - len(bundle.gaps)} turn(s), {pictures}, {len(bundle.keys)} embedding(s)")
    marks = _marks(bundle)
    if degraded := [f"{name} as {form}" for name, form in marks.forms.items() if form != "whole"]:
        print(f"sent      {visible(', '.join(degraded))}")
    if marks.dropped:
        print(f"not sent  turns {', '.join(map(str, sorted(marks.dropped)))}")
    if pinned := [*sorted(marks.pinned), *(f"turn {number}" for number in sorted(marks.pinned_turns))]:
        print(f"pinned    {visible(', '.join(pinned))}")
    gaps = set(bundle.gaps)
    for number, turn in enumerate(record.turns, 1):
        print()
        if number in gaps:
            print(f"{f'{number}.':5} (lost)")
            continue
        for i, part in enumerate(turn.parts):
            text = part if isinstance(part, str) else f"[{_about(bundle, part)}]"
            print(f"{f'{number}.' if i == 0 else '':5} {_indented(text, 6)}")
        print(f"   -> {_indented(turn.text, 6)}{'' if turn.stop_reason == 'stop' else f'  ({turn.stop_reason})'}")


def _marks(bundle: Bundle) -> Marks:
    """Of pictures and turns; none where the file holds nonsense, which is told when it is gone on with."""
    try:
        return marks_of(bundle.record.state)
    except SessionError:
        return Marks()


def _about(bundle: Bundle, image: SavedImage) -> str:
    n_bytes = bundle.pictures.get(image.picture)
    return f"{caption(image)}, {'not kept' if n_bytes is None else f'{n_bytes:,} bytes'}"


def _indented(text: str, n: int) -> str:
    return visible(text).replace("\n", "\n" + " " * n)
