"""outputs: room is looked at first, one writer per folder, what was killed leaves nothing and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmchat.errors import DiskFull, ModelDirError
from mmchat.outputs import Work, check_space, describe_bytes, free_bytes, only_writer, remove_temporary, remove_work


def test_room_is_looked_at_on_the_disk_of_a_folder_to_be(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(DiskFull, match=r"yet: 1000000\.05 GB are needed there, [0-9.]+ GB are free") as caught:
        check_space(tmp_path / "yet", 10**15)
    assert caught.value.free == pytest.approx(free_bytes(tmp_path), rel=0.5)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (2e6, "2.0 MB"), (16.2e9, "16.2 GB")]
)
def test_bytes_in_words(n: float, text: str) -> None:
    assert describe_bytes(n) == text


def test_one_writer_per_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    code = (
        "import sys; from pathlib import Path; from mmchat.outputs import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ModelDirError, match="another mmchat command is writing there"), only_writer(folder):
            pass
        other.kill()
        other.communicate()
    with only_writer(folder), pytest.raises(ModelDirError, match="another"), only_writer(folder):
        pass
    with only_writer(folder):
        pass


def test_a_file_is_no_folder_to_write_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelDirError, match="file: cannot be made"), only_writer(tmp_path / "file"):
        pass


def test_only_the_temporary_files_of_one_file_go(tmp_path: Path) -> None:
    for name in (".a.xyz.tmp", ".a.b.xyz.tmp", ".b.xyz.tmp", "a", "a.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_temporary(tmp_path / "a.b")
    remove_temporary(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.xyz.tmp", "a", "a.tmp"]


def test_work_goes_on_with_what_is_not_complete(tmp_path: Path) -> None:
    work = Work(tmp_path, {"from": ("a", 1)})
    work.prepare("one").write_bytes(b"1")
    assert not work.has("one")
    work.finish("one")
    work.prepare("two").write_bytes(b"22")  # killed before it was complete
    again = Work(tmp_path, {"from": ["a", 1]})
    assert (again.has("one"), again.has("two"), again.has("three")) == (True, False, False)
    (tmp_path / "one").write_bytes(b"longer")
    assert not again.has("one")


KILLED_REMOVING = """
import os, signal, sys
from pathlib import Path
from mmchat.outputs import remove_work

def hook(event, arguments, left=[int(sys.argv[2])]):
    if event in ("os.remove", "os.rmdir"):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
remove_work(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("n_removed", range(5))
def test_work_goes_on_in_a_folder_that_was_being_removed(tmp_path: Path, n_removed: int) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    work = Work(folder, {"from": 1})
    for name in ("one", "two", "three"):
        work.prepare(name).write_bytes(b"1")
        work.finish(name)
    process = subprocess.run([sys.executable, "-c", KILLED_REMOVING, str(folder), str(n_removed)])
    assert process.returncode == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 4 - n_removed
    again = Work(folder, {"from": 1})
    assert all(again.has(name) == (folder / name).exists() for name in ("one", "two", "three"))
    remove_work(folder)
    assert not folder.exists()


def test_another_source_begins_anew(tmp_path: Path) -> None:
    work = Work(tmp_path, {"from": 1})
    work.prepare("one").write_bytes(b"1")
    work.finish("one")
    assert not Work(tmp_path, {"from": 2}).has("one")
    assert not (tmp_path / "one").exists(), "it would be taken for the other source's"
    (tmp_path / ".mmchat-convert.json").write_text('{"source": {"from": 1}, "done": 5}')
    assert not Work(tmp_path, {"from": 1}).has("one")


@pytest.mark.parametrize("state", [None, "", "{"])
def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path, state: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    if state is not None:
        (tmp_path / ".mmchat-convert.json").write_text(state)
    with pytest.raises(ModelDirError, match=r"has files already \(model.safetensors\); give an empty folder"):
        Work(tmp_path, {})
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
