"""What commands that write large files share: room on the disk looked at first, one writer per folder, and nothing
left of one that was killed.

A file is written under a temporary name and moved into place when it is complete (checkpoint.write_atomic), so a file
that is there is whole.  A killed writer leaves its temporary file; the next one removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmchat.checkpoint import write_atomic
from mmchat.errors import DiskFull, ModelDirError
from mmchat.half_made import CONVERT_STATE

# Kept free, so that a command does not fill the disk to its last byte.
_SPARE_BYTES = 50_000_000


def describe_bytes(n: float) -> str:
    """1234567890 -> "1.2 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} bytes"


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that may not be there yet."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def check_target(target: Path, name: str) -> None:
    """Raises ModelDirError where a file like name ("model.rkllm") cannot be written: a folder, or another suffix."""
    suffix = Path(name).suffix
    if target.is_dir() or target.suffix != suffix:
        example = target / name if target.is_dir() else target.with_suffix(suffix)
        raise ModelDirError(f"{target}: give the file to write, for example {example}")


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises DiskFull where n_bytes more do not fit on the folder's disk."""
    free = free_bytes(folder)
    if n_bytes + _SPARE_BYTES > free:
        raise DiskFull(folder, n_bytes + _SPARE_BYTES, free)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and be the only one who writes into it; temporary files of killed writers are removed.

    Raises ModelDirError: another mmchat is writing there, or it is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelDirError(f"{folder}: cannot be made ({error.strerror})") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelDirError(f"{folder}: another mmchat command is writing there; wait until it is done") from None
        except OSError:  # a file system without locks: one has to trust the user
            pass
        yield
    finally:
        os.close(descriptor)


def remove_temporary(path: Path) -> None:
    """Remove what killed writers of this file left.  Only for the only_writer of its folder."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file at once.  Only for the only_writer of its folder.  Raises OSError."""
    remove_temporary(path)
    write_atomic(path, lambda file: file.write(data))


class Work:
    """A folder that is made file by file; interrupted, it goes on with the next file, or of another source anew.

    Its state, in a hidden file, says from what the folder is made and which files are complete.
    """

    def __init__(self, folder: Path, source: dict[str, Any]) -> None:
        """source: whatever makes the result another one, as JSON.  Only for the only_writer of the folder.

        Raises ModelDirError: the folder has files that were not written by this class.
        """
        self.folder, self._path = folder, folder / CONVERT_STATE
        source = json.loads(json.dumps(source))
        self._state: dict[str, Any] = {"source": source, "done": {}}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
            others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            if others:
                raise ModelDirError(f"{folder}: has files already ({others[0]}); give an empty folder") from None
        if isinstance(found, dict) and found.get("source") == source and isinstance(found.get("done"), dict):
            self._state = found
        else:
            # What was made of something else would be taken for this one's.  Killed here, it is done again.
            done = found.get("done") if isinstance(found, dict) else None
            for name in done if isinstance(done, dict) else ():
                if Path(name).name == name:
                    (folder / name).unlink(missing_ok=True)
            self._save()

    def has(self, name: str) -> bool:
        """Whether the file is complete."""
        path = self.folder / name
        return path.is_file() and self._state["done"].get(name) == path.stat().st_size

    def prepare(self, name: str) -> Path:
        """Where to write the file, with what a killed writer left of it removed."""
        self._state["done"].pop(name, None)
        remove_temporary(self.folder / name)
        return self.folder / name

    def finish(self, name: str) -> None:
        """The file is complete."""
        self._state["done"][name] = (self.folder / name).stat().st_size
        self._save()

    def _save(self) -> None:
        replace_file(self._path, json.dumps(self._state).encode())


def remove_work(folder: Path) -> None:
    """Remove a folder that Work made, its state last: killed on the way, a new Work goes on in what is left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():  # a toolkit's, that read it
            shutil.rmtree(path)
        elif path.name != CONVERT_STATE:
            path.unlink()
    shutil.rmtree(folder)


def stamp(path: Path) -> list[int]:
    """What changes when a file does: size and time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
