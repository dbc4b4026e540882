"""Session bundles as files: round trips, every damage, hostile content.  Sessions in them: test_saving.py."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from numpy.typing import NDArray

from mmchat import bundle
from mmchat.bundle import LOST_TURN, Bundle, Journal, SavedImage, SavedModel, SavedRecord, SavedSettings, SavedTurn
from mmchat.errors import BundleError
from mmchat.sections import Section, SectionFile, pack
from tests.test_sections import HEAD_BYTES, raw

FILES = [b"first picture", b"\x00\xff second", b"", b"the fourth " * 20]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image(number: int, file: int | None = None, n_keys: int = 1) -> SavedImage:
    keys = tuple(digest(f"{number} {i}".encode()) for i in range(n_keys))
    picture = "" if file is None else digest(FILES[file])
    return SavedImage(f"img{number}", (40 + number, 30), f"{number}.png", 9, False, keys, picture)


def picture_of(name: str) -> bytes:
    return next(data for data in FILES if digest(data) == name)


def rows_of(key: str) -> NDArray[np.float32]:
    return np.random.default_rng(int(key[:8], 16)).standard_normal((2, 3)).astype(np.float32)


def no_rows(key: str) -> None:
    return None


def turn(*parts: str | SavedImage, text: str = "Red.", ids: tuple[int, ...] = (1, 2)) -> SavedTurn:
    return SavedTurn(parts, text, ids, "stop", {"n_prompt": 12, "total_s": 0.5})


def record(*turns: SavedTurn, **values: Any) -> SavedRecord:
    return SavedRecord(SavedSettings(**values), SavedModel("demo", digest(b"e"), digest(b"t"), 1), turns)


names = st.text(st.characters(categories=["L", "N", "P", "Zs"], exclude_characters="/\\"), max_size=20)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
digests = st.integers(0, 5).map(lambda n: digest(bytes([n])))
pictures = st.builds(
    SavedImage,
    st.integers(7, 999_999_999).map("img{}".format),
    st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    names,
    st.integers(1, 1000),
    st.booleans(),
    st.lists(digests, min_size=1, max_size=3).map(tuple),
    st.sampled_from([""] + [digest(data) for data in FILES]),
)
POOL = [image(1, 0), image(2, 0, 3), image(3, 1), image(4, 2, 2), image(5), image(6, 3)]
turns = st.builds(
    SavedTurn,
    st.lists(plain | st.sampled_from(POOL), max_size=4).map(tuple),
    plain,
    st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
    st.sampled_from(["stop", "length", "cancelled"]),
    st.dictionaries(plain, st.integers(0, 2**40) | st.floats(0, 1e9), max_size=3),
)
samplings = st.fixed_dictionaries(
    {},
    optional={"temperature": st.floats(0, 2), "seed": st.integers(0, 9), "stop": st.just(("\n",))},
)
records = st.builds(
    SavedRecord,
    st.builds(
        SavedSettings,
        st.none() | plain,
        st.none() | st.integers(1, 1000),
        st.none() | st.booleans(),
        st.booleans(),
        st.sampled_from([{}, {"steps": ("turns",), "keep": 0.5}]),
        samplings,
        st.sampled_from(["original", "reencoded", "jpeg", "none"]),
        st.booleans(),
    ),
    st.builds(SavedModel, names, st.just("") | digests, st.just("") | digests, st.integers(0, 9)),
    st.tuples(pictures.map(lambda picture: turn(picture, "and", picture)), turns, turns) | st.just(()),
    st.dictionaries(plain, st.integers() | plain | st.booleans(), max_size=3).filter(
        lambda state: all(not isinstance(v, int) or -(2**63) <= v < 2**64 for v in state.values())
    ),
)


@given(records, st.booleans())
def test_what_is_saved_is_read(tmp_path: Path, saved: SavedRecord, with_rows: bool) -> None:
    Journal.create(tmp_path / "file", saved, picture_of, rows_of if with_rows else no_rows)
    read = Bundle(tmp_path / "file")
    assert read.record == saved
    assert read.lost == ()
    assert not read.torn
    assert not read.damaged
    for saved_image in saved.images:
        if saved_image.picture:
            assert digest(read.picture(saved_image.picture)) == saved_image.picture
        for key in saved_image.keys:
            found = read.rows(key)
            assert (found is not None and (found == rows_of(key)).all()) if with_rows else found is None


class Journals(RuleBasedStateMachine):
    """A journal against the record that it was last given: at any moment, opened by anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "file"
        self.record = record()
        self.journal = Journal.create(self.path, self.record, picture_of, no_rows)
        self.asked_for: list[str] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    def picture(self, name: str) -> bytes:
        self.asked_for.append(name)
        return picture_of(name)

    def write(self, new: SavedRecord) -> int:
        """The bytes added."""
        before = self.path.stat().st_size if self.path.exists() else 0
        self.journal.write(new, self.picture, no_rows)
        self.record = new
        return self.path.stat().st_size - before

    @rule(turn=turns)
    def say(self, turn: SavedTurn) -> None:
        known = {image.picture for image in self.record.images}
        self.asked_for.clear()
        self.write(replace(self.record, turns=(*self.record.turns, turn)))
        assert not set(self.asked_for) & known
        assert len(self.asked_for) == len(set(self.asked_for))

    @precondition(lambda self: self.record.turns)
    @rule(data=st.data(), turn=st.none() | turns)
    def take_back(self, data: Any, turn: SavedTurn | None) -> None:
        n = data.draw(st.integers(0, len(self.record.turns) - 1))
        kept = (*self.record.turns[:n], *([turn] if turn else []))
        self.write(replace(self.record, turns=kept, state={"n": n}))

    @rule(state=st.dictionaries(plain, plain, max_size=2), settings=st.builds(SavedSettings, plain))
    def change(self, state: dict[str, str], settings: SavedSettings) -> None:
        self.write(replace(self.record, state=state, settings=settings))

    @rule()
    def write_again(self) -> None:
        assert self.write(self.record) == 0

    @rule()
    def resume(self) -> None:
        self.journal.close()
        read = Bundle(self.path, write=True)
        self.journal = Journal.resume(read)
        assert self.write(self.record) == 0

    @rule(n=st.integers(1, 40))
    def be_killed(self, n: int) -> None:
        """While the last bytes of a further turn were written."""
        self.journal.close()
        before = self.path.stat().st_size
        other = Bundle(self.path, write=True)
        Journal.resume(other).write(
            replace(self.record, turns=(*self.record.turns, turn("x", image(7, 3)))), picture_of, no_rows
        )
        del other
        os.truncate(self.path, max(before + 1, self.path.stat().st_size - n))
        read = Bundle(self.path, write=True)
        assert read.lost == ("what was being saved when the file was cut off",)
        self.journal = Journal.resume(read)
        self.write(self.record)

    @rule()
    def lose_the_file(self) -> None:
        self.path.unlink()
        self.write(self.record)

    @rule()
    def rewrite(self) -> None:
        self.journal.rewrite(self.record, picture_of, no_rows)
        assert set(Bundle(self.path).pictures) == {image.picture for image in self.record.images} - {""}

    @invariant()
    def the_file_is_the_record(self) -> None:
        read = Bundle(self.path)
        note(f"{self.record}")
        assert read.record == self.record
        assert read.lost == ()
        assert all(read.has_picture(image) for image in self.record.images if image.picture)


def test_journals() -> None:
    examples = settings().max_examples // 2
    run_state_machine_as_test(Journals, settings=settings(max_examples=examples, stateful_step_count=15))


# Damage

SMALL = replace(
    record(
        turn(image(1, 0), "What?"), turn("And?"), turn(image(2, 1), image(1, 0), "Same?", text="No."), system="Brief."
    ),
    state={"pinned": ("img1",)},
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bundle") / "file"
    Journal.create(path, SMALL, picture_of, rows_of)
    return path.read_bytes()


def open_bytes(path: Path, data: bytes) -> Bundle | None:
    """None where it is refused as a whole."""
    path.write_bytes(data)
    try:
        return Bundle(path)
    except BundleError:
        return None


def is_told_or_right(read: Bundle) -> None:
    """A prefix of the turns; whatever is not as it was saved, is told."""
    n = len(read.record.turns)
    for number, found in enumerate(read.record.turns, 1):
        assert found == (LOST_TURN if number in read.gaps else SMALL.turns[number - 1])
    assert n not in read.gaps
    assert read.record.settings in (SMALL.settings, SavedSettings())
    if not read.lost:
        assert read.record == SMALL
        assert all(read.has_picture(image) for image in SMALL.images)
        assert set(read.keys) == {key for image in SMALL.images for key in image.keys}
    for image in read.record.images:
        assert not read.has_picture(image) or digest(read.picture(image.picture)) == image.picture
        for key in image.keys:
            rows = read.rows(key)
            assert rows is None or (rows == rows_of(key)).all()


def test_a_bundle_cut_at_any_length(tmp_path: Path, small: bytes) -> None:
    seen = set()
    for length in range(len(small)):
        read = open_bytes(tmp_path / "file", small[:length])
        assert (read is None) == (length < HEAD_BYTES)
        if read is not None:
            is_told_or_right(read)
            assert read.torn
            assert read.damaged == ("the settings: the model's own are used" in read.lost)
            assert "cut off" in read.lost[0]
            seen.add(len(read.record.turns))
    assert seen == {0, 1, 2}


def test_every_byte_flipped(tmp_path: Path, small: bytes) -> None:
    """One bit of each; tests/test_sections.py has all of them."""
    seen = set()
    for at in range(len(small)):
        data = bytearray(small)
        data[at] ^= 1 << at % 8
        read = open_bytes(tmp_path / "file", bytes(data))
        assert (read is None) == (at < HEAD_BYTES)
        if read is not None:
            is_told_or_right(read)
            assert read.damaged
            assert read.lost
            seen.add((len(read.record.turns), *read.gaps))
    assert seen == {(3,), (3, 1), (3, 2), (2,)}


def kept_journal(path: Path) -> tuple[SavedRecord, dict[tuple[int, int], int]]:
    """A conversation of six turns as it was saved turn by turn, and the bytes of each turn's section."""
    saved = record()
    journal = Journal.create(path, saved, picture_of, rows_of)
    said = (turn(image(1, 0), "What?"), turn("And?", text="No."), turn(image(2, 1), "This?"), turn("Yes?"),
            turn(image(3, 3), "Here?", text="There."), turn("So?", text="So."))  # fmt: skip
    for new in said:
        saved = replace(saved, turns=(*saved.turns, new), state={"dropped": b"", "n": len(saved.turns)})
        journal.write(saved, picture_of, rows_of)
    journal.close()
    spans = {
        (section.data_at + section.n_bytes - section.size, section.data_at + section.n_bytes): section.values["n"]
        for section in SectionFile.open(path).scan()
        if isinstance(section, Section) and section.kind == "TURN"
    }
    assert list(spans.values()) == list(range(6))
    return saved, spans


def shows_what_is_whole(path: Path, data: bytes, saved: SavedRecord, lost: dict[int, int]) -> None:
    """lost: places of the turns whose sections are not whole, and where these begin."""
    path.write_bytes(data)
    read = Bundle(path)
    n_left = max((n + 1 for n in range(len(saved.turns)) if n not in lost), default=0)
    expected = tuple(LOST_TURN if n in lost else told for n, told in enumerate(saved.turns[:n_left]))
    assert read.record.turns == expected
    assert read.gaps == tuple(n + 1 for n in sorted(lost) if n < n_left)
    assert read.damaged
    for n, at in lost.items():
        assert any(f"byte {at}" in what for what in read.lost)
        assert n >= n_left or any(what.startswith(f"turn {n + 1} (") for what in read.lost)
    for image in read.record.images:
        if not read.has_picture(image):
            assert f"the picture {image.id}" in read.lost


def test_a_flipped_bit_costs_the_section_it_is_in(tmp_path: Path) -> None:
    """In every section's header and in its inside: every turn whose own section is whole is shown, in its place."""
    path = tmp_path / "file"
    saved, spans = kept_journal(path)
    whole = path.read_bytes()
    for section in SectionFile.open(path).scan():
        assert isinstance(section, Section)
        start, end = section.data_at + section.n_bytes - section.size, section.data_at + section.n_bytes
        for at in {start, start + 9, start + 27, start + 28, end - 1}:
            data = bytearray(whole)
            data[at] ^= 1 << at % 8
            lost = {spans[start, end]: start} if (start, end) in spans else {}
            shows_what_is_whole(path, bytes(data), saved, lost)
            read = Bundle(path)
            pictures = [image for image in read.record.images if not read.has_picture(image)]
            assert len(pictures) == (section.kind == "PICT")
            assert (read.record.settings == saved.settings) or section.kind == "SETT"
            path.write_bytes(whole)


@given(st.data())
def test_any_bytes_flipped_cost_the_sections_they_are_in(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("flips") / "file"
    saved, spans = kept_journal(path)
    damaged = bytearray(path.read_bytes())
    hits = data.draw(st.sets(st.integers(HEAD_BYTES, len(damaged) - 1), min_size=1, max_size=4))
    for at in hits:
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    lost = {n: start for (start, end), n in spans.items() if any(start <= at < end for at in hits)}
    path.write_bytes(damaged)
    read = Bundle(path)
    for n, told in enumerate(saved.turns):
        if n not in lost:
            assert read.record.turns[n] == told
    assert read.gaps == tuple(n + 1 for n in sorted(lost) if n < len(read.record.turns))
    assert all(any(f"turn {number}" in what or "turns" in what for what in read.lost) for number in read.gaps)


def test_a_stretch_of_lost_bytes_is_one_gap(tmp_path: Path) -> None:
    path = tmp_path / "file"
    saved, spans = kept_journal(path)
    places = {n: span for span, n in spans.items()}
    data = bytearray(path.read_bytes())
    start = places[1][0]
    data[start : places[3][1] - 5] = bytes(places[3][1] - 5 - start)
    path.write_bytes(data)
    read = Bundle(path)
    assert read.gaps == (2, 3, 4)
    assert read.record.turns == (saved.turns[0], *[LOST_TURN] * 3, *saved.turns[4:])
    assert read.lost[0] == f"turns 2 to 4 (a section's header is damaged, byte {start}, and what follows)"


def test_a_lost_turn_that_replaced_another(tmp_path: Path) -> None:
    """What stood there before is shown as such; not where its picture's name has become another's."""
    path = tmp_path / "file"
    for old, is_kept in ((turn("b"), True), (turn(image(1, 0)), False)):
        path.unlink(missing_ok=True)
        journal = Journal.create(path, record(turn("a"), old), picture_of, no_rows)
        start = path.stat().st_size
        again = record(turn("a"), turn("again"))
        journal.write(again, picture_of, no_rows)
        other = replace(image(1, 0), size=(7, 7))
        journal.write(record(*again.turns, turn(other)), picture_of, no_rows)
        data = bytearray(path.read_bytes())
        data[start + 60] ^= 1
        path.write_bytes(data)
        read = Bundle(path)
        assert read.record.turns == (turn("a"), old if is_kept else LOST_TURN, turn(other))
        damage = f"(a section is damaged, byte {start})"
        kept = f"a turn {damage}; turn 2 may be what stood there before"
        assert read.lost == (kept if is_kept else f"turn 2 {damage}",)


def test_a_gap_is_no_larger_than_the_file(tmp_path: Path) -> None:
    """A small file of a hostile maker does not become many turns."""
    path = tmp_path / "file"
    SectionFile.create(path, pack("TURN", good_turn(n=200)))
    assert Bundle(path).gaps == tuple(range(1, 201))
    assert Bundle(path).lost[0].startswith("turns 1 to 200 (not in the file before byte ")
    SectionFile.create(path, pack("TURN", good_turn(n=90_000)))
    assert Bundle(path).record.turns == ()
    assert "a turn (its n is 90000, after 0 turns, byte 16)" in Bundle(path).lost


@given(st.data())
def test_bundles_with_holes_and_patches(tmp_path: Path, small: bytes, data: Any) -> None:
    """Several bytes overwritten, taken out or put in."""
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(st.integers(0, len(damaged))), data.draw(st.integers(0, 40))
        damaged[start : start + length] = data.draw(st.binary(max_size=40))
    read = open_bytes(tmp_path / "file", bytes(damaged))
    if read is not None and bytes(damaged[:HEAD_BYTES]) == small[:HEAD_BYTES]:
        is_told_or_right(read)


def test_the_turns_after_a_damaged_one_are_not_put_in_its_place(tmp_path: Path) -> None:
    """They keep theirs after a gap; and those that replace it are put there, for they say where they belong."""
    path = tmp_path / "file"
    journal = Journal.create(path, record(turn("a")), picture_of, no_rows)
    start = path.stat().st_size
    both = record(turn("a"), turn("b"))
    journal.write(both, picture_of, no_rows)
    journal.write(record(*both.turns, turn("c")), picture_of, no_rows)
    with path.open("r+b") as file:
        file.seek(start + 60)
        file.write(b"\xff\xff")
    read = Bundle(path)
    assert read.record == record(turn("a"), LOST_TURN, turn("c"))
    assert read.gaps == (2,)
    assert read.lost == (f"turn 2 (a section is damaged, byte {start})",)
    journal.write(record(turn("a"), turn("d")), picture_of, no_rows)
    read = Bundle(path)
    assert read.record == record(turn("a"), turn("d"))
    assert read.lost == (f"a turn (a section is damaged, byte {start})",)


# Hostile content, with right checksums


def good_turn(**changes: Any) -> dict[str, Any]:
    values = {"n": 0, "more": 0, "text": "a", "ids": b"\1\0\0\0", "stop_reason": "stop", "usage": {}, "state": {}}
    return {**values, "parts": ["q"], **changes}


def good_image(**changes: Any) -> dict[str, Any]:
    values = {"id": "img1", "size": [4, 3], "name": "a", "max_slice_nums": 9, "reference": False, "picture": ""}
    return {**values, "keys": [digest(b"")], **changes}


BAD_IMAGES: dict[str, dict[str, Any]] = {
    "id": {"id": "../../etc/passwd"},
    "id of another script": {"id": "img١"},
    "id 0": {"id": "img0"},
    "id with a line": {"id": "img1\n"},
    "size": {"size": [0, 3]},
    "absurd size": {"size": [2**62, 2**62]},
    "size as float": {"size": [4.0, 3.0]},
    "sides": {"size": [4, 3, 2]},
    "name": {"name": None},
    "cut": {"max_slice_nums": 100_000},
    "reading": {"reference": 1},
    "keys": {"keys": []},
    "key": {"keys": ["../" + "a" * 61]},
    "many keys": {"keys": [digest(b"")] * 1002},
    "file": {"picture": "/etc/passwd"},
}
BAD_TURNS: dict[str, dict[str, Any]] = {
    "place": good_turn(n=-1),
    "place as text": good_turn(n="0"),
    "place as flag": good_turn(n=False),
    "huge place": good_turn(n=2**60),
    "parts": good_turn(parts="q"),
    "part": good_turn(parts=[7]),
    "part as list": good_turn(parts=[["a"]]),
    "many parts": good_turn(parts=[""] * 5000),
    "text": good_turn(text=b"a"),
    "no text": {key: value for key, value in good_turn().items() if key != "text"},
    "ids": good_turn(ids=[1]),
    "ids cut": good_turn(ids=b"\1\0\0"),
    "reason": good_turn(stop_reason="because"),
    "reason as list": good_turn(stop_reason=["stop"]),
    "usage": good_turn(usage=[]),
    "negative usage": good_turn(usage={"n_new": -1}),
    "usage as text": good_turn(usage={"n_new": "1"}),
    "no number": good_turn(usage={"total_s": float("nan")}),
    "infinite": good_turn(usage={"total_s": float("inf")}),
    "state": good_turn(state=1),
    **{f"picture: {name}": good_turn(parts=[good_image(**change)]) for name, change in BAD_IMAGES.items()},
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_a_turn_that_is_none_is_left_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    Journal.create(path, record(), picture_of, no_rows)
    with path.open("ab") as file:
        file.write(b"".join(pack("TURN", BAD_TURNS[name]) + pack("TURN", good_turn(n=1)) + pack("TURN", good_turn())))
    read = Bundle(path)
    assert len(read.record.turns) == 1
    assert not read.gaps
    assert read.damaged
    assert read.lost[0].startswith("a turn (its " if "picture" not in name else "a turn (")
    assert len(read.lost[0]) < 120
    assert read.lost[0].isascii()


GOOD_SETTINGS = {
    "reference_pixels": False, "policy": {}, "sampling": {}, "pictures": "original", "embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": {}},
        {"model": []},
        *(
            {"settings": {**GOOD_SETTINGS, **change}}
            for change in (
                {"system": 1},
                {"max_slice_nums": 10**9},
                {"use_image_id": 3},
                {"policy": "../x"},
                {"policy": None},
                {"sampling": {"max_new_tokens": -1}},
                {"sampling": {"max_new_tokens": "many"}},
                {"sampling": {"colour": 1}},
                {"sampling": {"temperature": float("nan")}},
                {"sampling": {"stop": 3}},
                {"sampling": {"stop": ("",)}},
                {"sampling": [1]},
                {"pictures": "gif"},
                {"embeddings": None},
            )
        ),
        {"model": {"name": "a", "encoder": "zz", "tokenizer": "", "prompt": 1}},
        {"model": {"name": "a", "encoder": "", "tokenizer": "", "prompt": -1}},
    ],
)
def test_settings_that_are_none(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {
        "settings": GOOD_SETTINGS,
        "model": {"name": "a", "encoder": "", "tokenizer": "", "prompt": 1},
    }
    pieces = pack("SETT", {**good, **change}) + pack("TURN", good_turn())
    SectionFile.create(tmp_path / "file", pieces)
    read = Bundle(tmp_path / "file")
    assert read.record.settings == SavedSettings()
    assert len(read.record.turns) == 1
    assert read.lost[0].startswith("settings (")
    assert read.lost[1:] == ("the settings: the model's own are used",)


@pytest.mark.parametrize(
    ("kind", "values", "data"),
    [
        ("PICT", {"id": "../../x"}, b"a"),
        ("PICT", {"id": 3}, b"a"),
        ("PICT", {}, b"a"),
        ("ROWS", {"key": digest(b""), "rows": 2, "width": 3}, b"a"),
        ("ROWS", {"key": digest(b""), "rows": 2**31, "width": 2**31}, b"a"),
        ("ROWS", {"key": digest(b""), "rows": 0, "width": 3}, b""),
        ("ROWS", {"key": "k", "rows": 1, "width": 1}, b"abcd"),
        ("STAT", {"n": -1, "state": {}}, b""),
        ("STAT", {"n": 0}, b""),
        ("STAT", {"n": 0, "state": {"a": 1}, "more": []}, b""),
    ],
)
def test_other_sections_that_are_none(tmp_path: Path, kind: str, values: dict[str, Any], data: bytes) -> None:
    SectionFile.create(tmp_path / "file", _all(pack("TURN", good_turn()), pack(kind, values, data)))
    read = Bundle(tmp_path / "file")
    if "more" not in values:
        assert read.damaged
        assert len(read.record.turns) == 1
        assert not read.pictures
        assert not read.keys


def _all(*packed: list[bytes]) -> Iterator[bytes]:
    for pieces in packed:
        yield from pieces


def test_kinds_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    Journal.create(tmp_path / "file", SMALL, picture_of, rows_of)
    with (tmp_path / "file").open("ab") as file:
        file.write(raw(b"NEWS", b"\x81\xa1a\x01", b"data") + b"".join(pack("STAT", {"n": 3, "state": {"b": 1}})))
    read = Bundle(tmp_path / "file")
    assert read.record == replace(SMALL, state={"b": 1})
    assert read.lost == ("1 section(s) of kinds that this version does not know",)
    assert not read.damaged


def test_the_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is kept; what was replaced does not count."""
    Journal.create(tmp_path / "file", record(*[turn("x" * 1000)] * 20), picture_of, no_rows)
    monkeypatch.setattr(bundle, "MAX_RECORD_BYTES", 10_000)
    read = Bundle(tmp_path / "file")
    assert 5 < len(read.record.turns) < 10
    assert "the record is over the bound of 10,000 bytes" in read.lost[0]
    pieces = _all(*[pack("TURN", good_turn(text="x" * 1000))] * 50)
    SectionFile.create(tmp_path / "other", pieces)
    assert "bound" not in str(Bundle(tmp_path / "other").lost)


def test_an_id_is_one_picture(tmp_path: Path) -> None:
    other = replace(image(1, 0), size=(7, 7))
    saved = record(turn(image(1, 0)), turn(image(2, 1), image(1, 0)), turn(other), turn("x"))
    Journal.create(tmp_path / "file", saved, picture_of, no_rows)
    read = Bundle(tmp_path / "file")
    assert read.record.turns == saved.turns[:2]
    assert read.lost == ("turn 3 and what comes after it (img1 is two pictures)",)


@pytest.mark.parametrize(
    ("name", "plain_name"),
    [
        ("a.png", "a.png"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("a/b/", ""),
        ("\x1b[2Ja\nb\u202e", "?[2Ja?b?"),
        ("x" * 999, "x" * 255),
        ("Bild\u202f3 👨\u200d👩.png", "Bild\u202f3 👨\u200d👩.png"),
    ],
)
def test_names_are_names_only(tmp_path: Path, name: str, plain_name: str) -> None:
    SectionFile.create(tmp_path / "file", pack("TURN", good_turn(parts=[good_image(name=name)])))
    (found,) = Bundle(tmp_path / "file").record.images
    assert found.name == plain_name


# Journals


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    big = b"p" * 100_000
    FILES.append(big)
    saved = record(turn(image(1, len(FILES) - 1)))
    journal = Journal.create(tmp_path / "file", saved, picture_of, rows_of)
    before = (tmp_path / "file").stat().st_size
    journal.write(saved, picture_of, rows_of)
    assert (tmp_path / "file").stat().st_size == before
    for n in range(5):
        saved = replace(saved, turns=(*saved.turns, turn(image(1, len(FILES) - 1), f"again {n}")))
        journal.write(saved, picture_of, rows_of)
    assert (tmp_path / "file").stat().st_size < before + 5 * 700
    FILES.pop()


def test_waste_is_written_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    FILES.append(b"p" * 600_000)
    keep, large = record(turn("a")), record(turn("a"), turn(image(1, len(FILES) - 1)))
    journal = Journal.create(path, large, picture_of, no_rows)
    assert not Bundle(path).is_mostly_waste
    journal.write(keep, picture_of, no_rows)
    assert Bundle(path).is_mostly_waste
    assert path.stat().st_size > 600_000
    journal.rewrite(keep, picture_of, no_rows)
    assert Bundle(path).record == keep
    assert path.stat().st_size < 2000
    journal.write(large, picture_of, no_rows)
    assert Bundle(path).record == large
    FILES.pop()


def test_who_may_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    journal = Journal.create(path, SMALL, picture_of, no_rows)
    calls: tuple[Callable[[], object], ...] = (
        lambda: Bundle(path, write=True),
        lambda: Journal.create(path, SMALL, picture_of, no_rows),
    )
    for again in calls:
        with pytest.raises(BundleError, match="another conversation is being saved there"):
            again()
    with pytest.raises(BundleError, match="is there already"):
        Journal.create(path, SMALL, picture_of, no_rows, overwrite=False)
    path.unlink()
    Journal.create(path, record(), picture_of, no_rows)
    with pytest.raises(BundleError, match="was replaced by another program"):
        journal.write(record(turn("x")), picture_of, no_rows)
    assert Bundle(path).record == record()


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    """A picture that is gone, a value that no file holds: the next write makes up for it."""
    path = tmp_path / "file"
    journal = Journal.create(path, record(turn("a")), picture_of, no_rows)
    before = path.read_bytes()
    more = record(turn("a"), turn(image(1, 0)))

    def gone(name: str) -> bytes:
        raise BundleError("img1 is gone")

    for wrong, picture, why in (
        (more, gone, "img1 is gone"),
        (record(turn("\ud800")), picture_of, "no file can hold"),
        (record(turn("x" * (5 << 20))), picture_of, "over the bound"),
    ):
        with pytest.raises(BundleError, match=why):
            journal.write(wrong, picture, no_rows)
        assert path.read_bytes() == before
    journal.write(more, picture_of, no_rows)
    assert Bundle(path).record == more
    with pytest.raises(BundleError, match="no file can hold"):
        journal.rewrite(record(turn("\ud800")), picture_of, no_rows)
    assert Bundle(path).record == more
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_picture_that_changed_on_disk_meanwhile(tmp_path: Path) -> None:
    Journal.create(tmp_path / "file", SMALL, picture_of, rows_of)
    read = Bundle(tmp_path / "file")
    os.truncate(tmp_path / "file", HEAD_BYTES)
    calls: tuple[Callable[[], object], ...] = (
        lambda: read.picture(digest(FILES[0])),
        lambda: read.rows(image(1).keys[0]),
    )
    for call in calls:
        with pytest.raises(BundleError, match="changed or damaged after it was opened"):
            call()
    with pytest.raises(BundleError, match="does not hold the picture"):
        read.picture(digest(b"none"))
