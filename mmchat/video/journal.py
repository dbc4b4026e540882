"""A JSONL file of captions, from which a killed run goes on: each line is there before the next frame is asked about.

A line that a kill cut short is removed; the frame is asked about again.  Nothing is flushed to disk: after a power
cut the last lines may be missing, and are made again as well.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mmchat.errors import VideoError
from mmchat.video.values import Caption

_BLOCK = 1 << 16
_BEGINS = b'{"time": '  # every line


class Journal:
    """run: names the settings that the captions are made with; a file that was made with others is refused."""

    def __init__(self, path: Path, run: str, *, resume: bool) -> None:
        """resume: keep what is there.

        Raises VideoError: another process writes it, or it is another kind of file.  Raises OSError.
        """
        self._path, self._run = path, run
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise VideoError(f"{path}: another run is writing it") from None
        self._kept = self._end_of_last_line() if resume else 0
        begins = os.pread(self._file.fileno(), len(_BEGINS), 0).strip(b"\0") if resume else b""  # a power cut leaves \0
        if not _BEGINS.startswith(begins):
            self._file.close()
            raise VideoError(f"{path}: line 1 is no caption; it cannot be continued")
        self._file.truncate(self._kept)

    def captions(self) -> Iterator[Caption]:
        """Those that were there when the file was opened, oldest first.  Raises VideoError for what is none."""
        with self._path.open("rb") as file:
            number = 0
            while file.tell() < self._kept:
                number += 1
                try:
                    values = json.loads(file.readline())
                    run = values.pop("run")
                    caption = Caption.from_dict(values)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise VideoError(f"{self._path}: line {number} is no caption; it cannot be continued") from None
                if run != self._run:
                    raise VideoError(
                        f"{self._path}: line {number} was made with other settings (question, sampling, model); "
                        "give the same ones, or another file"
                    )
                yield caption

    def write(self, caption: Caption) -> None:
        line = json.dumps({**caption.to_dict(), "run": self._run}, ensure_ascii=False) + "\n"
        rest = line.encode(errors="backslashreplace")
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()

    def _end_of_last_line(self) -> int:
        end = os.fstat(self._file.fileno()).st_size
        while end:
            start = max(0, end - _BLOCK)
            found = os.pread(self._file.fileno(), end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0
