"""profile.json: what it is keyed by, where it is, and that nothing about it can fail a chat."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest

from mmchat import worker
from mmchat.errors import EngineBusy, ModelDirError
from mmchat.model_dir import ModelSpec, open_model
from mmchat.profile import Profile, _temporary_state, state_folder
from mmchat.rkllm_embed import Findings
from mmchat.worker import Exclusive, Worker
from tests.fakes import eventually
from tests.rkllm_standin.__main__ import LIBRARY, LLM, write_board_folder
from tests.rkllm_standin.build import library


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    library("1.3.0")
    return open_model(write_board_folder(tmp_path / "board", "1.3.0"))


def test_findings_last_and_belong_to_one_library_and_model(spec: ModelSpec, tmp_path: Path) -> None:
    own, other = spec.folder / LIBRARY, tmp_path / "other.so"
    other.write_bytes(own.read_bytes() + b"\0")
    Profile.open(spec, own).update(strategy="append", safe_rows=512, crashed_rows=[513])
    Profile.open(spec, other).update(strategy="prefix", rewinds=True)
    again = Profile.open(spec, own)
    assert (again.strategy, again.rewinds, again.safe_rows, again.crashed_rows) == ("append", False, 512, [513])
    assert Findings(**Profile.open(spec, other).findings()) == Findings("prefix", rewinds=True)
    model = spec.folder / LLM
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert Profile.open(spec, own).strategy == "resend"
    shutil.copystat(own, model)  # its time alone says nothing
    model.write_bytes(data)
    assert Profile.open(spec, own).strategy == "append"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 9}',
        '{"format": 1, "profiles": {"a": 3}}',
        '{"format": 1, "profiles": []}',
        "[" * 9999,
    ],
)
def test_a_damaged_file_is_no_profile_and_is_replaced(spec: ModelSpec, text: str) -> None:
    path = spec.folder / "profile.json"
    path.write_text(text)
    profile = Profile.open(spec, spec.folder / LIBRARY)
    assert Findings(**profile.findings()) == Findings()
    profile.update(safe_rows=7)
    assert json.loads(path.read_text())["profiles"][profile.key]["safe_rows"] == 7


def test_a_folder_that_cannot_be_written(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    state = Path(os.environ["XDG_STATE_HOME"])
    Profile.open(spec, spec.folder / LIBRARY).update(safe_rows=9)
    assert not (spec.folder / "profile.json").exists()
    profile = Profile.open(spec, spec.folder / LIBRARY)
    assert (profile.safe_rows, profile.path.parent) == (9, state / "mmchat" / "profiles")
    shutil.rmtree(state / "mmchat")
    (state / "mmchat").write_text("in the way")
    profile.update(safe_rows=10)  # told in the log, and kept while it lasts
    assert profile.safe_rows == 10


def test_what_whoever_owns_the_folder_found_is_read(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    Profile.open(spec, spec.folder / LIBRARY).update(strategy="append", safe_rows=9)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    profile = Profile.open(spec, spec.folder / LIBRARY)
    assert (profile.strategy, profile.safe_rows) == ("append", 9)
    profile.update(worked_rows=5)
    again = Profile.open(spec, spec.folder / LIBRARY)
    assert (again.path, again.worked_rows, again.safe_rows) == (profile.path, 5, 9)


def test_an_open_chat_does_not_undo_what_calibration_finds_meanwhile(spec: ModelSpec) -> None:
    chat = Profile.open(spec, spec.folder / LIBRARY)
    Profile.open(spec, spec.folder / LIBRARY).update(strategy="append", safe_rows=700, chunks=True)
    chat.update(worked_rows=60)
    found = Profile.open(spec, spec.folder / LIBRARY)
    assert (found.strategy, found.safe_rows, found.chunks, found.worked_rows) == ("append", 700, True, 60)


def test_a_library_that_is_gone_is_named(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match=r"none\.so: cannot be read"):
        Profile.open(spec, tmp_path / "none.so")


def test_one_thread_is_told_and_another_waits() -> None:
    lock, order = Exclusive("busy with this"), list[str]()

    def wait() -> None:
        with lock.held():
            order.append("other")

    with lock.held():
        with pytest.raises(EngineBusy, match="busy with this: finish"), lock.held():
            pass
        thread = threading.Thread(target=wait)
        thread.start()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
    with lock.held():
        pass


def test_threads_get_their_turns_in_the_order_in_which_they_came() -> None:
    """Who asks again at once goes behind those who wait, and who has given up is not waited for."""
    lock, order, waiting = Exclusive("busy"), list[str](), list[str]()

    def take(name: str, is_patient: bool) -> None:
        def should_stop() -> bool:
            if name not in waiting:
                waiting.append(name)
            return not is_patient

        with lock.held(should_stop) as is_mine:
            order.append(name if is_mine else f"not {name}")

    threads = []
    with lock.held():
        for name, is_patient in (("a", True), ("b", False), ("c", True)):
            threads.append(threading.Thread(target=take, args=(name, is_patient)))
            threads[-1].start()
            eventually(partial(waiting.__contains__, name))
        threads[1].join(20)
    with lock.held():
        order.append("again")
    for thread in threads:
        thread.join(20)
    assert order == ["not b", "a", "c", "again"]


def test_the_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOG_FILE_BYTES", 1000)
    path = tmp_path / "state" / "rkllm.log"
    for i in range(200):
        worker._append(path, f"line {i} \ud800")
    assert "line 199" in path.read_text()
    assert path.stat().st_size < 1100
    assert path.with_name("rkllm.log.1").stat().st_size < 1100
    assert Worker("tests.children", {}, name="test", log_file=path)._log_file == path
    worker._append(tmp_path / "state" / "rkllm.log" / "impossible", "lost")


def test_a_user_without_a_home_has_a_temporary_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _temporary_state.cache_clear()
    assert state_folder() == tmp_path / f"mmchat-{os.getuid()}"
    assert state_folder().stat().st_mode & 0o777 == 0o700
    state_folder().rmdir()
    (tmp_path / f"mmchat-{os.getuid()}").symlink_to(tmp_path)  # somebody else's traps
    (tmp_path / f"mmchat-{os.getuid()}-1").symlink_to(tmp_path / "nothing")
    (tmp_path / f"mmchat-{os.getuid()}-2").write_text("")
    for _ in range(2):  # the same in every process
        _temporary_state.cache_clear()
        assert state_folder() == tmp_path / f"mmchat-{os.getuid()}-3"
    _temporary_state.cache_clear()
