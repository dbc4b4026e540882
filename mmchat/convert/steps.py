"""A folder that is made in steps, each of which makes some of its files: what is done is known by digest.

Steps write into a hidden folder beside the results; a step is finished by writing down its files, then their digests,
and then moving them.  So whatever is killed when, a file in the folder is whole, and no finished step is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmchat.convert.step import Progress
from mmchat.errors import ModelDirError
from mmchat.half_made import BOARD_STATE, read_state
from mmchat.outputs import replace_file

WORK = ".mmchat-board.work"
_BLOCK = 1 << 20


class Steps:
    """Only for the only_writer of the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelDirError: the folder has files that no steps made."""
        self.folder, self.work = folder, folder / WORK
        self._path = folder / BOARD_STATE
        self._state = read_state(self._path)
        if not all(isinstance(self._state.get(name, {}), dict) for name in ("facts", "steps")):
            self._state = {}
        if not self._state:
            others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            if others:
                raise ModelDirError(f"{folder}: has files already ({others[0]}); give an empty folder")
        self.work.mkdir(exist_ok=True)

    def start(self, **facts: Any) -> None:
        """What the folder is made from, for whoever looks at it before it is complete."""
        self._state["facts"] = facts
        self._save()

    def is_done(self, step: str, key: Any, progress: Progress) -> bool:
        """Whether the step's files are there, made with this key, and have their digests."""
        told = self._state.get("steps", {}).get(step)
        if not told or told.get("key") != _plain(key):
            return False
        for name, known in told["files"].items():
            # In work where it was not moved before a kill; the folder may then have an older one.
            path = self.work / name if (self.work / name).is_file() else self.folder / name
            if not path.is_file() or path.stat().st_size != known["bytes"]:
                return False
            digest = sha256(path, progress)
            if known["sha256"] is None and path.parent == self.work:  # killed while its digest was taken
                known["sha256"] = digest
                self._save()
            if known["sha256"] != digest:
                return False
            if path.parent == self.work:
                os.replace(path, self.folder / name)
        return True

    def begin(self, step: str, names: Collection[str]) -> None:
        """Nothing of it counts as done; where it was made otherwise, the files go that it will not replace."""
        told = self._state.get("steps", {}).pop(step, None)
        if told:
            self._save()
            for name in set(told["files"]) - set(names):
                (self.folder / name).unlink(missing_ok=True)

    def finish(self, step: str, key: Any, names: list[str], report: dict[str, Any], progress: Progress) -> None:
        """The step's files lie in self.work and are complete."""
        files: dict[str, dict[str, Any]] = {
            name: {"bytes": (self.work / name).stat().st_size, "sha256": None} for name in names
        }
        self._state.setdefault("steps", {})[step] = {"key": _plain(key), "files": files, "report": report}
        self._save()  # a digest of 8 GB takes a minute
        for name, known in files.items():
            known["sha256"] = sha256(self.work / name, progress)
        self._save()
        for name in names:
            os.replace(self.work / name, self.folder / name)

    def files(self, *steps: str) -> dict[str, dict[str, Any]]:
        """Name -> {"bytes", "sha256"}, of these steps."""
        return {name: known for step in steps for name, known in self._state["steps"][step]["files"].items()}

    def reports(self) -> dict[str, Any]:
        return {step: told["report"] for step, told in self._state.get("steps", {}).items() if told["report"]}

    @property
    def n_bytes_begun(self) -> int:
        """What killed steps left."""
        return sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())

    def clear(self) -> None:
        """Remove what lay in work; the digests stay."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _save(self) -> None:
        replace_file(self._path, json.dumps(self._state).encode())


def sha256(path: Path, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(f"digest of {path.name}", done, max(done, total))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As it will be read again."""
    return json.loads(json.dumps(value))
