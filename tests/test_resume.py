"""Saved conversations on the demo model: another process, another engine, the command line."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mmchat
from mmchat.bundle import Bundle
from tests.conversation import GREEDY, TURNS
from tests.conversation import picture as numbered
from tests.rkllm_standin.__main__ import write_board_folder
from tests.rkllm_standin.build import library
from tests.test_cli import mmchat_command, refused, run_here
from tests.test_demo import BACKGROUND, CIRCLE


def talk(session: mmchat.Session, n_first: int, n_turns: int) -> list[tuple[int, ...]]:
    """Turns n_first up to n_turns of the conversation that all engines have; tokens of the answers."""
    n_pictures = sum(n for _, n in TURNS[:n_first])
    for question, n_images in TURNS[n_first:n_turns]:
        images = [numbered(n_pictures + i) for i in range(n_images)]
        n_pictures += n_images
        assert session.ask(question, images, **GREEDY).text
    return [turn.ids for turn in session.turns]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, ...]]]:
    """A bundle of the first three turns with embeddings, and all answers of the same conversation in one go."""
    root = tmp_path_factory.mktemp("half")
    with mmchat.open("demo", store=root / "store", n_threads=1) as runtime:
        session = runtime.session(system="Be brief.", autosave=None)
        talk(session, 0, 3)
        session.save(root / "half.mmchat", embeddings=True)
        return root / "half.mmchat", talk(session, 3, len(TURNS))


def test_another_machine(half: Any, tmp_path: Path) -> None:
    """A store of its own, a process of its own: the same answers, and no slice encoded that came with the file."""
    path, wanted = half
    with mmchat.open("demo", store=tmp_path / "store", n_threads=1) as runtime:
        session = runtime.load(path)
        assert session.notes == ()
        assert session.system == "Be brief."
        assert talk(session, 3, len(TURNS)) == wanted
        assert [turn.usage.slices_encoded for turn in session.turns[3:]] == [0, session.images[-1].slices, 0]


@pytest.mark.parametrize(("family", "strategy"), [("1.1", "resend"), ("1.3.0", "resend")])
def test_another_engine(half: Any, tmp_path: Path, family: str, strategy: str) -> None:
    """What OpenVINO began goes on with RKLLM (the stand-in: no board was at hand), and back."""
    library(family)  # skips where there is no compiler
    path, wanted = half
    board = write_board_folder(tmp_path, family)
    with mmchat.open(board, store=tmp_path / "store", n_threads=1) as runtime:
        session = runtime.load(path)
        assert session.notes == ()
        assert talk(session, 3, 5) == wanted[:5]
        session.save(tmp_path / "back.mmchat", embeddings=True)
    with mmchat.open("demo", store=tmp_path / "store 2", n_threads=1) as runtime:
        assert talk(runtime.load(tmp_path / "back.mmchat"), 5, 6) == wanted


# The command line


def test_chat_saves_and_resumes(red: Path, green: Path, tmp_path: Path) -> None:
    """The picture is gone by then, and so is the store."""
    file = tmp_path / "talk.mmchat"
    out, err = mmchat_command("chat", red, "--save", file, "--system", "Be brief.", "--seed", "3", stdin=CIRCLE)
    assert "red" in out
    assert err == ""
    red.unlink()
    out, err = mmchat_command(
        "chat",
        "--resume",
        file,
        "--store",
        tmp_path / "other",
        stdin=f"/images\n{BACKGROUND}\n/image {green}\n{CIRCLE}\n",
    )
    assert "red circle.png" in out.splitlines()[0]
    assert "blue" in out.splitlines()[1]
    assert "green" in out.splitlines()[2]
    assert "mmchat: going on after 1 turn(s) and 1 picture(s)\n" in err
    record = Bundle(file).record
    assert [turn.text for turn in record.turns][1:] == out.splitlines()[1:3]
    assert record.settings.system == "Be brief."
    assert record.settings.sampling == {"seed": 3}
    assert [image.id for image in record.images] == ["img1", "img2"]


def test_a_copy_goes_on_elsewhere(red: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    mmchat_command("chat", red, "--save", first, stdin=f"{CIRCLE}\n/save {tmp_path / 'copy'}\n")
    before = first.read_bytes()
    mmchat_command("chat", "--resume", first, "--save", second, "--save-pictures", "jpeg", stdin=BACKGROUND)
    assert first.read_bytes() == before
    assert Bundle(tmp_path / "copy").record == Bundle(first).record
    without, copy = tmp_path / "without", tmp_path / "copy of it"
    options = ("--save", without, "--save-pictures", "none", "--save-embeddings")
    mmchat_command("chat", red, *options, stdin=f"{CIRCLE}\n/save {copy}\n")
    again, branch = tmp_path / "again", tmp_path / "without-2"
    mmchat_command("chat", "--resume", without, stdin=f"/save {again}\n/branch 1\n")
    for file in (without, copy, again, branch):
        assert (Bundle(file).pictures, len(Bundle(file).keys) > 0) == ({}, True)
    assert len(Bundle(second).record.turns) == 2
    (name,) = Bundle(second).pictures
    assert Bundle(second).picture(name).startswith(b"\xff\xd8")


def test_chat_says_what_is_wrong_with_its_files(red: Path, tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("Dear")
    assert "no such file" in refused("chat", "--resume", tmp_path / "none")
    assert "not a saved session" in refused("chat", "--resume", letter)
    assert "is there already" in refused("chat", "--save", letter)
    assert "cannot be written" in refused("chat", "--save", tmp_path / "none" / "talk")
    assert "known are original" in refused("chat", "--save", tmp_path / "x", "--save-pictures", "gif", code=2)
    for option in (["--system", "x"], ["--max-slices", "3"], ["--reference-pixels"]):
        assert "those of the conversation" in refused("chat", "--resume", letter, *option, code=2)
    assert letter.read_text() == "Dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter", "red circle.png"]


def test_what_could_not_be_saved_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the first turn on: the answers come all the same."""
    real, n_left = os.fsync, [2]  # of the new file, and of its folder

    def fsync(descriptor: int) -> None:
        n_left[0] -= 1
        if n_left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        code, out, _ = run_here("chat", "--save", tmp_path / "talk", stdin=f"{CIRCLE}\nThank you.")
    assert code == 1
    assert len(out.splitlines()) == 2
    assert Bundle(tmp_path / "talk").record.turns == ()
    gc.collect()
    saved = Bundle(tmp_path / "talk", write=True)
    code, out, err = run_here("chat", "--resume", tmp_path / "talk", stdin=CIRCLE)
    assert (code, out) == (1, "")
    assert "another conversation is being saved there" in err
    assert not saved.torn


@pytest.fixture
def saved(red: Path, green: Path, tmp_path: Path) -> Path:
    file = tmp_path / "talk.mmchat"
    with mmchat.open("demo", n_threads=1) as runtime:
        session = runtime.session("Be brief.", autosave=file)
        assert session.ask(CIRCLE, images=[red], max_new_tokens=8).text
        assert session.ask(["Is it\nlike", green, "\x1b[31m?"], max_new_tokens=1).text is not None
    return file


def test_session_show(saved: Path) -> None:
    out, err = mmchat_command("session", "show", saved)
    assert err == ""
    lines = out.splitlines()
    assert re.fullmatch(r"holds +2 turn\(s\), 2 picture\(s\) \([\d,]+ bytes\), 0 embedding\(s\)", lines[2])
    assert lines[1] == "system    Be brief."
    for text in ("[img1: red circle.png, 200x200, ", "[img2: green.png, 200x200, ", f"      {CIRCLE}", "\\x1b[31m?"):
        assert text in out
    assert "\x1b" not in out
    assert "   -> " in out
    shown = json.loads(mmchat_command("session", "show", saved, "--json")[0])
    assert [turn["stop_reason"] for turn in shown["turns"]][1] == "length"
    assert shown["settings"]["system"] == "Be brief."
    assert shown["model"]["name"] == "demo"
    assert [(image["id"], image["slices"]) for image in shown["images"]] == [("img1", 5), ("img2", 5)]
    assert (shown["lost"], shown["torn"]) == ([], False)


def test_session_show_tells_what_is_pinned_and_what_is_not_sent(red: Path, green: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    lines = [CIRCLE, f"/image {green}", CIRCLE, "/pin img2", "/pin 1", "/forget img1"]
    mmchat_command("chat", red, "--save", file, stdin="\n".join(lines))
    out, _ = mmchat_command("session", "show", file)
    assert {"sent      img1 as line", "pinned    img2, turn 1"} <= set(out.splitlines())
    marks = json.loads(mmchat_command("session", "show", file, "--json")[0])["marks"]
    assert marks == {"forms": {"img1": "line"}, "dropped": [], "pinned": ["img2"], "pinned_turns": [1]}


def test_session_show_of_a_damaged_one(saved: Path, tmp_path: Path) -> None:
    """What is whole is shown, what is lost is said, and the exit code tells."""
    data = saved.read_bytes()
    saved.write_bytes(data[:-10])
    code, out, err = run_here("session", "show", saved, "--json")
    assert code == 1
    assert len(json.loads(out)["turns"]) == 1
    assert err == f"mmchat: {saved}: lost: what was being saved when the file was cut off\n"
    code, out, err = run_here("session", "export", saved, "--to", tmp_path / "talk.html")
    assert code == 1
    assert (tmp_path / "talk.html").read_text().count("<section") == 1
    saved.write_bytes(data[:16] + b"\xff" + data[17:])
    code, out, err = run_here("session", "show", saved)
    assert code == 1
    assert "what is between byte 16 and byte " in err
    assert "\n2.    " in out
    saved.write_bytes(b"\xff" + data[1:])
    assert "not a saved session" in refused("session", "show", saved)


def test_session_export(saved: Path, red: Path, tmp_path: Path) -> None:
    for suffix in ("html", "md", "json"):
        out, err = mmchat_command("session", "export", saved, "--to", tmp_path / f"out.{suffix}")
        assert (out, err) == ("", "")
    assert (tmp_path / "out.html").read_text().count("data:image/png;base64,") == 2
    assert (tmp_path / "out.pictures" / "img1.png").read_bytes() == red.read_bytes()
    assert "must end in" in refused("session", "export", saved, "--to", tmp_path / "out.pdf", code=2)
    assert "no such file" in refused("session", "export", tmp_path / "none", "--to", tmp_path / "out.md")


def test_looking_needs_no_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMCHAT_STORE", "/proc/none")
    code, out, _ = run_here("session", "show", saved)
    assert code == 0
    assert "img1" in out


def test_save_in_the_chat(red: Path, tmp_path: Path) -> None:
    names = ("talk.mmchat", "talk.html", "talk.md", "talk.json")
    lines = [CIRCLE, *(f"/save {tmp_path / name}" for name in names)]
    _, err = mmchat_command("chat", red, stdin="\n".join(lines))
    assert err.count("saved 1 turn(s)") == 4
    assert len(Bundle(tmp_path / "talk.mmchat").record.turns) == 1
    assert "data:image/png" in (tmp_path / "talk.html").read_text()
    assert os.listdir(tmp_path / "talk.pictures") == ["img1.png"]


def test_branches_are_saved_beside(red: Path, tmp_path: Path) -> None:
    lines = [CIRCLE, "/branch", BACKGROUND, "/branch 1", "Say it again.", "/switch 1", "Thank you."]
    options = ("--save", tmp_path / "talk.mmchat", "--save-pictures", "none", "--max-new-tokens", "4")
    _, err = mmchat_command("chat", red, *options, stdin="\n".join(lines))
    assert f"it is saved to {tmp_path / 'talk-2.mmchat'}" in err
    files = [Bundle(tmp_path / f"talk{n}.mmchat") for n in ("", "-2", "-3")]
    asked = [[turn.parts[-1] for turn in file.record.turns] for file in files]
    assert asked == [[CIRCLE, "Thank you."], [CIRCLE, BACKGROUND], [CIRCLE, "Say it again."]]
    assert not any(file.pictures for file in files)


def test_a_conversation_is_not_overwritten_by_its_pages(red: Path, tmp_path: Path) -> None:
    assert "it must not end in .json" in refused("chat", "--save", tmp_path / "talk.json", code=2)
    file = tmp_path / "talk"
    page = tmp_path / "talk.html"
    mmchat_command("chat", red, "--save", file, stdin=CIRCLE)
    page.symlink_to(file)
    before = file.read_bytes()
    assert "is the conversation itself" in refused("session", "export", file, "--to", page, code=2)
    _, err = mmchat_command("chat", "--resume", file, stdin=f"/save {page}\n/pin 1234567890\n/save a\0b\n", code=1)
    assert err.endswith("b: no file can have that name\n")
    assert "the conversation is kept there already" in err
    assert "/pin takes the number of a turn, not '1234567890'" in err
    assert file.read_bytes()[: len(before)] == before


def test_pictures_may_be_left_out_of_a_copy(red: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "talk", tmp_path / "copy"
    mmchat_command("chat", red, "--save", file, stdin=CIRCLE)
    mmchat_command("chat", "--resume", file, "--save-pictures", "none", stdin=f"/save {copy}\n")
    assert (len(Bundle(file).pictures), len(Bundle(copy).pictures)) == (1, 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["session", "show", "FILE"]])
def test_where_stdout_is_full_that_is_told(saved: Path, words: list[str]) -> None:
    for unbuffered in ("", "1"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "mmchat", *(str(saved) if word == "FILE" else word for word in words)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )
        assert done.stderr == "mmchat: writing the result: No space left on device\n"
        assert done.returncode == 1


def test_who_does_not_read_on_is_told_nothing(saved: Path) -> None:
    show = subprocess.Popen(
        [sys.executable, "-m", "mmchat", "session", "show", saved], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert show.stdout is not None
    show.stdout.close()
    assert show.stderr is not None
    assert show.stderr.read() == b""
    assert show.wait(120) == 1
    show.stderr.close()
