"""A file of sections: each a msgpack map and, where it needs them, bytes.  What session bundles are written in.

    file     b"\\x89mmchat\\n", version, CRC-32 of these                                            16 bytes
    section  kind (4 letters), bytes of the map, bytes of the data,
             CRC-32 of the map, of the data, of these 24 bytes; then the map, then the data        28 bytes and more

The file is a journal: sections are only ever added at its end, so that at any moment it is whole up to some section,
and a program that is killed while it adds one leaves the ones before.  What is added together is flushed to disk
together; what cannot be added (disk full) leaves the file as it was.

Files come from anywhere.  Sizes are compared with the bounds below and with the file before anything is allocated,
maps are never unpickled and hold text, numbers and lists only, and whatever does not fit is told as Damage.  A section
whose inside is damaged is passed over by its lengths, so that no section that lies in its data is taken for one.  After
a damaged header the next one whose own checksum fits, and whose section ends within the file, is searched; then what
the damaged section held is searched too, for nobody knows its end.  Every byte is read a fixed number of times at most.

This module knows no conversation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from mmchat.errors import BundleError

VERSION = 1
# A turn is a few KB, rarely a hundred; a picture of 48 megapixels is 20 MB, one of 16-bit TIFF ten times that.
MAX_MAP_BYTES = 4 << 20
MAX_DATA_BYTES = 512 << 20
MAX_SECTIONS = 1_000_000
# A list allocates its claimed length before its items are there, so the claims are bounded as well.
_LIMITS = {"max_array_len": 8192, "max_map_len": 65_536, "max_ext_len": 0}

_HEAD = struct.Struct(">8sI")
_MAGIC = b"\x89mmchat\n"
_SECTION = struct.Struct(">4sIQII")
_CRC = struct.Struct(">I")
_BLOCK = 1 << 20
# What a header within the bounds may be: the first byte of the map's size is 0, and so are four of the data's.
_LIKE_A_HEADER = re.compile(rb"[A-Z]{4}\x00.{3}\x00{4}", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """kind: four letters.  values: its map.  data_at, n_bytes, crc: where its data lies, and its CRC-32.

    size: bytes that all of it takes.
    """

    kind: str
    values: dict[str, Any]
    data_at: int
    n_bytes: int
    crc: int
    size: int


@dataclass(frozen=True)
class Damage:
    """What cannot be read, from byte `at` on.

    why: in words.  kind, values: of the section, as far as they are whole.  torn: the file ends within its last
    section, as it does after a kill; everything before it is there.  end: where reading goes on after a header that
    says nothing; None where nothing more is found, and for all other damage.
    """

    at: int
    why: str
    kind: str = ""
    values: dict[str, Any] | None = None
    torn: bool = False
    end: int | None = None


class SectionFile:
    """An open file of sections.  It stays readable when the file is removed or replaced meanwhile."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        self.end = _HEAD.size + _CRC.size  # of the sections that were read or added

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> SectionFile:
        """write: sections will be added; nobody else may then.

        Raises BundleError: no such file, not one of sections, of a newer version, or another program adds to it.
        """
        try:
            # Not blocking, for a pipe has no end.
            flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
            file = cls(path, os.open(path, flags))
            if not stat.S_ISREG(os.fstat(file._descriptor).st_mode):
                raise BundleError(f"{path}: is not a file")
            if write:
                file._lock()
            head = file._read(0, file.end)
        except BundleError:
            raise
        except ValueError:
            raise BundleError(f"{path}: no file can have that name") from None
        except OSError as error:
            verb = "written to" if write and os.access(path, os.R_OK) else "read"
            raise BundleError(f"{path}: {_READ_ERRORS.get(error.errno or 0) or _cannot(verb, error)}") from None
        magic, version = _HEAD.unpack_from(head) if len(head) == file.end else (b"", 0)
        if magic != _MAGIC:
            raise BundleError(f"{path}: not a saved session")
        if _CRC.unpack_from(head, _HEAD.size) != (zlib.crc32(head[: _HEAD.size]),):
            raise BundleError(f"{path}: damaged in its first {file.end} bytes; nothing can be read")
        if version != VERSION:
            raise BundleError(f"{path}: saved in format {version}, and this mmchat reads {VERSION}: use a newer mmchat")
        return file

    @classmethod
    def create(
        cls,
        path: Path,
        sections: Iterable[bytes | memoryview],
        *,
        overwrite: bool = True,
        replaces: SectionFile | None = None,
    ) -> SectionFile:
        """A new file of what pack made, in the place of one that is there: complete, or not there at all.

        overwrite=False refuses a path that is taken.  replaces: the caller's own file there.  Nobody but the new
        object may add sections to the new file.

        Raises BundleError: it cannot be written, or another program adds sections to the file that is there.
        """
        try:
            path = Path(os.path.realpath(path))
        except ValueError:
            raise BundleError(f"{path}: no file can have that name") from None
        try:
            if path.exists() and not (overwrite and path.is_file()):
                raise BundleError(f"{path}: {'is not a file' if overwrite else 'is there already'}")
            if path.exists() and not (replaces and replaces.is_in_place()):
                cls(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))._lock()
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        except OSError as error:
            raise BundleError(f"{path}: {_cannot('written', error)}") from None
        temporary = Path(name)
        file = cls(path, descriptor)
        try:
            file._lock()
            head = _HEAD.pack(_MAGIC, VERSION)
            file._write(0, head + _CRC.pack(zlib.crc32(head)))
            file.append(sections)
            _give_name(temporary, path, overwrite)
            _flush_folder(path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise BundleError(f"{path}: {_cannot('written', error)}") from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return file

    def is_in_place(self) -> bool:
        """Whether whoever opens the path finds this very file."""
        try:
            there, mine = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def scan(self) -> Iterator[Section | Damage]:
        """Every section, each with its checksums verified, and what is not whole; sets end."""
        size = os.fstat(self._descriptor).st_size
        at, n_sections = _HEAD.size + _CRC.size, 0
        self.end = at
        while at < size:
            n_sections += 1
            if n_sections > MAX_SECTIONS:
                yield Damage(at, f"more than {MAX_SECTIONS:,} sections")
                return
            head = self._read(at, _SECTION.size + _CRC.size)
            if len(head) < _SECTION.size + _CRC.size:
                yield Damage(at, "the file ends within a section", torn=True)
                return
            name, n_map, n_data, map_crc, data_crc = _SECTION.unpack_from(head)
            if _CRC.unpack_from(head, _SECTION.size) != (zlib.crc32(head[: _SECTION.size]),):
                found = self._next_header(at + 1, size)
                yield Damage(at, "a section's header is damaged", end=found)
                if found is None:
                    return
                at = found
                continue
            kind = name.decode("ascii", errors="replace")
            map_at, following = at + len(head), at + len(head) + n_map + n_data
            is_kind = re.fullmatch("[A-Z]{4}", kind) is not None
            if following > size:
                yield Damage(at, "the file ends within a section", kind if is_kind else "", torn=True)
                return
            if not is_kind:
                yield Damage(at, "a section has no valid kind", end=following)
            elif n_map > MAX_MAP_BYTES or n_data > MAX_DATA_BYTES:
                most = MAX_MAP_BYTES if n_map > MAX_MAP_BYTES else MAX_DATA_BYTES
                yield Damage(at, f"a section of {n_map + n_data:,} bytes is over the bound of {most:,}", kind)
            else:
                section = self._section(kind, map_at, n_map, n_data, map_crc, data_crc)
                yield Damage(at, section, kind) if isinstance(section, str) else self._checked(at, section)
            at = self.end = following

    def _next_header(self, at: int, size: int) -> int | None:
        """Where the first header from `at` on begins that fits the bounds, the file and its own checksum."""
        n_head, start, n_bytes = _SECTION.size + _CRC.size, at, 256
        while start < size:  # a little first: where there are many gaps, each is searched anew
            block, place = self._read(start, n_bytes + n_head - 1), 0
            while found := _LIKE_A_HEADER.search(block, place):
                place = found.start() + 1
                head = block[found.start() : found.start() + n_head]
                if len(head) < n_head or _CRC.unpack_from(head, _SECTION.size) != (zlib.crc32(head[: _SECTION.size]),):
                    continue
                _, n_map, n_data, _, _ = _SECTION.unpack_from(head)
                following = start + found.start() + n_head + n_map + n_data
                if n_map <= MAX_MAP_BYTES and n_data <= MAX_DATA_BYTES and following <= size:
                    return start + found.start()
            start, n_bytes = start + n_bytes, min(2 * n_bytes, _BLOCK)
        return None

    def data(self, section: Section) -> bytes:
        """A section's data.  Raises BundleError where it is no longer what scan found, or cannot be read."""
        try:
            data = self._read(section.data_at, section.n_bytes)
        except OSError as error:
            raise BundleError(f"{self.path}: {_cannot('read', error)}") from None
        if len(data) != section.n_bytes or zlib.crc32(data) != section.crc:
            raise BundleError(f"{self.path}: was changed or damaged after it was opened")
        return data

    def append(self, sections: Iterable[bytes | memoryview]) -> int:
        """Add what pack made and flush it to disk; returns the bytes added.  All of it, or none.

        Raises OSError: disk full, too large for the file system.
        """
        at = self.end
        try:
            for data in sections:
                self._write(at, data)
                at += len(data)
            if at > self.end:
                os.fsync(self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.end)
            raise
        added, self.end = at - self.end, at
        return added

    def unlock(self) -> None:
        """Others may add sections from now on, and this object may not."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def cut(self) -> None:
        """Drop what lies after the last section.  Raises OSError."""
        os.ftruncate(self._descriptor, self.end)

    def _section(self, kind: str, map_at: int, n_map: int, n_data: int, map_crc: int, data_crc: int) -> Section | str:
        """The section without a look at its data, or why there is none."""
        packed = self._read(map_at, n_map)
        if zlib.crc32(packed) != map_crc:
            return "a section is damaged"
        try:
            values = _unpack(packed)
        except Exception as error:  # of many kinds
            return f"a section is not msgpack ({type(error).__name__})"
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            return "a section is no map"
        size = _SECTION.size + _CRC.size + n_map + n_data
        return Section(kind, values, map_at + n_map, n_data, data_crc, size)

    def _checked(self, at: int, section: Section) -> Section | Damage:
        crc = 0
        for start in range(section.data_at, section.data_at + section.n_bytes, _BLOCK):
            crc = zlib.crc32(self._read(start, min(_BLOCK, section.data_at + section.n_bytes - start)), crc)
        if crc != section.crc:
            return Damage(at, "a section's data is damaged", section.kind, section.values)
        return section

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(f"{self.path}: another conversation is being saved there") from None

    def _read(self, at: int, n_bytes: int) -> bytes:
        """As many bytes as there are."""
        data = os.pread(self._descriptor, n_bytes, at)
        while 0 < len(data) < n_bytes and (more := os.pread(self._descriptor, n_bytes - len(data), at + len(data))):
            data += more
        return data

    def _write(self, at: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self._descriptor, view[:_BLOCK], at)
            view, at = view[n:], at + n


def pack(kind: str, values: dict[str, Any], data: bytes = b"") -> list[bytes]:
    """One section, in pieces that follow each other.  Raises BundleError for one that could not be read again."""
    try:
        packed = msgpack.packb(values, use_bin_type=True)
        _unpack(packed)
    except Exception as error:  # of many kinds
        raise BundleError(f"something that no file can hold ({error})") from None
    for n_bytes, most in ((len(packed), MAX_MAP_BYTES), (len(data), MAX_DATA_BYTES)):
        if n_bytes > most:
            raise BundleError(f"{n_bytes:,} bytes in one section, over the bound of {most:,}")
    head = _SECTION.pack(kind.encode(), len(packed), len(data), zlib.crc32(packed), zlib.crc32(data))
    return [head + _CRC.pack(zlib.crc32(head)) + packed, data]


def _unpack(packed: bytes) -> Any:
    """Tuples for lists, for empty ones take no memory.  Refuses, among others, text that is no UTF-8."""
    return msgpack.unpackb(packed, raw=False, strict_map_key=True, use_list=False, **_LIMITS)


_READ_ERRORS = {errno.ENOENT: "no such file", errno.EISDIR: "is a folder, not a saved session"}


def _cannot(verb: str, error: OSError) -> str:
    return f"cannot be {verb} ({error.strerror or error})"


def same_place(a: str | Path, b: str | Path) -> bool:
    """Whether two names lead to one file, which need not be there."""
    try:
        return os.path.realpath(a) == os.path.realpath(b)
    except ValueError:  # no file can have that name
        return False


def _give_name(temporary: Path, path: Path, overwrite: bool) -> None:
    """Raises BundleError: somebody has made a file there meanwhile (overwrite=False); OSError."""
    if not overwrite:
        try:
            os.link(temporary, path)
            temporary.unlink()
            return
        except FileExistsError:
            temporary.unlink()
            raise BundleError(f"{path}: is there already") from None
        except OSError:  # no file has two names on an SD card's file system
            pass
    os.replace(temporary, path)


def _flush_folder(folder: Path) -> None:
    """So that the new name survives a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
