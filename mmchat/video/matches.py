"""Captions that somebody waits for, and the command that is run when one comes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess

from mmchat.context import HANGUL, UNSPACED
from mmchat.errors import VideoError
from mmchat.video.values import Caption

COMMAND_S = 60.0


def matches(text: str, wanted: str) -> bool:
    """Whether the words stand in the text, as whole words where a script has spaces, in upper or lower case."""
    wanted = wanted.strip()
    before = rf"(?:(?<!\w)|(?<=[{UNSPACED}])|(?=[{UNSPACED}]))"
    after = rf"(?:(?!\w)|(?=[{UNSPACED}{HANGUL}])|(?<=[{UNSPACED}]))"
    return re.search(before + re.escape(wanted) + after, text, re.IGNORECASE) is not None


class Command:
    """A command that gets a caption on stdin (JSON) and in MMCHAT_* variables.

    No shell sees it, and the caption is no part of its words: what is written on a wall in front of a camera must not
    run anything.
    """

    def __init__(self, line: str) -> None:
        """line: split into words as a shell would, and no more.  Raises VideoError: no such program."""
        try:
            self._words = shlex.split(line)
        except ValueError as error:
            raise VideoError(f"{line!r} is no command ({error})") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise VideoError(f"{line!r}: there is no program of that name")

    def run(self, caption: Caption) -> str | None:
        """Run it to its end, at most a minute; what went wrong, in words.  What it prints goes to stderr."""
        values = caption.to_dict()
        variables = {
            f"MMCHAT_{name.upper()}": str(values[name]).replace("\0", "")
            for name in ("caption", "time", "end", "index", "name", "digest")
        }
        try:
            done = subprocess.run(
                self._words,
                input=(json.dumps(values) + "\n").encode(),
                env={**os.environ, **variables},
                stdout=2,
                timeout=COMMAND_S,
            )
        except subprocess.TimeoutExpired:
            return f"{self._words[0]} did not end within {COMMAND_S:g} s and was killed"
        except OSError as error:
            return f"{self._words[0]}: {error.strerror or error}"
        return None if done.returncode == 0 else f"{self._words[0]} ended with exit code {done.returncode}"
