"""A conversation for people and other programs: JSON, Markdown or HTML, with its pictures.

HTML is one file that needs nothing else and runs nothing; beside JSON and Markdown the pictures lie in a folder.
Texts are what the user and the model wrote, so in HTML all of it is escaped.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from mmchat.bundle import SavedImage, SavedRecord, visible
from mmchat.checkpoint import write_atomic
from mmchat.errors import BundleError, ImageError, SessionError
from mmchat.images import shown_by_browsers

SUFFIXES = (".json", ".md", ".html")
_STOPPED = {"length": "cut at the length limit", "cancelled": "stopped"}

PictureOf = Callable[[SavedImage], bytes]


def transcript(record: SavedRecord, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Turns as JSON values.  files: where pictures lie, by their id."""
    return {
        "system": record.settings.system,
        "model": record.model.name,
        "turns": [
            {
                "user": [
                    {"type": "text", "text": part} if isinstance(part, str) else _image_to_json(part, files or {})
                    for part in turn.parts
                ],
                "assistant": turn.text,
                "stop_reason": turn.stop_reason,
                "usage": dict(turn.usage),
            }
            for turn in record.turns
        ],
    }


def _image_to_json(image: SavedImage, files: Mapping[str, str]) -> dict[str, Any]:
    values = {"type": "image", "id": image.id, "size": list(image.size), "name": image.name}
    return {**values, "file": files[image.id]} if image.id in files else values


def to_markdown(record: SavedRecord, files: Mapping[str, str]) -> str:
    """files: where pictures lie, by their id."""
    lines = ["# Conversation", ""]
    if record.settings.system:
        lines += [f"*{_plain(record.settings.system)}*", ""]
    for turn in record.turns:
        for part in turn.parts:
            if isinstance(part, str):
                lines += [*(f"> {line}".rstrip() for line in _plain(part).split("\n")), ""]
            else:
                where = f"({quote(os.fsencode(files[part.id]))})" if part.id in files else ""
                lines += [f"{'!' if where else ''}[{_plain(_no_brackets(caption(part)))}]{where}", ""]
        lines += [_plain(turn.text), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text whose Markdown stays, without HTML, pictures from elsewhere or commands to a terminal."""
    return html.escape(visible(text), quote=False).replace("&gt;", ">").replace("![", "!\\[")


def caption(image: SavedImage) -> str:
    return f"{image.id}: {image.name or 'picture'}, {image.size[0]}x{image.size[1]}"


def _no_brackets(text: str) -> str:
    return text.replace("[", "(").replace("]", ")")


def to_html(record: SavedRecord, picture: PictureOf) -> Iterator[str]:
    """Piece by piece, for pictures are large."""
    yield _HEAD
    if record.settings.system:
        yield f'<p class="system">{_escaped(record.settings.system)}</p>\n'
    shown: set[str] = set()
    for number, turn in enumerate(record.turns, 1):
        yield f'<section id="turn{number}">\n<div class="user">\n'
        for part in turn.parts:
            if isinstance(part, str):
                yield f"<p>{_escaped(part)}</p>\n"
            else:
                yield from _figure(part, picture, shown)
        yield f'</div>\n<div class="assistant"><p>{_escaped(turn.text)}</p>'
        if turn.stop_reason in _STOPPED:
            yield f'<p class="note">({_STOPPED[turn.stop_reason]})</p>'
        yield "</div>\n</section>\n"
    turns = "1 turn" if len(record.turns) == 1 else f"{len(record.turns)} turns"
    yield f"<footer>{_escaped(record.model.name or 'unknown model')}, {turns}</footer>\n"
    yield "</main>\n</html>\n"


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _figure(image: SavedImage, picture: PictureOf, shown: set[str]) -> Iterator[str]:
    about = _escaped(caption(image))
    if image.id in shown:
        yield f'<p class="note"><a href="#{image.id}">{about}</a></p>\n'
        return
    try:
        data, suffix = shown_by_browsers(picture(image), image.id)
    except (BundleError, ImageError):
        yield f'<p class="note" id="{image.id}">[{about}; not kept]</p>\n'
        return
    shown.add(image.id)
    kind = "jpeg" if suffix == "jpg" else suffix
    yield f'<figure id="{image.id}"><img alt="{about}" src="data:image/{kind};base64,'
    yield base64.b64encode(data).decode()
    yield f'"><figcaption>{about}</figcaption></figure>\n'


_HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Conversation</title>
<style>
:root { color-scheme: light dark; --line: #8884; --user: #4a7dff22; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem; }
p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
section { margin: 0 0 1.5rem; }
.user { background: var(--user); border-radius: .75rem; padding: .75rem 1rem; margin: 0 0 .75rem 12%; }
.user > * + * { margin-top: .5rem; }
.assistant { padding: 0 1rem; }
.system, .note, figcaption, footer { color: #777; font-size: .85rem; }
.system { margin: 0 0 1.5rem; padding: 0 1rem; font-style: italic; }
figure { margin: 0; }
img { display: block; max-width: 100%; max-height: 24rem; border-radius: .4rem; }
footer { border-top: 1px solid var(--line); padding-top: .75rem; }
</style>
<main>
"""


def export(record: SavedRecord, picture: PictureOf, path: Path) -> list[str]:
    """Write the conversation to a .json, .md or .html file, whole or not at all; what could not be shown, in words.

    picture: a picture's file; may raise BundleError.  Beside .json and .md they are put into NAME.pictures.

    Raises SessionError: another suffix, or it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SessionError(f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if "\0" in os.fspath(path):
        raise SessionError(f"{path}: no file can have that name")
    missing: dict[str, str] = {}

    def told(image: SavedImage) -> bytes:
        try:
            data = picture(image)
            shown_by_browsers(data, image.id)
        except (BundleError, ImageError) as error:
            missing[image.id] = f"{image.id} is not shown ({error})"
            raise
        return data

    try:
        if suffix == ".html":
            write_atomic(path, lambda file: _write(file, to_html(record, told)))
        else:
            files = _write_pictures(record, told, path)
            if suffix == ".json":
                text = json.dumps(transcript(record, files), ensure_ascii=False, indent=2) + "\n"
            else:
                text = to_markdown(record, files)
            write_atomic(path, lambda file: _write(file, [text]))
    except OSError as error:
        raise SessionError(f"{path}: cannot be written ({error.strerror or error})") from None
    return list(missing.values())


def _write(file: IO[bytes], pieces: Iterable[str]) -> None:
    for piece in pieces:
        file.write(piece.encode(errors="backslashreplace"))


def _write_pictures(record: SavedRecord, picture: PictureOf, path: Path) -> dict[str, str]:
    """Where each lies, seen from path's folder."""
    files: dict[str, str] = {}
    folder = path.with_name(f"{path.stem}.pictures")
    for image in record.images:
        if image.id in files:
            continue
        with contextlib.suppress(BundleError, ImageError):
            data, suffix = shown_by_browsers(picture(image), image.id)
            folder.mkdir(exist_ok=True)
            name = f"{image.id}.{suffix}"
            write_atomic(folder / name, lambda file, data=data: file.write(data))
            files[image.id] = f"{folder.name}/{name}"
    return files
