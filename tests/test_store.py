"""store: what was put comes back whole or not at all, whoever else uses, damages, fills or kills."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

import mmchat.store
from mmchat.errors import StoreError
from mmchat.store import (
    Store,
    StoreInfo,
    Verified,
    default_cap,
    default_folders,
    open_store,
    slice_key,
    spare_folder,
)
from tests.test_cli import run_here

HEADER_BYTES = 64


def key(n: int) -> str:
    return f"{n:064x}"


def rows(n_bytes: int = 1024, fill: float = 1.0) -> NDArray[np.float32]:
    """An embedding whose file has this many bytes."""
    return np.full(((n_bytes - HEADER_BYTES) // 4, 1), fill, np.float32)


def file_of(store: Store, name: str) -> Path:
    (path,) = store.root.glob(f"data/*/{name}")
    return path


def files(store: Store) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in store.root.glob("data/*/*")}


def in_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process with `store` opened on the folder that is its first argument."""
    code = (
        "import os, resource, sys\nimport numpy as np\nfrom mmchat.store import Store\n"
        "from mmchat.errors import StoreError\nstore = Store(sys.argv[1])\n" + code
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# --- cap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (None, 2 << 30),
        ("", 2 << 30),
        ("500M", 500 << 20),
        ("2g", 2 << 30),
        ("3GiB", 3 << 30),
        (" 70000 ", 70000),
        ("9kb", 9216),
    ],
)
def test_the_cap_may_be_named(given: str | None, size: int) -> None:
    assert default_cap({} if given is None else {"MMCHAT_STORE_CAP": given}) == size


@pytest.mark.parametrize("given", ["much", "0", "0G", "-5M", "2.5G", "5X", "1e9", "9" * 40])
def test_a_cap_that_is_none(given: str) -> None:
    with pytest.raises(StoreError, match="a size like 500M"):
        default_cap({"MMCHAT_STORE_CAP": given})


# --- keys -------------------------------------------------------------------------------------------------------

pictures = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3)))


@given(pictures, pictures, st.text(max_size=4), st.text(max_size=4))
def test_a_key_is_the_slices_content(first: Any, second: Any, one: str, other: str) -> None:
    """Same pixels, size and encoder, same key; anything else, another."""
    same = first.shape == second.shape and (first == second).all()
    assert (slice_key(first, one) == slice_key(second, one)) == same
    assert (slice_key(first, one) == slice_key(first, other)) == (one == other)
    assert slice_key(np.asfortranarray(first), one) == slice_key(first.copy(), one)


def test_a_key_depends_on_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """On each single pixel value, on the shape where the bytes are the same, on the preprocessing's version."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    keys = {slice_key(pixels, "e"), slice_key(pixels.reshape(3, 2, 3), "e"), slice_key(pixels.reshape(1, 6, 3), "e")}
    for at in np.ndindex(pixels.shape):
        changed = pixels.copy()
        changed[at] = 1
        keys.add(slice_key(changed, "e"))
    monkeypatch.setattr("mmchat.store.PREPROCESSING_VERSION", 2)
    keys.add(slice_key(pixels, "e"))
    assert len(keys) == 3 + pixels.size + 1
    assert all(len(k) == 64 and set(k) <= set("0123456789abcdef") for k in keys)


# --- one process ------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_what_was_put_comes_back(store: Store, values: NDArray[np.float32]) -> None:
    """Bit for bit, NaN included; read-only; and in a store opened later."""
    store.clear()
    assert not store.has(key(1))
    assert store.get(key(1)) is None
    store.put(key(1), values)
    for opened in (store, Store(store.root)):
        assert opened.has(key(1))
        read = opened.get(key(1))
        assert read is not None
        assert read.dtype == np.float32
        assert read.shape == values.shape
        assert not read.flags.writeable
        assert read.tobytes() == values.tobytes()
    size = HEADER_BYTES + values.nbytes
    assert store.info() == StoreInfo(1, size, store.cap_bytes)


def test_arrays_of_any_layout_are_kept(store: Store) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for n, array in enumerate((values.T, values[::-1, ::2], np.asfortranarray(values), np.zeros((0, 4), np.float32))):
        store.put(key(n), array)
        read = store.get(key(n))
        assert read is not None
        np.testing.assert_array_equal(read, array)


def test_a_key_that_is_there_is_left_as_it_is(store: Store) -> None:
    store.put(key(1), rows(fill=1))
    store.put(key(1), rows(fill=2))
    read = store.get(key(1))
    assert read is not None
    assert (read == 1).all()
    assert store.info().n_files == 1
    assert list(store.root.glob("tmp/*")) == []


def test_an_array_outlives_its_file(store: Store) -> None:
    """Removing a file under a reader is harmless."""
    store.put(key(1), rows(fill=3))
    read = store.get(key(1))
    store.clear()
    assert store.get(key(1)) is None
    assert read is not None
    assert (read == 3).all()


@pytest.mark.parametrize(
    "bad", ["", "x", "0" * 63, "0" * 65, "0" * 63 + "g", "A" * 64, "../" + "0" * 61, key(1) + "\n"]
)
def test_keys_that_are_none_are_refused(store: Store, bad: str) -> None:
    """They would be paths."""
    calls: list[Callable[[], object]] = [
        lambda: store.has(bad),
        lambda: store.get(bad),
        lambda: store.put(bad, rows()),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="not a key"):
            call()


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 20, 24, HEADER_BYTES, HEADER_BYTES + 500, -1])
def test_a_flipped_byte_is_noticed(store: Store, offset: int) -> None:
    """Anywhere that means something: the file is removed, the key is free again."""
    store.put(key(1), rows())
    path = file_of(store, key(1))
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
    assert store.get(key(1)) is None
    assert not path.exists()
    assert not store.has(key(1))
    store.put(key(1), rows(fill=5))
    read = store.get(key(1))
    assert read is not None
    assert (read == 5).all()


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 4, 1023, 1025, 5000])
def test_another_length_is_noticed(store: Store, size: int) -> None:
    """By has() too; what it removes is gone for get(), and the other way round."""
    for ask in (store.has, store.get):
        store.put(key(1), rows())
        path = file_of(store, key(1))
        os.truncate(path, size)
        assert not ask(key(1))
        assert not path.exists()


def test_has_does_not_read_what_get_does(store: Store) -> None:
    """A broken checksum is get's affair: has() says yes, get() removes, has() says no."""
    store.put(key(1), rows())
    path = file_of(store, key(1))
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    assert store.has(key(1))
    assert store.get(key(1)) is None
    assert not store.has(key(1))


@given(st.binary(max_size=200))
def test_a_file_of_any_content_is_noticed(store: Store, content: bytes) -> None:
    store.put(key(1), rows())
    file_of(store, key(1)).write_bytes(content)
    assert store.get(key(1)) is None
    assert store.info().n_files == 0


# --- the bound --------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    """Writing, has() and get() all count as use."""
    store = Store(tmp_path / "store", cap_bytes=4 * 1024)
    for n in range(4):
        store.put(key(n), rows())
        os.utime(file_of(store, key(n)), (n, n))
    store.has(key(0))
    store.get(key(1))
    store.put(key(9), rows())
    assert set(files(store)) == {key(0), key(1), key(9)}


def test_an_embedding_larger_than_the_store_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", cap_bytes=1024)
    store.put(key(1), rows(1024))
    with pytest.raises(StoreError, match="cap"):
        store.put(key(2), rows(1028))
    assert store.has(key(1))
    with pytest.raises(StoreError, match="cap is 0 bytes"):
        Store(tmp_path / "other", cap_bytes=0)


class StoreMachine(RuleBasedStateMachine):
    """A small store against a plain dict with times of use; times are set, never waited for."""

    CAP = 8 * 1024

    @initialize()
    def open(self) -> None:
        import tempfile

        self.root = Path(tempfile.mkdtemp())
        self.store = Store(self.root, self.CAP)
        self.clock = 0
        self.kept: dict[str, int] = {}  # bytes
        self.used: dict[str, int] = {}
        self.leases: list[tuple[Any, set[str]]] = []

    def teardown(self) -> None:
        if hasattr(self, "root"):
            while self.leases:
                self.end_lease()
            shutil.rmtree(self.root)

    def use(self, name: str) -> None:
        self.clock += 1
        self.used[name] = self.clock
        os.utime(file_of(self.store, name), (self.clock, self.clock))

    def leased(self) -> set[str]:
        return {name for _, names in self.leases for name in names}

    @rule(n=st.integers(0, 9), size=st.integers(16, 1600).map(lambda n: 4 * n))
    def put(self, n: int, size: int) -> None:
        name = key(n)
        self.store.put(name, rows(size, n))
        if name in self.kept:
            return
        if sum(self.kept.values()) + size > self.CAP:  # down to 0.9 of the cap, this one included
            for old in sorted(self.kept, key=self.used.__getitem__):
                if sum(self.kept.values()) <= int(self.CAP * 0.9) - size:
                    break
                if old not in self.leased():
                    del self.kept[old]
        self.kept[name] = size
        self.use(name)
        assert self.store.info().n_bytes <= self.CAP or set(self.kept) - {name} <= self.leased()

    @rule(n=st.integers(0, 9))
    def has(self, n: int) -> None:
        assert self.store.has(key(n)) == (key(n) in self.kept)
        if key(n) in self.kept:
            self.use(key(n))

    @rule(n=st.integers(0, 9))
    def get(self, n: int) -> None:
        read = self.store.get(key(n))
        assert (read is not None) == (key(n) in self.kept)
        if read is not None:
            assert (read == n).all()
            self.use(key(n))

    @rule(n=st.integers(0, 9))
    def damage(self, n: int) -> None:
        if key(n) in self.kept:
            os.truncate(file_of(self.store, key(n)), self.kept.pop(key(n)) - 1)
            assert self.store.get(key(n)) is None

    @rule(names=st.sets(st.integers(0, 9).map(key), max_size=3))
    def begin_lease(self, names: set[str]) -> None:
        lease = self.store.lease(names)
        lease.__enter__()
        self.leases.append((lease, names))

    @rule()
    def end_lease(self) -> None:
        if self.leases:
            self.leases.pop(0)[0].__exit__(None, None, None)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.kept = {name: size for name, size in self.kept.items() if name in self.leased()}

    @rule(garbage=st.sampled_from([None, b"", b"many", b"\xff", b"1e3"]))
    def lose_the_total(self, garbage: bytes | None) -> None:
        """The side file is a shortcut: without it the files are counted."""
        (self.root / "total").unlink(missing_ok=True)
        if garbage is not None:
            (self.root / "total").write_bytes(garbage)

    @rule()
    def reopen(self) -> None:
        self.store = Store(self.root, self.CAP)

    @invariant()
    def same_files(self) -> None:
        if hasattr(self, "kept"):
            assert files(self.store) == self.kept
            info = self.store.info()
            assert (info.n_files, info.n_bytes) == (len(self.kept), sum(self.kept.values()))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=max(25, settings().max_examples // 2), stateful_step_count=30)


def test_a_lost_total_is_counted_again(tmp_path: Path) -> None:
    """Also where the next thing that happens is the removal of a damaged file."""
    store = Store(tmp_path / "store", cap_bytes=3 * 1024)
    store.put(key(1), rows())
    store.put(key(2), rows())
    (store.root / "total").unlink()
    os.truncate(file_of(store, key(1)), 100)
    assert store.get(key(1)) is None
    assert store._total() == store.info().n_bytes == 1024


def test_a_total_that_is_too_small_does_not_break_the_bound_for_good(tmp_path: Path) -> None:
    """As after a process was killed between keeping a file and counting it."""
    store = Store(tmp_path / "store", cap_bytes=4 * 1024)
    for n in range(4):
        store.put(key(n), rows())
    (store.root / "total").write_text("0")
    for n in range(4, 12):
        store.put(key(n), rows())
    assert store.info().n_bytes <= 4 * 1024 + 4 * 1024
    store.clear()
    assert store.info().n_bytes == 0


# --- leases -----------------------------------------------------------------------------------------------------


def test_a_lease_protects_while_it_is_held(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", cap_bytes=4 * 1024)
    for n in range(3):
        store.put(key(n), rows())
    with store.lease([key(0), key(1)]), Store(store.root).lease([key(0), key(77)]):
        store.clear()
        assert set(files(store)) == {key(0), key(1)}
        for n in range(3, 9):
            store.put(key(n), rows())
        assert {key(0), key(1)} <= set(files(store))
        assert store.info().n_bytes <= 4 * 1024
    store.clear()
    assert files(store) == {}
    assert list(store.root.glob("leases/*")) == []


def test_a_lease_ends_with_an_error_in_it(store: Store) -> None:
    store.put(key(1), rows())
    with pytest.raises(RuntimeError, match="mine"), store.lease([key(1)]):
        raise RuntimeError("mine")
    store.clear()
    assert files(store) == {}


def test_a_lease_of_another_process_counts_until_it_is_killed(store: Store) -> None:
    """kill -9 leaves the lease's file behind, and nobody heeds it."""
    store.put(key(1), rows())
    code = f"with store.lease(['{key(1)}']):\n    print('held', flush=True)\n    sys.stdin.read()"
    with in_python(code, store.root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        store.clear()
        assert store.has(key(1))
        process.kill()
        process.wait()
        assert list(store.root.glob("leases/*")) != []
        store.clear()
        assert not store.has(key(1))
        assert list(store.root.glob("leases/*")) == []


# --- several processes ------------------------------------------------------------------------------------------


WORK = """
store.cap_bytes = int(sys.argv[2])
random = np.random.default_rng(int(sys.argv[3]))
for _ in range(80):
    n = int(random.integers(0, 30))
    key = f"{n:064x}"
    with store.lease([key]):
        if not store.has(key):
            store.put(key, np.full((240 + n, 1), n, np.float32))
        read = store.get(key)
        assert read is not None, "a leased file vanished"
        assert (read == n).all(), "a torn file"
"""


def test_processes_share_a_store(tmp_path: Path) -> None:
    """Four at once, with room for a third of what they keep: never a torn file, never above the cap at the end."""
    cap = 10 * 1024
    processes = [in_python(WORK, tmp_path / "store", cap, seed) for seed in range(4)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 4
    store = Store(tmp_path / "store", cap)
    assert 0 < store.info().n_bytes <= cap
    assert int((store.root / "total").read_text()) == store.info().n_bytes
    assert list(store.root.glob("tmp/*")) == list(store.root.glob("leases/*")) == []


def test_processes_share_a_store_while_it_is_cleared_and_checked(tmp_path: Path) -> None:
    """Readers and writers under leases, beside processes that clear and verify all the time."""
    tidy = "for _ in range(60):\n    store.clear()\n    assert store.verify().n_left == 0\n    store.info()"
    workers = [in_python(WORK, tmp_path / "store", 10 * 1024, seed) for seed in range(2)]
    processes = [*workers, in_python(tidy, tmp_path / "store")]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 3
    found = Store(tmp_path / "store").verify()
    assert (found.n_removed, found.n_left) == (0, 0)


def test_a_damaged_file_that_another_process_has_replaced_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between noticing the damage and removing it, the file may have been made again."""
    store.put(key(1), rows())
    path = file_of(store, key(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    lock = store._lock

    def lock_late() -> Any:
        path.write_bytes(whole)
        return lock()

    monkeypatch.setattr(store, "_lock", lock_late)
    assert store.get(key(1)) is None
    monkeypatch.undo()
    assert store.get(key(1)) is not None


@pytest.mark.parametrize("at", ["os.replace", "mmchat.store._write_all", "Store._set_total", "Store._evict"])
def test_a_writer_killed_in_mid_put_leaves_a_usable_store(tmp_path: Path, at: str) -> None:
    """kill -9 at each step of put: the lock is free, what is there is whole, clear() empties it."""
    store = Store(tmp_path / "store", cap_bytes=5 * 1024)
    for n in range(4):
        store.put(key(n), rows(fill=n))
    code = f"""
import signal
import mmchat.store
store.cap_bytes = 5 * 1024
owner, _, attribute = {at!r}.rpartition(".")
def die(*arguments):
    if attribute == "_write_all":
        os.write(arguments[0], arguments[1][:100])
    os.kill(os.getpid(), signal.SIGKILL)
setattr({{"os": os, "mmchat.store": mmchat.store, "Store": Store}}[owner], attribute, die)
store.put("{key(50)}", np.ones((500, 1), np.float32))
"""
    with in_python(code, store.root) as process:
        assert process.wait() == -signal.SIGKILL
    for n in [50, *range(4)]:
        read = store.get(key(n))
        assert read is None or (read == (1 if n == 50 else n)).all()
    for n in range(10, 20):
        store.put(key(n), rows(fill=n))
        assert store.has(key(n))
    assert store.info().n_bytes <= 2 * 5 * 1024
    store.clear()
    assert store.info() == StoreInfo(0, 0, 5 * 1024)


def test_leftovers_of_killed_writers_go_in_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", cap_bytes=2 * 1024)
    old, young = store.root / "tmp" / "1-1", store.root / "tmp" / "1-2"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (0, 0))
    store.clear()
    assert not old.exists()
    assert young.exists()


# --- disks and folders ------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_survived(store: Store) -> None:
    """The file size limit stands for a full disk: StoreError, nothing left behind, what was there still there."""
    store.put(key(1), rows())
    code = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    store.put("{key(2)}", np.ones((100_000, 1), np.float32))
except StoreError as error:
    print(error)
print(store.has("{key(1)}"), store.get("{key(2)}"), list((store.root / "tmp").iterdir()))
"""

    with in_python(code, store.root) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    assert f"{store.root}: embedding not kept (File too large)" in output
    assert output.endswith("True None []\n")
    store.put(key(2), rows())
    assert store.info().n_files == 2


@pytest.mark.parametrize("part", ["", "data", "tmp", "leases"])
def test_a_file_in_a_folders_place_is_named(tmp_path: Path, part: str) -> None:
    (tmp_path / "store").mkdir()
    path = tmp_path / "store" / part if part else tmp_path / "file"
    path.write_text("in the way")
    with pytest.raises(StoreError, match="no place for embeddings") as caught:
        Store(tmp_path / "store" if part else path)
    assert str(tmp_path) in str(caught.value)


def test_a_root_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="no place for embeddings"):
        Store(tmp_path / "file" / "store")


def test_a_folder_that_cannot_be_read_is_named(store: Store) -> None:
    """A folder in an embedding's place stands for a file that may not be read (root may read all)."""
    (store.root / "data" / key(1)[:2] / key(1)).mkdir(parents=True)
    for call in (store.has, store.get):
        with pytest.raises(StoreError, match="cannot be read"):
            call(key(1))


def test_a_store_deleted_meanwhile_begins_anew(store: Store) -> None:
    """A user cleans the cache under a running program."""
    store.put(key(1), rows())
    shutil.rmtree(store.root)
    assert not store.has(key(1))
    assert store.get(key(1)) is None
    with store.lease([key(1)]):
        store.put(key(2), rows())
    assert store.has(key(2))
    assert store.info().n_files == 1
    store.clear()
    assert store.info().n_files == 0


def test_only_the_owner_may_look(store: Store) -> None:
    """Embeddings tell what a user's pictures show."""
    store.put(key(1), rows())
    places = [store.root, store.root / "data", file_of(store, key(1)).parent, file_of(store, key(1))]
    assert [oct(place.stat().st_mode & 0o077) for place in places] == ["0o0"] * 4


# --- the spare folder -------------------------------------------------------------------------------------------


@pytest.fixture
def spared(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", spare=tmp_path / "spare")


def full(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """No byte can be written below these folders."""
    create = mmchat.store._create

    def create_half(path: str, data: bytes) -> None:
        if any(folder in Path(path).parents for folder in folders):
            create(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        create(path, data)

    monkeypatch.setattr("mmchat.store._create", create_half)


def test_a_spare_folder_is_made_when_it_is_needed(spared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spared.put(key(1), rows()) is None
    assert not spared.has(key(2))
    assert spared.spare is not None
    assert not spared.spare.root.exists()
    full(monkeypatch, spared.root)
    problem = spared.put(key(2), rows(fill=2))
    assert problem == f"{spared.root}: embedding not kept (No space left on device)"
    assert (spared.info().n_files, spared.spare.info().n_files) == (1, 1)
    assert [spared.peek(key(n)) for n in range(4)] == [False, True, True, False]
    assert list(spared.root.glob("tmp/*")) == []


def test_other_processes_find_what_is_in_the_spare_folder(spared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened as the workers open it; and the folder itself is used again once there is room."""
    with monkeypatch.context() as patch:
        full(patch, spared.root)
        spared.put(key(1), rows(fill=7))
    assert spared.put(key(2), rows(fill=8)) is None
    code = """
store = Store(**__import__("json").loads(sys.argv[2]))
print([store.has(f"{n:064x}") for n in range(3)], [float(store.get(f"{n:064x}")[0, 0]) for n in (1, 2)])
"""
    with in_python(code, spared.root, json.dumps(spared.to_dict())) as process:
        assert process.communicate()[0] == "[False, True, True] [7.0, 8.0]\n"


def test_what_is_leased_in_the_spare_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", 4 * 1024, spare=tmp_path / "spare")
    full(monkeypatch, store.root)
    store.put(key(1), rows())
    with store.lease([key(1)]):
        for n in range(2, 12):
            store.put(key(n), rows())
        assert store.has(key(1))
        assert store.spare is not None
        assert store.spare.info().n_bytes <= 4 * 1024
    for n in range(12, 22):
        store.put(key(n), rows())
    assert not store.has(key(1))


def test_both_folders_full_is_an_error_that_names_both(spared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spared.spare is not None
    full(monkeypatch, spared.root, spared.spare.root)
    with pytest.raises(StoreError, match="No space left") as caught:
        spared.put(key(1), rows())
    assert str(spared.root) in str(caught.value)
    assert str(spared.spare.root) in str(caught.value)


def test_that_the_cache_is_off_is_told_once(spared: Store, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        spared.tell(f"{spared.root}: disk full")
    Store(spared.root).tell("a store without a spare folder has errors instead")
    assert spared.spare is not None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"{spared.root}: disk full: the cache is off, image embeddings are in {spared.spare.root} meanwhile"
    )


def test_the_spare_folder_is_in_memory_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert spare_folder().parts[-2:] == (f"mmchat-{os.getuid()}", "spare")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    free = {"/dev/shm": 64 << 20, str(tmp_path): 512 << 20}
    monkeypatch.setattr("os.access", lambda place, mode: True)
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, free[str(place)]))
    assert spare_folder().parent.parent == tmp_path
    free["/dev/shm"] = 1 << 30
    assert spare_folder().parent.parent == Path("/dev/shm")


def test_a_folder_that_somebody_else_made_in_a_public_one_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns it could read the embeddings, or put others in their place."""
    public = tmp_path / "tmp"
    public.mkdir()
    public.chmod(0o1777)
    Store(public / "mmchat-1" / "embeddings")
    monkeypatch.setattr("os.getuid", lambda: 4242)
    for root in (public / "mmchat-1" / "embeddings", public / "mmchat-1"):
        with pytest.raises(StoreError, match="belongs to another user"):
            Store(root)


# --- which folder -----------------------------------------------------------------------------------------------


def test_a_default_folder_that_cannot_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("x")
    store = open_store(None, 1 << 20, {"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert store.root == tmp_path / "tmp" / f"mmchat-{os.getuid()}" / "embeddings"
    assert f"{store.root} is used" in caplog.text
    with pytest.raises(StoreError, match="no place for embeddings"):
        open_store(tmp_path / "file", 1 << 20, {})
    with pytest.raises(StoreError, match="no place for embeddings"):
        open_store(None, 1 << 20, {"MMCHAT_STORE": str(tmp_path / "file" / "store")})


# --- verify, and the commands -----------------------------------------------------------------------------------


def damaged(store: Store, n: int) -> None:
    store.put(key(n), rows())
    path = file_of(store, key(n))
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")


def test_verify_removes_what_is_damaged(store: Store) -> None:
    for n in range(3):
        store.put(key(n), rows())
    damaged(store, 3)
    damaged(store, 4)
    assert store.verify() == Verified(3, 2, 0)
    assert store.verify() == Verified(3, 0, 0)
    assert [store.has(key(n)) for n in range(5)] == [True, True, True, False, False]
    assert store._total() == store.info().n_bytes


def test_the_store_commands(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmchat.store.spare_folder", lambda: tmp_path / "spare")  # not the one that this user has
    store.put(key(0), rows())
    damaged(store, 1)
    told = json.loads(run_here("store", "info", "--store", store.root, "--json")[1])
    assert (told["folder"], told["n_files"], told["n_bytes"], told["problem"]) == (str(store.root), 2, 2048, "")
    assert told["spare"] is None
    assert str(store.root) in run_here("store", "info", "--store", store.root)[1]
    told = json.loads(run_here("store", "verify", "--store", store.root, "--json")[1])
    assert (told["n_removed"], told["n_left"]) == (1, 0)
    with store.lease([key(0)]):
        told = json.loads(run_here("store", "clear", "--store", store.root, "--json")[1])
        assert told["n_removed"] == 0
        assert store.has(key(0))
    code, out, _ = run_here("store", "clear", "--store", store.root)
    assert (code, out[:20]) == (0, "removed 1 embeddings")
    assert store.info().n_files == 0


def test_a_look_at_what_is_no_store_makes_none(tmp_path: Path) -> None:
    for name in ("info", "verify", "clear"):
        code, out, err = run_here("store", name, "--store", tmp_path / "typo")
        assert (code, out) == (1, "")
        assert "typo: holds no embeddings" in err
        assert run_here("store", name, "--store", tmp_path)[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_verify_fails_where_a_damaged_file_cannot_be_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(store, 1)
    monkeypatch.setattr(Store, "_discard", lambda self, path: None)
    assert store.verify() == Verified(0, 0, 1)
    assert run_here("store", "verify", "--store", store.root)[0] == 1


def test_a_system_without_a_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, or read-only: Python finds out by writing a file."""

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    store = open_store(tmp_path / "store", 1 << 20, {})
    assert store.problem == ""
    assert default_folders({"HOME": str(tmp_path)})[-1] == Path(f"/tmp/mmchat-{os.getuid()}/embeddings")


def test_a_user_without_a_home_has_a_temporary_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither $HOME nor the system says
    assert [folder.is_absolute() for folder in default_folders({})] == [True]
    assert default_folders({"XDG_CACHE_HOME": "/cache"})[0] == Path("/cache/mmchat/embeddings")
