"""Image embeddings on disk: the hand-over between processes, the cache, and what later runs find again.

A folder of files named by content: the key covers the slice's pixels, the encoder and the preprocessing, so a file
never changes once it is there, and whoever wants the same slice embedded finds it.  Files appear whole (written aside,
then renamed); a damaged one is noticed by length and checksum, removed, and made again by whoever needs it.  Nothing
is flushed to disk: after a power cut the checksum tells what survived.

The folder is bounded in bytes: the least recently used files go first (a file's mtime is its last use), but never
those under a live lease, which a request holds on everything it is about to read.  Removing a file under a reader is
harmless on POSIX: its mapping stays.  Any number of processes may use one folder; a lock file orders their changes.

A disk may be full, or a folder read-only, at the start or at any time later.  What such a folder has is still read;
what it cannot take goes to a spare folder, which is a small store of the same kind in memory (/dev/shm, or the
system's temporary folder where there is none).  So the hand-over still works and only the cache is off: the spare
folder is shared by the user's processes and gone after a restart of the machine.  Every embedding tries the real
folder first, so that the cache is on again as soon as there is room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.errors import StoreError

DEFAULT_CAP_BYTES = 2 << 30
# More than any one conversation on a board refers to: 4096 rows of the 8B model are 59 MB.
SPARE_CAP_BYTES = 256 << 20

# Part of every key: raise it when slicing, normalisation or host-side inputs change what the encoder is given.
PREPROCESSING_VERSION = 1

_HEADER = struct.Struct("<8sIIIIQ32x")  # magic, format, rows, width, CRC-32 of the data, bytes of data: 64 bytes
_MAGIC, _FORMAT = b"MMCHATEM", 1
_KEY = re.compile(r"[0-9a-f]{64}")
_EVICT_TO = 0.9  # of the cap, so that a full store is not scanned at every write
_STALE_TEMPORARY_S = 3600
# A folder that time, room or permission would make usable; any other error means that none can be there.
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_LOG = logging.getLogger("mmchat")


def default_folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where embeddings are kept unless a folder is given: the first of these that can be used."""
    if named := environ.get("MMCHAT_STORE"):
        return (Path(os.path.expanduser(named)),)
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    temporary = temporary_folder() / f"mmchat-{os.getuid()}" / "embeddings"
    if cache.startswith("~"):  # a user without a home, as containers have them
        return (temporary,)
    return Path(cache) / "mmchat" / "embeddings", temporary


def default_cap(environ: Mapping[str, str]) -> int:
    """Bytes that a store may take unless a cap is given: $MMCHAT_STORE_CAP ("500M", "2G", bytes), else 2 GiB.

    Raises StoreError: it is no such size.
    """
    named = environ.get("MMCHAT_STORE_CAP")
    if not named:
        return DEFAULT_CAP_BYTES
    found = re.fullmatch(r"(\d{1,12})([KMGT]?)(?:i?B)?", named.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise StoreError(f"MMCHAT_STORE_CAP is {named!r}; it must be a size like 500M or 2G")
    return int(found[1]) << (10 * " KMGT".index(found[2].upper() or " "))


def spare_folder() -> Path:
    """Where embeddings go that a full or read-only folder cannot take: in memory where there is room."""
    places = [place for place in (Path("/dev/shm"), temporary_folder()) if os.access(place, os.W_OK | os.X_OK)]
    roomy = [place for place in places if shutil.disk_usage(place).free >= SPARE_CAP_BYTES]
    return [*roomy, *places, temporary_folder()][0] / f"mmchat-{os.getuid()}" / "spare"


def temporary_folder() -> Path:
    """The system's."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # it writes a file to find out, and none of the folders it knows takes one
        return Path("/tmp")


def open_store(folder: str | Path | None, cap_bytes: int, environ: Mapping[str, str]) -> Store:
    """The store in folder, or in the first of the default folders that can be written.

    Where none can be written (full, read-only), the first is read and the spare folder is used; a warning says so.

    Raises StoreError where no folder can be one.
    """
    folders = (Path(os.path.expanduser(folder)),) if folder else default_folders(environ)
    spare, refused, first = spare_folder(), "", None
    for candidate in folders:
        try:
            store = Store(candidate, cap_bytes, spare=spare)
        except StoreError as error:
            if candidate is folders[-1] and first is None:
                raise
            refused = refused or str(error)
            continue
        if not store.problem:
            if refused:
                _LOG.warning("%s; %s is used", refused, candidate)
            return store
        first, refused = first or store, refused or store.problem
    assert first is not None
    first.tell(first.problem)
    return first


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


@dataclass(frozen=True)
class Verified:
    """n_whole embeddings are as they were put; n_removed were damaged; n_left are, and could not be removed."""

    n_whole: int
    n_removed: int
    n_left: int

    def __add__(self, other: Verified) -> Verified:
        return Verified(self.n_whole + other.n_whole, self.n_removed + other.n_removed, self.n_left + other.n_left)


class Store:
    """One folder of embeddings.  Cheap to open; safe to use from several threads and processes.

    problem: why nothing can be written there, as found when it was opened; "" where all was well.
    """

    def __init__(
        self,
        root: str | Path,
        cap_bytes: int = DEFAULT_CAP_BYTES,
        *,
        spare: str | Path | None = None,
        lazy: bool = False,
    ) -> None:
        """spare: folder for what root cannot take.  lazy: do not make the folder before it is needed.

        Raises StoreError where there can be no such folder; without a spare one, also where it cannot be written.
        """
        if cap_bytes < 1:
            raise StoreError(f"the store's cap is {cap_bytes} bytes; it must be at least 1")
        self.root, self.cap_bytes, self.problem = Path(os.path.abspath(root)), cap_bytes, ""
        self._folder = str(self.root)  # no Path where every slice goes by: each takes 50 microseconds
        self.spare = None if spare is None else Store(spare, min(cap_bytes, SPARE_CAP_BYTES), lazy=True)
        self._told = False
        if lazy:
            return
        try:
            self._make_folders()
            with self._lock():
                pass
        except OSError as error:
            self.problem = f"{self.root}: no place for embeddings ({error.strerror or error})"
            if self.spare is None or error.errno not in _CANNOT_WRITE:
                raise StoreError(f"{self.problem}; MMCHAT_STORE names another folder") from None

    def to_dict(self) -> dict[str, Any]:
        """What another process opens the same store with: Store(**values)."""
        return {
            "root": str(self.root),
            "cap_bytes": self.cap_bytes,
            "spare": str(self.spare.root) if self.spare else None,
        }

    def tell(self, problem: str) -> None:
        """Log, once, that the cache is off and why."""
        if self.spare is not None and not self._told:
            self._told = True
            _LOG.warning("%s: the cache is off, image embeddings are in %s meanwhile", problem, self.spare.root)

    def has(self, key: str) -> bool:
        """Whether an embedding of the right length is there; its checksum is get's affair.  Counts as a use."""
        path = self._path(key)
        try:
            if not _has_its_length(path):
                self._discard(path)
            elif _touch(path):
                return True
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from None
        return self.spare is not None and self.spare.has(key)

    def peek(self, key: str) -> bool:
        """Whether an embedding is there, as far as its name tells.  Neither a use nor a check: nothing is written."""
        return os.path.isfile(self._path(key)) or (self.spare is not None and self.spare.peek(key))

    def get(self, key: str) -> NDArray[np.float32] | None:
        """(rows, width) float32, mapped and read-only; None where it is missing, or was damaged and is now removed."""
        path = self._path(key)
        try:
            rows = _read(path)
            if rows is None:
                self._discard(path)
            elif _touch(path):
                return rows
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from None
        return self.spare.get(key) if self.spare else None

    def put(self, key: str, rows: NDArray[np.float32]) -> str | None:
        """Keep rows (n, width) under key; a file that is there already is left as it is.

        Returns why the embedding is in the spare folder and not here; None where it is here.

        Raises StoreError: larger than the whole store may be; nowhere to write it.
        """
        path = self._path(key)
        data = np.ascontiguousarray(rows, "<f4").tobytes()
        size = _HEADER.size + len(data)
        if size > self.cap_bytes:
            raise StoreError(f"an embedding of {size:,} bytes is over the store's cap of {self.cap_bytes:,}")
        header = _HEADER.pack(_MAGIC, _FORMAT, rows.shape[0], rows.shape[1], zlib.crc32(data), len(data))
        try:
            self._write(path, header + data)
        except OSError as error:
            problem = f"{self.root}: embedding not kept ({error.strerror or error})"
            if self.spare is None:
                raise StoreError(f"{problem}; MMCHAT_STORE names another folder") from None
            try:
                self.spare.put(key, rows)
            except StoreError as also:
                raise StoreError(f"{problem}; {also}") from None
            return problem
        return None

    @contextlib.contextmanager
    def lease(self, keys: Iterable[str]) -> Iterator[None]:
        """Nobody removes these files while the lease is held; a lease dies with its process.

        A folder that cannot take even that goes without: what is then removed meanwhile is made again.
        """
        keys = list(keys)
        with contextlib.ExitStack() as leases:
            try:
                leases.enter_context(self._lease(keys))
            except OSError as error:
                if self.spare is None:
                    raise StoreError(f"{self.root}: cannot be written ({error.strerror or error})") from None
            if self.spare is not None and self.spare.root.is_dir():
                with contextlib.suppress(OSError):
                    leases.enter_context(self.spare._lease(keys))
            yield

    def info(self) -> StoreInfo:
        entries = list(self._entries())
        return StoreInfo(len(entries), sum(size for _, size, _ in entries), self.cap_bytes)

    def verify(self) -> Verified:
        """Read every embedding; damaged ones are removed, to be made again by whoever needs them."""
        n_whole = n_removed = n_left = 0
        for _, _, path in list(self._entries()):
            try:
                if _read(path) is not None:
                    n_whole += 1
                    continue
                self._discard(path)
            except FileNotFoundError:
                continue  # evicted meanwhile
            except OSError:
                pass
            if path.exists():
                n_left += 1
            else:
                n_removed += 1
        return Verified(n_whole, n_removed, n_left)

    def clear(self) -> None:
        """Remove every embedding that is not under a live lease.  Raises StoreError where that is not allowed."""
        try:
            with self._lock():
                self._set_total(self._evict(0))
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be cleared ({error.strerror or error})") from None

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise StoreError(f"{key!r} is not a key of the store (64 hexadecimal digits)")
        return f"{self._folder}/data/{key[:2]}/{key}"

    def _write(self, path: str, data: bytes) -> None:
        temporary = f"{self._folder}/tmp/{_unique()}"
        try:
            try:
                _create(temporary, data)
            except FileNotFoundError:  # a user cleaned the cache under a running program
                self._make_folders()
                _create(temporary, data)
            with self._lock():
                if os.path.exists(path):
                    os.unlink(temporary)
                    return
                total = self._total() + len(data)
                if total > self.cap_bytes:
                    total = self._evict(int(self.cap_bytes * _EVICT_TO) - len(data)) + len(data)
                try:
                    os.replace(temporary, path)
                except FileNotFoundError:  # the first in its folder
                    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                    os.replace(temporary, path)
                self._set_total(total)
        except OSError:
            _unlink(temporary)
            raise

    @contextlib.contextmanager
    def _lease(self, keys: Iterable[str]) -> Iterator[None]:
        path = f"{self._folder}/leases/{_unique()}"
        with contextlib.ExitStack() as held:
            with self._lock():
                file = os.open(path, _NEW, 0o600)
                held.callback(os.close, file)
                held.callback(_unlink, path)
                _write_all(file, "\n".join(keys).encode())
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if not os.path.isdir(f"{self._folder}/tmp"):
            self._make_folders()
        lock = os.open(f"{self._folder}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _make_folders(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.root, self.root.parent):  # below /tmp anybody could have made it, to read or to forge
            if folder.parent.stat().st_mode & stat.S_IWOTH and folder.stat().st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "the folder belongs to another user", str(folder))
        for name in ("data", "leases", "tmp"):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)

    def _total(self) -> int:
        """Bytes kept, from a side file (under the lock), or by counting where that is missing or unreadable."""
        try:
            file = os.open(f"{self._folder}/total", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return int(os.read(file, 64))
            finally:
                os.close(file)
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._entries())

    def _set_total(self, total: int) -> None:
        try:
            file = os.open(f"{self._folder}/total", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # In place: ext4 writes a file that was emptied and filled to disk at once, which costs half a put.
                os.write(file, b"%020d" % total)
                os.ftruncate(file, 20)
            finally:
                os.close(file)
        except OSError:  # not even room for a number: they are counted again
            _unlink(f"{self._folder}/total")

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every embedding.  Without the lock they may go meanwhile."""
        for path in (self.root / "data").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path

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

    def _discard(self, path: str | Path) -> None:
        """Remove a damaged file, unless another process has replaced it meanwhile, or nothing can be removed."""
        with contextlib.suppress(OSError), self._lock():
            if _read(path) is None:
                os.unlink(path)
                (self.root / "total").unlink(missing_ok=True)  # its size is not what it was counted with


def _read(path: str | Path) -> NDArray[np.float32] | None:
    """The rows in a file, mapped; None where it is damaged.  Raises OSError."""
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return None
    header = _parse(mapped[: _HEADER.size])
    if header is None:
        return None
    rows, width, crc, n_bytes = header
    data = memoryview(mapped)[_HEADER.size :]
    if len(data) != n_bytes or zlib.crc32(data) != crc:
        return None
    return np.frombuffer(data, "<f4").reshape(rows, width)


def _has_its_length(path: str | Path) -> bool:
    """Whether the header is one of ours and the file as long as it says.  Raises OSError."""
    with open(path, "rb") as file:
        header = _parse(file.read(_HEADER.size))
        return header is not None and os.fstat(file.fileno()).st_size == _HEADER.size + header[3]


def _touch(path: str | Path) -> bool:
    """Note a use; False where the file has gone meanwhile."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # read-only: then nothing is ever removed either
        pass
    return True


def _create(path: str, data: bytes) -> None:
    """A new file with this content.  Raises OSError; then it may be there in part."""
    file = os.open(path, _NEW, 0o600)
    try:
        _write_all(file, data)
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _unique() -> str:
    """A file name that no other process takes, not even one with the same number in another container."""
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def _parse(header: bytes) -> tuple[int, int, int, int] | None:
    """(rows, width, crc, n_bytes) where the header is one of ours and consistent."""
    if len(header) != _HEADER.size:
        return None
    magic, form, rows, width, crc, n_bytes = _HEADER.unpack(header)
    if magic != _MAGIC or form != _FORMAT or rows * width * 4 != n_bytes:
        return None
    return rows, width, crc, n_bytes
