"""What is known of one RKLLM library with one model: profile.json beside the model.

`mmchat calibrate` fills it, and the LLM's client adds what it meets.  A library or a model that is another has a
profile of its own, by digests: the library's whole file, and of the model (8 GB) its size, its first and last MiB
and the SHA-256 that mmchat.json may give for it.  Where the model's folder cannot be written, the file is in
$XDG_STATE_HOME/mmchat/profiles (~/.local/state/mmchat/profiles).  Whoever wants to forget it all deletes the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from mmchat.board_files import file_mark
from mmchat.checkpoint import write_atomic
from mmchat.errors import ModelDirError
from mmchat.model_dir import ModelSpec
from mmchat.store import temporary_folder

_FORMAT = 1
_LOG = logging.getLogger("mmchat")


@dataclass
class Profile:
    """The findings; the defaults are what nothing needs to be known for.  Change it by update, which writes it.

    strategy, rewinds: see mmchat.rkllm_embed.  end_in_kv: the end token is kept in the KV cache; None: not known.
    safe_rows: the most rows of one run; None where none crashed.  chunks: longer prompts may be fed in several runs.
    worked_rows: the longest run that was seen to work.
    crashed_rows: lengths that crashed.
    prefill_rows_per_s, decode_tokens_per_s, encode_s_per_slice: measured; None where they were not.
    probes: what `mmchat calibrate` measured, by name, and may go on with.
    """

    path: Path
    key: str
    strategy: str = "resend"
    rewinds: bool = False
    end_in_kv: bool | None = None
    safe_rows: int | None = None
    chunks: bool = False
    worked_rows: int = 0
    crashed_rows: list[int] = field(default_factory=list)
    prefill_rows_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    encode_s_per_slice: float | None = None
    probes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, spec: ModelSpec, library: Path) -> Profile:
        """What is known; nothing yet where there is no file, or one that cannot be read.

        Raises ModelDirError where the library or the model cannot be read.
        """
        assert spec.board is not None
        key = _key(library, spec.board.llm_path, spec.board.digests)
        path = beside = spec.folder / "profile.json"
        if not os.access(spec.folder, os.W_OK):
            path = state_folder() / "profiles" / f"{key}.json"
        profile = cls(path, key)
        values = _read(path).get(key) or _read(beside).get(key, {})  # of whoever may write there
        for known in fields(cls)[2:]:
            if known.name in values:
                setattr(profile, known.name, values[known.name])
        return profile

    @property
    def allowed(self) -> tuple[str, ...]:
        """Strategies that calibration saw at work, the chosen one first."""
        if self.strategy == "resend":
            return ("resend",)
        works = [name for name in ("prefix", "append") if self.probes.get(name, {}).get("works")]
        return tuple(dict.fromkeys((self.strategy, *works, "resend")))

    def findings(self, strategy: str | None = None) -> dict[str, Any]:
        """As mmchat.rkllm_embed.Findings takes them.  strategy: as if this one had been chosen."""
        rewinds, chunks = self.rewinds, self.chunks
        if strategy is not None and strategy != self.strategy:
            rewinds = strategy == "prefix" and self.probes.get("prefix", {}).get("rewinds", False)
            chunks = strategy == "append" and self.probes.get("append", {}).get("chunks", False)
        strategy = strategy or self.strategy
        return {"strategy": strategy, "rewinds": rewinds, "safe_rows": self.safe_rows, "chunks": chunks}

    def keep_probe(self, name: str, result: dict[str, Any]) -> None:
        """Record what one probe has found so far."""
        self.update(probes={**self.probes, name: result})

    def update(self, **values: Any) -> None:
        """Set fields and write the file; one that cannot be written is told, and the findings last until the end."""
        for name, value in values.items():
            setattr(self, name, value)
        everything = _read(self.path)
        own = {name: value for name, value in asdict(self).items() if name not in ("path", "key")}
        # What another process has found since this one read the file stays.
        everything[self.key] = {**own, **everything.get(self.key, {}), **{name: own[name] for name in values}}
        text = json.dumps({"format": _FORMAT, "profiles": everything}, indent=2).encode() + b"\n"

        def write(file: IO[bytes]) -> None:
            file.write(text)

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, write)
        except OSError as error:
            _LOG.warning("%s: cannot be written (%s)", self.path, error.strerror or error)


def state_folder() -> Path:
    """Where mmchat keeps what it learns and logs."""
    if named := os.environ.get("XDG_STATE_HOME"):
        return Path(named) / "mmchat"
    try:
        return Path.home() / ".local" / "state" / "mmchat"
    except RuntimeError:  # a user without a home, as containers have them
        return _temporary_state()


@lru_cache(maxsize=1)
def _temporary_state() -> Path:
    """A folder of the user's own, where anybody may make one of that name."""
    for end in ("", *(f"-{n}" for n in range(1, 10))):
        folder = temporary_folder() / f"mmchat-{os.getuid()}{end}"
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                return folder
    return Path(os.devnull) / "mmchat"  # where nothing can be written, which whoever tries is prepared for


def _read(path: Path) -> dict[str, Any]:
    """Profiles by key; a file that is damaged or foreign counts as none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        profiles = values["profiles"] if values["format"] == _FORMAT else {}
        return {key: value for key, value in profiles.items() if isinstance(value, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _key(library: Path, model: Path, digests: Any) -> str:
    try:
        mark, whole = file_mark(model), hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelDirError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
    return hashlib.sha256(f"{whole} {mark} {digests.get(model.name)}".encode()).hexdigest()[:32]
