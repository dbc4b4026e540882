"""What a user names -> a source of frames."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmchat.errors import VideoError
from mmchat.images import SUFFIXES, is_picture_name
from mmchat.video.decoding import Video, is_address, public
from mmchat.video.live import Stream, open_live
from mmchat.video.pictures import Arrays, Pictures
from mmchat.video.values import Source

_CAMERA = re.compile(r"/dev/(v4l/.*|video\d+)")


def open_source(source: str | os.PathLike[str] | Source | Iterable[Any]) -> Source:
    """source: a video file, a picture, a folder or a glob of pictures; a camera (/dev/video0); an rtsp:// or http://
    address; an iterator of pictures, or of (seconds, picture); or a Source, which is returned.

    An http:// address that tells its length is a file, any other one is live.

    Raises VideoError: nothing there, nothing that can be read, or the package av is not installed.
    """
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Source):
            return source
        if isinstance(source, Iterable) and not isinstance(source, (bytes, dict)):
            return Arrays(source)
        raise VideoError(f"a source is a path, an address or an iterator of pictures, not {type(source).__name__}")
    text = os.fspath(source)
    if is_address(text):
        return _at(text)
    text = os.path.expanduser(text)
    path = Path(text)
    if _CAMERA.fullmatch(text):
        return Stream(text)
    try:
        if path.is_dir():
            return Pictures(text, [file for file in path.iterdir() if is_picture_name(file)])
        if not path.exists():
            if glob.has_magic(text):
                found = [Path(file) for file in glob.glob(text, recursive=True)]
                return Pictures(text, [file for file in found if file.suffix.lower() in SUFFIXES])
            raise VideoError(f"{text}: no such file")
    except (OSError, ValueError) as error:  # a folder that cannot be listed, a null character
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{text}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if path.suffix.lower() in SUFFIXES - {".gif"}:  # an animation is a video
        return Pictures(text, [path])
    return Video(f"file:{text}", text)


def _at(address: str) -> Source:
    if address.lower().startswith("rtsp"):
        return Stream(address)
    opened = open_live(address)
    if opened.length is None:
        return Stream(address, opened=opened)
    opened.container.close()
    return Video(address, public(address))
