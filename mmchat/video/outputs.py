"""Files of captions for people and players: SubRip, WebVTT, CSV, and a page with thumbnails.

All of them are whole after every caption, and hold nothing in memory but the last one.  A caption that was carried
lengthens the one before it.
"""

from __future__ import annotations

import csv
import html
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from mmchat.video.values import Caption, clock

_SHORTEST_S = 0.001
_COLUMNS = (
    "time", "end", "index", "name", "caption", "carried", "digest", "drops", "skipped", "frames", "stop_reason", "at",
)  # fmt: skip


class Output(Protocol):
    def write(self, caption: Caption) -> None:
        """Raises OSError."""

    def close(self) -> None: ...


class _Blocks:
    """A file of one block per stretch of equal captions; the last one is written again where it grows."""

    def __init__(self, path: Path, head: str, block: Callable[[int, Caption], str]) -> None:
        self._file = path.open("w+", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._block = block
        self._last: Caption | None = None
        self._number = 0
        self._file.write(head)
        self._file.flush()
        self._start = self._file.tell()

    def write(self, caption: Caption) -> None:
        last = self._last
        if last is not None and caption.carried:
            self._again(replace(last, end=max(last.end, caption.end)))
            return
        if last is not None and last.end > caption.time:  # nobody could look ahead
            self._again(replace(last, end=caption.time))
        self._start = self._file.tell()
        self._number += 1
        self._append(caption)

    def _again(self, caption: Caption) -> None:
        self._file.seek(self._start)
        self._file.truncate()
        self._append(caption)

    def _append(self, caption: Caption) -> None:
        self._file.write(self._block(self._number, caption))
        self._file.flush()
        self._last = replace(caption, thumbnail=None)

    def close(self) -> None:
        self._file.close()


def _srt(path: Path, title: str) -> Output:
    return _Blocks(path, "", lambda number, caption: f"{number}\n{_span(caption, ',')}\n{_line(caption.text)}\n\n")


def _vtt(path: Path, title: str) -> Output:
    def block(number: int, caption: Caption) -> str:
        return f"{_span(caption, '.')}\n{html.escape(_line(caption.text), quote=False)}\n\n"

    return _Blocks(path, "WEBVTT\n\n", block)


def _span(caption: Caption, decimal: str) -> str:
    end = max(caption.end, caption.time + _SHORTEST_S)
    return f"{clock(caption.time, decimal=decimal)} --> {clock(end, decimal=decimal)}"


def _line(text: str) -> str:
    """An empty line would end the block, and so would none."""
    return re.sub("-{2,}>", "->", " ".join(text.split())) or "-"


class _Csv:
    def __init__(self, path: Path, title: str) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(_COLUMNS)
        self._file.flush()

    def write(self, caption: Caption) -> None:
        values = caption.to_dict()
        self._rows.writerow([values[name] for name in _COLUMNS])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
         background: Canvas; color: CanvasText; color-scheme: light dark; overflow-wrap: anywhere; }}
  main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.5rem; }}
  figure {{ margin: 0; }}
  img {{ width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: #8882; border-radius: .4rem;
         outline: 1px solid #8886; outline-offset: -1px; }}
  time, small {{ color: GrayText; font-variant-numeric: tabular-nums; }}
  figcaption p {{ margin: .2rem 0 0; white-space: pre-line; }}
</style>
<h1>{title}</h1>
<main>
"""


class _Page:
    """The page is appended to, so it has no closing tags, which HTML does not ask for.  Pictures lie beside it."""

    def __init__(self, path: Path, title: str) -> None:
        self._folder = path.with_name(f"{path.stem}_files")
        self._folder.mkdir(exist_ok=True)
        self._blocks = _Blocks(path, _PAGE.format(title=html.escape(title)), self._figure)

    def write(self, caption: Caption) -> None:
        if caption.thumbnail is not None and not caption.carried:
            target = self._picture(caption)
            if not target.exists():
                aside = target.with_suffix(f".{os.getpid()}")
                aside.write_bytes(caption.thumbnail)
                os.replace(aside, target)
        self._blocks.write(caption)

    def close(self) -> None:
        self._blocks.close()

    def _picture(self, caption: Caption) -> Path:
        return self._folder / f"{caption.digest[:24]}.jpg"

    def _figure(self, number: int, caption: Caption) -> str:
        place = quote(os.fsencode(f"{self._folder.name}/{self._picture(caption).name}"))  # an address: "#1" is a place
        picture = ""
        if self._picture(caption).exists():  # a run before that wrote no page left none
            picture = f'<img src="{place}" loading="lazy" alt="frame {caption.index}">'
        name = f" <small>{html.escape(caption.name)}</small>" if caption.name else ""
        span = f"{clock(caption.time)} – {clock(caption.end)}"
        told = f"<time>{span}</time>{name}<p>{html.escape(caption.text)}</p>"
        return f"<figure>{picture}<figcaption>{told}</figcaption></figure>\n"


_KINDS: dict[str, Callable[[Path, str], Output]] = {".srt": _srt, ".vtt": _vtt, ".csv": _Csv, ".html": _Page}
SUFFIXES = tuple(_KINDS)


def open_output(path: Path, title: str) -> Output:
    """An empty file of the kind that its name tells, one of SUFFIXES.  Raises OSError."""
    return _KINDS[path.suffix.lower()](path, title)
