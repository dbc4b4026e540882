"""Image embeddings on disk: the hand-over between processes, the cache, and what later runs find again.

A folder of files named by content: the key covers the slice's pixels, the encoder and the preprocessing, so a file
never changes once it is there, and whoever wants the same slice embedded finds it.  Files appear whole (written aside,
then renamed); a damaged one is noticed by length and checksum, removed, and made again by whoever needs it.  Nothing
is flushed to disk: after a power cut the checksum tells what survived.

The folder is bounded in bytes: the least recently used files go first (a file's mtime is its last use), but never
those under a live lease, which a request holds on everything it is about to read.  Removing a file under a reader is
harmless on POSIX: its mapping stays.  Any number of processes may use one folder; a lock file orders their changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import mmap
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmchat.errors import StoreError

DEFAULT_CAP_BYTES = 2 << 30

# Part of every key: raise it when slicing, normalisation or host-side inputs change what the encoder is given.
PREPROCESSING_VERSION = 1

_HEADER = struct.Struct("<8sIIIIQ32x")  # magic, format, rows, width, CRC-32 of the data, bytes of data: 64 bytes
_MAGIC, _FORMAT = b"MMCHATEM", 1
_KEY = re.compile(r"[0-9a-f]{64}")
_EVICT_TO = 0.9  # of the cap, so that a full store is not scanned at every write
_STALE_TEMPORARY_S = 3600


def default_folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where embeddings are kept unless a folder is given: the first of these that can be used."""
    if named := environ.get("MMCHAT_STORE"):
        return (Path(os.path.expanduser(named)),)
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    temporary = Path(tempfile.gettempdir()) / f"mmchat-{os.getuid()}"
    return Path(cache) / "mmchat" / "embeddings", temporary / "embeddings"


def slice_key(pixels: NDArray[np.uint8], encoder_digest: str) -> str:
    """SHA-256 over the slice's RGB pixels (height, width, 3), its size, the encoder and the preprocessing."""
    height, width, _ = pixels.shape
    head = f"mmchat {PREPROCESSING_VERSION} {encoder_digest} {width}x{height}\n"
    digest = hashlib.sha256(head.encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoreInfo:
    """n_files embeddings of n_bytes in all, and the cap."""

    n_files: int
    n_bytes: int
    cap_bytes: int


class Store:
    """One folder of embeddings.  Cheap to open; safe to use from several threads and processes."""

    _lease_numbers = itertools.count()

    def __init__(self, root: str | Path, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        """Raises StoreError where the folder cannot be made or written."""
        if cap_bytes < 1:
            raise StoreError(f"the store's cap is {cap_bytes} bytes; it must be at least 1")
        self.root, self.cap_bytes = Path(root), cap_bytes
        try:
            self._make_folders()
            with self._lock():
                pass
        except OSError as error:
            raise StoreError(
                f"{self.root}: no place for embeddings ({error.strerror or error}); MMCHAT_STORE names another folder"
            ) from None

    def has(self, key: str) -> bool:
        """Whether an embedding of the right length is there; its checksum is get's affair.  Counts as a use."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                header = _parse(file.read(_HEADER.size))
                if header is None or os.fstat(file.fileno()).st_size != _HEADER.size + header[3]:
                    self._remove(path)
                    return False
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from None
        return True

    def peek(self, key: str) -> bool:
        """Whether an embedding is there, as far as its name tells.  Neither a use nor a check: nothing is written."""
        return self._path(key).is_file()

    def get(self, key: str) -> NDArray[np.float32] | None:
        """(rows, width) float32, mapped and read-only; None where it is missing, or was damaged and is now removed."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.utime(path)
        except (FileNotFoundError, ValueError):  # ValueError: an empty file cannot be mapped
            self._remove(path)
            return None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from None
        header = _parse(mapped[: _HEADER.size])
        if header is not None:
            rows, width, crc, n_bytes = header
            data = memoryview(mapped)[_HEADER.size :]
            if len(data) == n_bytes and zlib.crc32(data) == crc:
                return np.frombuffer(data, "<f4").reshape(rows, width)
        self._remove(path)
        return None

    def put(self, key: str, rows: NDArray[np.float32]) -> None:
        """Keep rows (n, width) under key; a file that is there already is left as it is.

        Raises StoreError: disk full, folder not writable, or larger than the whole store may be.
        """
        path = self._path(key)
        data = np.ascontiguousarray(rows, "<f4").tobytes()
        size = _HEADER.size + len(data)
        if size > self.cap_bytes:
            raise StoreError(f"an embedding of {size:,} bytes is over the store's cap of {self.cap_bytes:,}")
        header = _HEADER.pack(_MAGIC, _FORMAT, rows.shape[0], rows.shape[1], zlib.crc32(data), len(data))
        temporary = self.root / "tmp" / f"{os.getpid()}-{next(self._lease_numbers)}"
        try:
            with self._lock():
                path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary.write_bytes(header + data)
            with self._lock():
                if path.exists():
                    temporary.unlink()
                    return
                total = self._total() + size
                if total > self.cap_bytes:
                    total = self._evict(int(self.cap_bytes * _EVICT_TO) - size) + size
                os.replace(temporary, path)
                self._set_total(total)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"{self.root}: embedding not kept ({error.strerror or error}); MMCHAT_STORE names another folder"
            ) from None

    @contextlib.contextmanager
    def lease(self, keys: Iterable[str]) -> Iterator[None]:
        """Nobody removes these files while the lease is held; a lease dies with its process."""
        path = self.root / "leases" / f"{os.getpid()}-{next(self._lease_numbers)}"
        try:
            with self._lock():
                file = path.open("w")
                file.write("\n".join(keys))
                file.flush()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be written ({error.strerror or error})") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()

    def info(self) -> StoreInfo:
        with self._lock():
            entries = list(self._entries())
        return StoreInfo(len(entries), sum(size for _, size, _ in entries), self.cap_bytes)

    def clear(self) -> None:
        """Remove every embedding that is not under a live lease."""
        with self._lock():
            self._set_total(self._evict(0))

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise StoreError(f"{key!r} is not a key of the store (64 hexadecimal digits)")
        return self.root / "data" / key[:2] / key

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if not (self.root / "tmp").is_dir():  # a user cleaned the cache under a running program
            self._make_folders()
        with (self.root / "lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_folders(self) -> None:
        for name in ("data", "leases", "tmp"):
            (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def _total(self) -> int:
        """Bytes kept, from a side file (under the lock), or by counting where that is missing or unreadable."""
        try:
            return int((self.root / "total").read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._entries())

    def _set_total(self, total: int) -> None:
        (self.root / "total").write_text(str(total))

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for folder in (self.root / "data").iterdir():
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield stat.st_mtime, stat.st_size, path

    def _evict(self, target: int) -> int:
        """Remove the least recently used files until target bytes are left; returns what is left.  Under the lock."""
        leased = self._leased()
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= target:
                break
            if path.name not in leased:
                path.unlink(missing_ok=True)
                total -= size
        for path in (self.root / "tmp").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_TEMPORARY_S:
                    path.unlink()
        return total

    def _leased(self) -> set[str]:
        keys: set[str] = set()
        for path in (self.root / "leases").iterdir():
            with contextlib.suppress(FileNotFoundError), path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    keys.update(file.read().split())
                else:  # its process is gone
                    path.unlink(missing_ok=True)
        return keys

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError), self._lock():
            path.unlink()
            (self.root / "total").unlink(missing_ok=True)  # a damaged file's size is not what it was counted with


def _parse(header: bytes) -> tuple[int, int, int, int] | None:
    """(rows, width, crc, n_bytes) where the header is one of ours and consistent."""
    if len(header) != _HEADER.size:
        return None
    magic, form, rows, width, crc, n_bytes = _HEADER.unpack(header)
    if magic != _MAGIC or form != _FORMAT or rows * width * 4 != n_bytes:
        return None
    return rows, width, crc, n_bytes
