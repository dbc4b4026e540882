"""Files of sections: what is written is read; what is damaged is told, and the rest is there still."""

from __future__ import annotations

import errno
import gc
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmchat import sections
from mmchat.errors import BundleError
from mmchat.sections import Damage, Section, SectionFile, pack

HEAD_BYTES, SECTION_HEAD_BYTES = 16, 28

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
contents = st.lists(
    st.tuples(st.from_regex("[A-Z]{4}", fullmatch=True), st.dictionaries(st.text(), values, max_size=4), st.binary()),
    max_size=5,
)
Content = list[tuple[str, dict[str, Any], bytes]]


def write(path: Path, content: Content) -> SectionFile:
    return SectionFile.create(path, [piece for section in content for piece in pack(*section)])


def read(path: Path) -> tuple[Content, list[Damage]]:
    """What is whole, and what is not."""
    file = SectionFile.open(path)
    found = list(file.scan())
    whole = [(s.kind, s.values, file.data(s)) for s in found if isinstance(s, Section)]
    return whole, [damage for damage in found if isinstance(damage, Damage)]


@given(contents)
def test_what_is_written_is_read(tmp_path: Path, content: Content) -> None:
    write(tmp_path / "file", content)
    assert read(tmp_path / "file") == (content, [])


@given(contents, contents)
def test_sections_are_added_at_the_end(tmp_path: Path, content: Content, more: Content) -> None:
    file = write(tmp_path / "file", content)
    before = (tmp_path / "file").read_bytes()
    for section in more:
        assert file.append(pack(*section)) == len(b"".join(pack(*section)))
    assert read(tmp_path / "file") == (content + more, [])
    assert (tmp_path / "file").read_bytes().startswith(before)


def raw(kind: bytes, packed: bytes, data: bytes = b"", *, n_map: int | None = None, n_data: int | None = None) -> bytes:
    """A section with right checksums, whatever it says."""
    lengths = len(packed) if n_map is None else n_map, len(data) if n_data is None else n_data
    head = struct.pack(">4sIQII", kind, *lengths, zlib.crc32(packed), zlib.crc32(data))
    return head + struct.pack(">I", zlib.crc32(head)) + packed + data


SMALL: Content = [
    ("FIRS", {"system": "Be brief.", "n": 3}, b""),
    ("PICT", {"id": "a"}, b"\x00\x01picture\xff"),
    ("LAST", {"list": (1, 2.5, None, True)}, b""),
]


def starts(content: Content) -> list[int]:
    """Where each section begins, and where the last one ends."""
    at = [HEAD_BYTES]
    for section in content:
        at.append(at[-1] + sum(map(len, pack(*section))))
    return at


def test_a_file_cut_at_any_length_has_the_sections_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, SMALL)
    whole, bounds = path.read_bytes(), starts(SMALL)
    assert bounds[-1] == len(whole)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length < HEAD_BYTES:
            with pytest.raises(BundleError, match="not a saved session"):
                read(path)
            continue
        content, damages = read(path)
        assert content == SMALL[: sum(end <= length for end in bounds[1:])]
        assert [(damage.at in bounds, damage.torn) for damage in damages] == [(True, True)] * (length not in bounds)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """And costs the section that it is in, no other."""
    path = tmp_path / "file"
    write(path, SMALL)
    whole, bounds = path.read_bytes(), starts(SMALL)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if bit // 8 < HEAD_BYTES:
            with pytest.raises(BundleError, match=r"not a saved session|damaged in its first 16 bytes"):
                read(path)
            continue
        hit = sum(start <= bit // 8 for start in bounds) - 1
        in_header = bit // 8 - bounds[hit] < SECTION_HEAD_BYTES
        content, (damage,) = read(path)
        assert content == SMALL[:hit] + SMALL[hit + 1 :]
        assert not damage.torn
        assert damage.at == bounds[hit]
        if in_header:
            assert damage.end == (bounds[hit + 1] if hit + 1 < len(SMALL) else None)
        if damage.values is not None:
            assert damage.values == SMALL[hit][1]
            assert damage.why == "a section's data is damaged"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_section_within_another_is_none(tmp_path: Path) -> None:
    """Whether the outer one's map, its data or nothing is damaged; once its header is, nobody knows where it ends."""
    path = tmp_path / "file"
    inner = b"".join(pack("TURN", {"n": 1}, b"inner"))
    content: Content = [("PICT", {"id": inner}, b"x" + inner * 2 + b"y"), SMALL[0]]
    write(path, content)
    assert read(path) == (content, [])
    whole, at = path.read_bytes(), starts(content)
    for place in (at[0] + SECTION_HEAD_BYTES + 1, at[1] - 1):
        path.write_bytes(whole)
        flip(path, place)
        assert read(path)[0] == [SMALL[0]]
    path.write_bytes(whole)
    flip(path, at[0] + 5)
    found, damages = read(path)
    assert found == [("TURN", {"n": 1}, b"inner")] * 3 + [SMALL[0]]
    assert [damage.end is not None for damage in damages] == [True] * 3


def test_a_header_is_found_wherever_it_lies(tmp_path: Path) -> None:
    """Also across the blocks in which it is searched."""
    path = tmp_path / "file"
    for n_bytes in [*range(1, 40), *range(200, 300), 256 + 512]:
        write(path, [("LOST", {}, b"A" * n_bytes), *SMALL])
        flip(path, HEAD_BYTES)
        assert read(path)[0] == SMALL


def test_a_search_reads_every_byte_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of the file is like headers, with right checksums or not, whose sections overlap."""
    near = b"AAAA\0\0\0\1" + bytes(8)
    long = raw(b"LONG", b"", n_data=100_000)  # each reaches far over the next ones
    beyond = raw(b"LONG", b"", n_data=500 << 20)  # and each of these over the file's end
    read_bytes, tried = [0], [0]
    real, real_crc = SectionFile._read, zlib.crc32

    def counted(self: SectionFile, at: int, n_bytes: int) -> bytes:
        data = real(self, at, n_bytes)
        read_bytes[0] += len(data)
        return data

    def crc(data: Any, value: int = 0) -> int:
        tried[0] += len(data)
        return real_crc(data, value)

    monkeypatch.setattr(SectionFile, "_read", counted)
    short = b"x" + raw(b"TINY", b"")
    many = (near * 30_000, long * 20_000, beyond * 20_000, (near + long + beyond) * 8000, short * 3000)
    for garbage in many:
        path = tmp_path / "file"
        write(path, [])
        with path.open("ab") as file:
            file.write(b"x" + garbage + b"".join(pack(*SMALL[2])))
        n_bytes, read_bytes[0], tried[0] = path.stat().st_size, 0, 0
        with monkeypatch.context() as patch:
            patch.setattr(zlib, "crc32", crc)
            found = list(SectionFile.open(path).scan())
        assert isinstance(found[-1], Section) or b"LONG" in garbage
        assert read_bytes[0] < 15 * n_bytes
        assert tried[0] < 15 * n_bytes


@given(st.binary(max_size=80))
def test_garbage_after_the_head(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "file"
    write(path, [])
    with path.open("ab") as file:
        file.write(garbage)
    content, damages = read(path)
    assert content == []
    assert len(damages) == bool(garbage)


@given(st.binary(max_size=60))
def test_garbage_with_right_checksums(tmp_path: Path, packed: bytes) -> None:
    """A map or not: what comes after it is read."""
    path = tmp_path / "file"
    write(path, [])
    with path.open("ab") as file:
        file.write(raw(b"WHAT", packed) + b"".join(pack("LAST", {})))
    content, damages = read(path)
    assert content[-1] == ("LAST", {}, b"")
    assert len(content) + len(damages) == 2


HOSTILE = {
    "a list of four billion": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "a text of four billion": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "lists of 8193 in each other": b"\x81\xa1a" + b"\xdd\x00\x00\x20\x01" * 600,
    "lists of 8192 in each other": b"\x81\xa1a" + b"\xdd\x00\x00\x20\x00" * 600,
    "deep lists": b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "a list": b"\x93\x01\x02\x03",
    "a number as key": b"\x81\x01\x02",
    "bytes as key": b"\x81\xc4\x01a\x02",
    "a list as key": b"\x81\x91\x01\x02",
    "no UTF-8": b"\x81\xa1a\xa2\xff\xfe",
    "two values": b"\x80\x80",
    "an extension": b"\x81\xa1a\xd4\x05\x00",
    "a time": b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_map_is_passed_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    write(path, SMALL[:1])
    with path.open("ab") as file:
        file.write(raw(b"EVIL", HOSTILE[name]) + b"".join(pack(*SMALL[2])))
    content, (damage,) = read(path)
    assert content == [SMALL[0], SMALL[2]]
    assert damage.kind == "EVIL"
    assert "not msgpack" in damage.why or "no map" in damage.why


@pytest.mark.parametrize("lengths", [(2**32 - 1, 0), (1, 2**64 - 1), (2**32 - 1, 2**64 - 1), (1, 2**63), (1, 30)])
def test_a_length_beyond_the_file_ends_it(tmp_path: Path, lengths: tuple[int, int]) -> None:
    """Nothing is allocated for it."""
    path = tmp_path / "file"
    write(path, SMALL[:1])
    with path.open("ab") as file:
        file.write(raw(b"LONG", b"\x80", n_map=lengths[0], n_data=lengths[1]))
    content, (damage,) = read(path)
    assert content == SMALL[:1]
    assert damage.torn


def test_a_section_over_the_bounds_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write(path, [("MAPP", {"a": "x" * 200}, b""), ("DATA", {}, b"x" * 300), SMALL[2]])
    monkeypatch.setattr(sections, "MAX_MAP_BYTES", 100)
    monkeypatch.setattr(sections, "MAX_DATA_BYTES", 200)
    content, damages = read(path)
    assert content == [SMALL[2]]
    assert [(damage.kind, "over the bound of" in damage.why) for damage in damages] == [("MAPP", True), ("DATA", True)]
    with pytest.raises(BundleError, match="201 bytes in one section, over the bound of 200"):
        pack("DATA", {}, b"x" * 201)
    with pytest.raises(BundleError, match="over the bound of 100"):
        pack("MAPP", {"a": "x" * 100})


def test_the_number_of_sections_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "file", [("MANY", {}, b"")] * 12)
    monkeypatch.setattr(sections, "MAX_SECTIONS", 10)
    content, (damage,) = read(tmp_path / "file")
    assert len(content) == 10
    assert "more than 10 sections" in damage.why


@pytest.mark.parametrize("kind", [b"turn", b"TUR\xff", b"\0\0\0\0"])
def test_a_kind_is_four_letters(tmp_path: Path, kind: bytes) -> None:
    write(tmp_path / "file", [])
    with (tmp_path / "file").open("ab") as file:
        file.write(raw(kind, b"\x80"))
    assert read(tmp_path / "file")[0] == []


def test_another_version(tmp_path: Path) -> None:
    head = b"\x89mmchat\n" + struct.pack(">I", 7)
    (tmp_path / "file").write_bytes(head + struct.pack(">I", zlib.crc32(head)))
    with pytest.raises(BundleError, match="saved in format 7, and this mmchat reads 1: use a newer mmchat"):
        SectionFile.open(tmp_path / "file")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for name, why in (
        ("none", "no such file"),
        (".", "is a folder|is not a file"),
        ("pipe", "is not a file"),
        ("empty", "not a saved session"),
        ("picture.png", "not a saved session"),
    ):
        with pytest.raises(BundleError, match=why):
            SectionFile.open(tmp_path / name)
        if name in (".", "pipe"):
            with pytest.raises(BundleError, match="is not a file"):
                SectionFile.create(tmp_path / name, [])
    with pytest.raises(BundleError, match="cannot be written"):
        SectionFile.create(tmp_path / "none" / "file", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "picture.png", "pipe"]


@pytest.mark.parametrize("value", [object(), 2**64, "\ud800", {1, 2}])
def test_what_cannot_be_packed(value: Any) -> None:
    with pytest.raises(BundleError, match="something that no file can hold"):
        pack("WHAT", {"value": value})


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """Readers may come at any moment; the lock ends with the object, by unlock, or with the process."""
    path = tmp_path / "file"
    file = write(path, SMALL)
    with pytest.raises(BundleError, match="another conversation is being saved there"):
        SectionFile.open(path, write=True)
    with pytest.raises(BundleError, match="another conversation is being saved there"):
        SectionFile.create(path, [])
    assert read(path) == (SMALL, [])
    file.unlock()
    other = SectionFile.open(path, write=True)
    assert len(list(other.scan())) == 3
    other.append(pack("MORE", {}))
    del other
    gc.collect()
    SectionFile.open(path, write=True)
    code = "import sys, time; from pathlib import Path; from mmchat.sections import SectionFile\n"
    code += "file = SectionFile.open(Path(sys.argv[1]), write=True); print('open', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"open\n"
    with pytest.raises(BundleError, match="being saved there"):
        SectionFile.open(path, write=True)
    child.kill()
    child.communicate()
    SectionFile.open(path, write=True)


def test_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, SMALL)
    path.write_bytes(path.read_bytes()[:-3])
    file = SectionFile.open(path, write=True)
    list(file.scan())
    file.cut()
    file.append(pack(*SMALL[1]))
    assert read(path) == ([*SMALL[:2], SMALL[1]], [])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    file = write(path, SMALL)
    before = path.read_bytes()
    real, room = os.pwrite, [40]

    def pwrite(descriptor: int, data: Any, at: int) -> int:
        n = min(len(data), room[0])
        if not n:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= n
        return real(descriptor, data[:n], at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        file.append(pack("MORE", {}, bytes(100)))
    assert path.read_bytes() == before
    room[0] = 40
    with pytest.raises(BundleError, match=r"cannot be written \(No space left on device"):
        SectionFile.create(path, pack("MORE", {}, bytes(100)), replaces=file)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    room[0] = 1000
    file.append(pack("MORE", {}, bytes(100)))
    monkeypatch.undo()
    assert read(path) == ([*SMALL, ("MORE", {}, bytes(100))], [])


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """An error on the way leaves the old one; who has it open reads on; a link keeps pointing at it."""
    path = tmp_path / "file"
    write(path, SMALL)
    (tmp_path / "link").symlink_to(path)
    old = SectionFile.open(path)
    first = next(section for section in old.scan() if isinstance(section, Section) and section.kind == "PICT")

    def pieces() -> Any:
        yield from pack(*SMALL[0])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        SectionFile.create(path, pieces())
    assert read(path) == (SMALL, [])
    with pytest.raises(BundleError, match="is there already"):
        SectionFile.create(path, [], overwrite=False)
    assert old.is_in_place()
    newer = SectionFile.create(tmp_path / "link", pack(*SMALL[1]))
    new = SectionFile.create(tmp_path / "link", pack(*SMALL[2]), replaces=newer)
    assert new.is_in_place()
    assert not old.is_in_place()
    assert (tmp_path / "link").is_symlink()
    assert read(path) == (SMALL[2:], [])
    assert old.data(first) == SMALL[1][2]
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    path.unlink()
    assert not new.is_in_place()


def test_data_that_changed_after_the_scan_is_not_given_out(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, SMALL)
    file = SectionFile.open(path)
    picture = next(section for section in file.scan() if isinstance(section, Section) and section.n_bytes)
    with path.open("r+b") as other:
        other.seek(picture.data_at)
        other.write(b"\x55")
    with pytest.raises(BundleError, match="was changed or damaged after it was opened"):
        file.data(picture)
    os.truncate(path, 20)
    with pytest.raises(BundleError, match="was changed or damaged after it was opened"):
        file.data(picture)


def test_a_hostile_map_takes_bounded_memory(tmp_path: Path) -> None:
    """The worst that the bound lets through: 4 MB of empty maps, of 64 bytes each."""
    packed = msgpack.packb({"a": [[{}] * 8000] * 500})
    assert 0.9 * sections.MAX_MAP_BYTES < len(packed) < sections.MAX_MAP_BYTES
    write(tmp_path / "file", [])
    with (tmp_path / "file").open("ab") as file:
        file.write(raw(b"EVIL", packed) * 3)
    code = (
        "import resource, sys; from pathlib import Path; from mmchat.sections import SectionFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(section.kind == 'EVIL' for section in SectionFile.open(Path(sys.argv[1])).scan()) == 3\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, check=True)
    assert int(done.stdout) < 700, "megabytes"
