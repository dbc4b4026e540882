"""The command line as its users meet it: a process, its stdout, its stderr, its exit code."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import pytest
from PIL import Image

import mmchat
from mmchat.cli import main
from mmchat.cli.chatting import _Repl
from mmchat.cli.options import Keeping, Talk
from mmchat.model_dir import model_folder, open_model
from mmchat.prompt import ChatTokenizer
from tests.test_demo import BACKGROUND, CIRCLE, DESCRIBE, picture

MMCHAT = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from mmchat.cli import main; main()"]
# Of prompt_vectors.json; tests/test_prompt.py has them all.
REFERENCE_PROMPTS = ("text_cjk", "one_noid", "six_turns", "video_like_8")


def mmchat_command(
    *words: str | Path, stdin: str | bytes = b"", code: int = 0, env: dict[str, str] | None = None
) -> tuple[str, str]:
    """stdout and stderr."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = [*MMCHAT, *map(str, words)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=300, env={**os.environ, **(env or {})})
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, err
    assert "Traceback" not in err
    return out, err


def run_here(*words: str | Path, stdin: str | bytes = b"") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the same without a process of its own: there are many mistakes to make."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["mmchat", *map(str, words)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def refused(*words: str | Path, stdin: str | bytes = b"", code: int = 1) -> str:
    """The one line on stderr of a command that must fail, and print nothing else."""
    exit_code, out, err = run_here(*words, stdin=stdin)
    assert (exit_code, out) == (code, ""), err
    assert re.fullmatch(r"mmchat: [^\n]+\n", err), err
    return err


# ask


def test_ask(red: Path) -> None:
    out, err = mmchat_command("ask", red, CIRCLE)
    assert "red" in out
    assert out.endswith("\n")
    assert out.count("\n") == 1
    assert err == ""


def test_ask_json(red: Path, green: Path) -> None:
    out, err = mmchat_command("ask", red, green, "How many images are there?", "--json", "--max-new-tokens", "20")
    shown = json.loads(out)
    assert set(shown) == {"text", "stop_reason", "usage", "degraded", "unseen"}
    assert shown["degraded"] == []
    assert shown["text"]
    assert shown["stop_reason"] in ("stop", "length")
    usage = shown["usage"]
    assert usage["n_prompt"] == usage["n_reused"] + usage["n_prefilled"] > 0
    assert usage["slices_encoded"] == 10
    assert err == ""


def test_ask_stats(red: Path) -> None:
    out, err = mmchat_command("ask", red, CIRCLE, "--stats", "--max-new-tokens", "2")
    assert len(out.split()) <= 3
    for word in (
        "stage",
        "total ms",
        "tokens",
        "ms per token",
        "tokens per s",
        "encode",
        "prefill",
        "generate",
        "rows:",
    ):
        assert word in err
    assert "the answer was cut at 2 tokens" in err


def test_ask_about_a_picture_from_stdin(red: Path) -> None:
    out, _ = mmchat_command("ask", "-", CIRCLE, stdin=red.read_bytes())
    assert "red" in out


def test_ask_a_question_from_stdin(red: Path) -> None:
    out, _ = mmchat_command("ask", red, "-", stdin=CIRCLE + "\n")
    assert "red" in out


def test_ask_with_pictures_in_the_text(red: Path) -> None:
    placed, _ = mmchat_command("ask", f"{{{{{red}}}}} {CIRCLE}", "--json")
    before, _ = mmchat_command("ask", red, CIRCLE, "--json")
    assert "red" in json.loads(placed)["text"]
    assert json.loads(placed)["usage"]["n_prompt"] == json.loads(before)["usage"]["n_prompt"]


def test_ask_without_pictures() -> None:
    out, _ = mmchat_command("ask", "Hello!")
    assert out.strip()


def test_a_question_that_ends_like_a_file_name(red: Path) -> None:
    mmchat_command("ask", red, "Is this one called " + "very " * 80 + "red.png")


# What goes wrong


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size, whose pixels are missing."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))


@pytest.fixture
def bad_pictures(tmp_path: Path, red: Path) -> dict[str, Path]:
    contents = {
        "text.png": b"this is no picture\n",
        "truncated.png": red.read_bytes()[:200],
        "huge.png": png_header(50_000, 50_000),
        "empty.png": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {**{name: tmp_path / name for name in contents}, "missing.png": tmp_path / "missing.png", "folder": tmp_path}


@pytest.mark.parametrize("name", ["text.png", "truncated.png", "huge.png", "empty.png", "missing.png", "folder"])
def test_bad_pictures(bad_pictures: dict[str, Path], name: str) -> None:
    path = bad_pictures[name]
    commands: list[list[str | Path]] = [["ask", path, "What is this?"], ["slices", path], ["chat", path]]
    for words in commands:
        assert str(path) in refused(*words, stdin="Hello!\n")


def test_a_bad_picture_in_a_process_of_its_own(bad_pictures: dict[str, Path]) -> None:
    out, err = mmchat_command("ask", f"What is {{{{{bad_pictures['huge.png']}}}}}?", code=1)
    assert out == ""
    assert re.fullmatch(r"mmchat: \S*huge.png: [^\n]+\n", err)


def test_bad_pictures_from_stdin() -> None:
    refused("ask", "-", "What is this?", stdin=b"nothing")
    refused("ask", "-", "What is this?")
    refused("slices", "-", stdin=png_header(50_000, 50_000))


def test_bad_questions(red: Path) -> None:
    for words, stdin in (
        (["ask", red, ""], ""),
        (["ask", red, "  "], ""),
        (["ask", red, "-"], "\n"),
        (["ask", "-"], ""),
    ):
        assert "the question is empty" in refused(*words, stdin=stdin, code=2)
    assert "stdin can be one thing only" in refused("ask", "-", "-", stdin="x", code=2)
    assert "is a picture" in refused("ask", red, code=2)


def test_a_question_of_100_000_words(red: Path) -> None:
    line = refused("ask", red, "-", stdin="word " * 100_000)
    assert "the context holds 2048" in line


def test_wrong_usage(red: Path, tmp_path: Path) -> None:
    refused("ask", red, "Hello?", "--model", tmp_path / "none")
    refused("ask", red, "Hello?", "--model", tmp_path)
    refused("ask", red, "Hello?", "--engine", "abacus")
    assert "--top-p is 2.0" in refused("ask", red, "Hello?", "--top-p", "2", code=2)
    assert "--seed is" in refused("ask", red, "Hello?", "--seed", "9" * 23, code=2)
    assert "write \\{{" in refused("ask", "Is {{none.png}} red?", code=2)
    assert "the question is empty" in refused("ask", f"{{{{{red}}}}}", code=2)
    assert "not text" in refused("ask", "-", stdin=red.read_bytes(), code=2)
    assert "has 2048" in refused("ask", red, "Hello?", "--context", "99999")
    refused("ask", red, "Hello?", "--store", red / "below a file")
    refused("slices", red, "--max-slices", "3", "--save", tmp_path / "cut.xyz", code=2)
    refused("slices", red, "--save", tmp_path / "none" / "cut.png")
    for words in (["ask"], ["frobnicate"], ["ask", red, "Hello?", "--max-new-tokens", "0"], ["slices"], []):
        code, out, err = run_here(*words)
        assert code == 2
        assert (out + err).strip()


def test_braces_that_name_no_picture_are_text(red: Path) -> None:
    out, err = mmchat_command("ask", red, "What colour is the \\{{circle}} {{ }}?")
    assert (out.strip() != "", err) == (True, "")


def test_a_closed_stdout_is_told(red: Path) -> None:
    command = f'exec "$0" "$@" {">&-"}'
    done = subprocess.run(
        ["sh", "-c", command, *MMCHAT, "slices", str(red)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mmchat: stdout is closed: there is nowhere to write an answer to\n"


def test_chat_as_json_prints_json_alone(red: Path) -> None:
    out, _ = mmchat_command("chat", red, "--json", stdin=f"/images\n{CIRCLE}\n/images\n/help\n")
    first, answer, last = map(json.loads, out.splitlines())
    assert (first["images"], first["attached"]) == ([], [str(red)])
    assert answer["stop_reason"] == "stop"
    assert last["images"][0]["id"] == "img1"


def test_a_traceback_only_where_it_is_asked_for(tmp_path: Path) -> None:
    command = [*MMCHAT, "--debug", "slices", str(tmp_path / "none.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no such file" in done.stderr


def test_a_reader_that_leaves_early(red: Path) -> None:
    reader = subprocess.Popen([*MMCHAT, "slices", str(red), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert b"Traceback" not in reader.stderr.read()
    reader.stderr.close()
    assert reader.wait(60) in (0, 1)


# chat


def test_chat_from_lines(red: Path, green: Path, tmp_path: Path) -> None:
    lines = [
        "/images",
        CIRCLE,
        "/images",
        f"/image {red}",
        "/drop",
        f"/image {green}",
        "/images",
        CIRCLE,
        "/undo",
        "/images",
        f"{CIRCLE} {{{{{green}}}}}",
        "/stats",
        BACKGROUND,
        "/stats",
        f"/save {tmp_path / 'talk.json'}",
        f"/save {tmp_path / 'talk.md'}",
        "/help",
        "",
        "/undo 2",
        "/quit",
        "never asked",
    ]
    out, err = mmchat_command("chat", red, stdin="\n".join(lines))
    shown = out.splitlines()
    assert shown[0].split() == ["next", *str(red).split()]
    assert "red" in shown[1]
    assert shown[2].split()[:5] == ["img1", "turn", "1", "200x200", "5"]
    assert shown[2].endswith("red circle.png")
    assert shown[4].split() == ["next", str(green)]
    assert "green" in shown[5]
    assert shown[6] == shown[2]  # the undone turn took its picture along
    assert shown[7].strip()
    assert shown[8].strip()
    assert [line.split()[0] for line in shown[9:]] == [
        "/image", "/drop", "/images", "/pin", "/forget", "/cost", "/undo", "/retry", "/edit", "/branch", "/save",
        "/stats", "/help", "/quit",
    ]  # fmt: skip

    assert err.count("generate") == 1  # the table, once
    for said in ("took back 1 turn(s); 1 left", "saved 3 turn(s)", "times are shown", "took back 2 turn(s); 1 left"):
        assert said in err

    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["assistant"] for turn in saved["turns"]] == [shown[1], shown[7], shown[8]]
    assert [part["type"] for part in saved["turns"][1]["user"]] == ["text", "image"]
    assert CIRCLE in (tmp_path / "talk.md").read_text()


def test_chat_about_what_is_sent(red: Path, green: Path) -> None:
    """Plans, names, pins, other ways on, and a context that gets full."""
    lines = [
        f"/cost {CIRCLE}",
        CIRCLE,
        f"{CIRCLE} {{{{{green}}}}}",
        "/pin img2",
        "/forget img1",
        "/images",
        "Is there a circle in @img1?",
        "/undo",
        "/reattach img1",
        "/edit 2 What is the background of @img1?",
        "/branch 1",
        f"{CIRCLE} {{{{{green}}}}}",
        "/switch 1",
        f"/image {green}",
        "/retry",
        f"/edit 2 {CIRCLE}",
        f"{CIRCLE} {{{{{red}}}}}",
        f"{CIRCLE} {{{{{red}}}}}",
        "/unpin img2",
        f"{CIRCLE} {{{{{red}}}}}",
        "/cost",
    ]
    out, err = mmchat_command("chat", red, "--context", "420", "--max-new-tokens", "30", stdin="\n".join(lines))
    shown, said = out.splitlines(), err.splitlines()
    assert shown[0].startswith("rows ")
    assert "+ 30 for the answer, of 420" in shown[0]
    assert "5 slices to encode" in shown[1]
    assert shown[2] == "time      not known before something has run"
    assert "red" in shown[3]
    pictures = [line for line in shown if line.startswith("img")]
    assert pictures[0].endswith("(line)")
    assert pictures[1].endswith("green.png  (pinned)")
    for told in (
        "img2 stays as it is when the context is full",
        "img1 is a line of text from now on; /reattach img1 brings it back",
        "the model does not see img1: /images lists what it does, /reattach brings a picture back",
        "img1 is sent whole again",
        "conversation 2, after 1 turn(s); /switch goes to another",
        "conversation 1: 2 turn(s), this one",
        "conversation 2: 2 turn(s)",
        "without a --temperature the answer will be the same",
    ):
        assert f"mmchat: {told}" in said
    assert "mmchat: the context is full; turns 1, 3 with img1, img3: not sent any more" in said
    assert shown[-1].startswith("time ")
    assert "measured in this run" in shown[-1]
    assert any(line.startswith("pictures  img1 ") for line in shown[-6:])


def test_chat_plans_as_json(red: Path) -> None:
    out, _ = mmchat_command("chat", red, "--json", stdin=f"/cost {CIRCLE}\n/images\n{CIRCLE}\n/images\n")
    plan, before, answer, after = map(json.loads, out.splitlines())
    assert plan["rows"] == plan["rows_new"] == answer["usage"]["n_prompt"]
    assert plan["slices_new"] == answer["usage"]["slices_encoded"] == 5
    assert plan["images"] == [{"id": "img1", "form": "whole", "number": 1}]
    assert before == {"images": [], "attached": [str(red)]}
    (image,) = after["images"]
    assert (image["id"], image["form"], image["number"], image["pinned"]) == ("img1", "whole", 1, False)


def test_chat_goes_on_after_errors(bad_pictures: dict[str, Path], red: Path, tmp_path: Path) -> None:
    mistakes = [
        *(f"/image {path}" for path in bad_pictures.values()),
        *(f"What is {{{{{path}}}}}?" for path in bad_pictures.values()),
        "word " * 100_000,
        "/undo",
        "/undo x",
        "/undo 0",
        "/image",
        "/save",
        f"/save {tmp_path}/none/talk.md",
        "/frobnicate",
        "/pin",
        "/pin img1",
        "/unpin 3",
        "/forget",
        "/forget img1",
        "/reattach img9",
        "/retry",
        "/edit",
        "/edit 1",
        "/edit one What?",
        "/branch 1",
        "/branch x",
        "/switch 2",
        f"/cost {{{{{tmp_path}/none.png}}}}",
    ]
    lines = [*mistakes, f"/image {red}", CIRCLE]
    out, err = mmchat_command("chat", "--json", stdin="\n".join(lines), code=1)
    (answer,) = out.splitlines()
    assert "red" in json.loads(answer)["text"]
    said = err.splitlines()
    assert len(said) == len(mistakes) + 1
    assert all(line.startswith("mmchat: ") for line in said)


def test_chat_with_a_file_name_that_is_no_text(red: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(red.read_bytes())
    done = subprocess.run(
        [*MMCHAT, "chat", name], input=f"/images\n{CIRCLE}\n/images\n/save {tmp_path}/talk.md\n".encode(),
        capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert b"red" in done.stdout
    assert done.returncode == 0


def test_what_the_terminal_cannot_say_is_spelled_out(red: Path, tmp_path: Path) -> None:
    """And a name that is no text is one in an export, too."""
    kept = tmp_path / "talk.mmchat"
    mmchat_command("chat", red, "--save", kept, stdin="猫?\n")
    out, _ = mmchat_command("session", "show", kept, env={"PYTHONIOENCODING": "iso-8859-1"})
    assert r"\u732b?" in out
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.md")
    mmchat_command("session", "export", kept, "--to", name)
    assert "caf%E9.pictures/" in Path(name).read_text()


def test_chat_ends_quietly_with_its_input() -> None:
    assert mmchat_command("chat") == ("", "")


@pytest.mark.parametrize("words", [("chat",), ("ask", "-"), ("prompt", "-", "--model", "demo"), ("slices", "-")])
def test_a_closed_stdin_is_an_empty_one(words: tuple[str, ...]) -> None:
    done = subprocess.run([*MMCHAT, *words], preexec_fn=lambda: os.close(0), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if words == ("chat",) else 2 if words[0] == "ask" else 1)


def test_ctrl_c_ends_a_chat_whose_questions_come_from_a_file(tmp_path: Path) -> None:
    """What was shown is kept; the questions after it are not asked."""
    kept = tmp_path / "talk.mmchat"
    questions = tmp_path / "questions.txt"
    questions.write_text(f"{DESCRIBE}\n" * 50)
    command = [*MMCHAT, "chat", "--model", str(endless_model(tmp_path / "endless")), "--save", str(kept)]
    with (
        questions.open() as stdin,
        subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1].decode()
    assert (process.returncode, err.splitlines()[-1]) == (130, "mmchat: interrupted")
    assert mmchat_command("session", "show", kept)[0].count(DESCRIBE) == 1


def test_names_are_taken_as_terminals_quote_them(red: Path, tmp_path: Path) -> None:
    photo = tmp_path / "my photo's.png"
    shutil.copy(red, photo)
    other = tmp_path / "b c.png"
    shutil.copy(red, other)
    lines = f"/image {photo}\n/image {shlex.quote(str(photo))} {shlex.quote(str(other))}\n/images\n"
    assert mmchat_command("chat", stdin=lines)[0].count("next") == 3


def test_options_that_a_tokenizer_cannot_serve(tmp_path: Path) -> None:
    tokenizer = Path(mmchat.__file__).parent / "demo" / "tokenizer.json"
    for name, value in (("--context", "1"), ("--policy", "nonsense"), ("--max-new-tokens", "5")):
        assert f"{name} needs --model" in refused("prompt", "-", "--tokenizer", tokenizer, name, value, code=2)


def test_modules_that_the_readme_names() -> None:
    code = "import mmchat; mmchat.doctor.examine; mmchat.images.read_image; mmchat.video.captions"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_openvino_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "openvino" else found(name, *a))
    assert "needs the package openvino: pip install openvino" in refused("ask", "What?")


# A dumb one gets its prompt before the editor takes the keyboard, and so may lose what is typed at once.
TERMINAL = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200"}
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[^\[]|\x1b\[?[0-9;?]*$|\r")


class Terminal:
    """mmchat chat in a pseudo-terminal: what a person types, and what a person sees."""

    def __init__(self, words: Sequence[str | Path], env: dict[str, str], stdout: IO[bytes] | None = None) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [*MMCHAT, *map(str, words)], stdin=slave, stdout=stdout or slave, stderr=slave, start_new_session=True,
            preexec_fn=_controlling_terminal, env={**os.environ, **TERMINAL, **env},
        )  # fmt: skip
        os.close(slave)
        self._bytes, self._n_taken = b"", 0

    @property
    def seen(self) -> str:
        """What came since the last wait_for, without what moves the cursor."""
        return _CONTROLS.sub("", self._bytes.decode(errors="replace"))[self._n_taken :]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for_match(self, pattern: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, f"nothing comes; seen: {self.seen!r}"
            self._read(1.0)

    def _read(self, timeout_s: float) -> None:
        if select.select([self._master], [], [], timeout_s)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                self._bytes += os.read(self._master, 65536)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """What was seen up to text, which is then taken off."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"{text!r} did not come; seen: {self.seen!r}"
            self._read(left_s)
        before = self.seen.split(text, 1)[0]
        self._n_taken += len(before) + len(text)
        return before

    def leave(self, typed: str) -> int:
        """Typed again every other second: a key that comes between two prompts may be lost."""
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            self.type(typed)
            again_at = time.monotonic() + 2
            while self._process.poll() is None and time.monotonic() < again_at:
                self._read(0.1)
        return self._process.wait(1)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


def _controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(red: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat whose answers do not end by themselves, for a second or so."""
    model = endless_model(tmp_path / "endless")
    made = Terminal(["chat", "--model", model, red], {"XDG_STATE_HOME": str(tmp_path / "state")})
    yield made
    made.close()


def endless_model(folder: Path) -> Path:
    """The demo model, made to repeat itself until it is stopped."""
    folder.mkdir()
    demo = Path(mmchat.__file__).parent / "demo"
    for file in demo.iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).symlink_to(file)
    config = {"do_sample": False, "repetition_penalty": 0.01, "max_new_tokens": 1800}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def test_ctrl_c_stops_the_answer_not_the_chat(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for(">")
    terminal.type(DESCRIBE + "\r")
    terminal.wait_for_match(r"(?s)(?=\S)(.{1,20}?)\1{5}")  # of the answer, which repeats itself
    terminal.type("\x03")
    answer = terminal.wait_for("mmchat: stopped")
    assert answer.strip()
    terminal.wait_for(">")
    terminal.type("/images\r")
    terminal.wait_for("img1")
    terminal.wait_for(">")
    terminal.type("\x03")
    terminal.wait_for("/quit or Ctrl-D leaves")
    terminal.wait_for(">")
    terminal.type(f"/save {tmp_path / 'talk.json'}\r")
    terminal.wait_for("saved 1 turn(s)")
    terminal.wait_for(">")
    (turn,) = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert turn["stop_reason"] == "cancelled"
    assert terminal.leave("\x04") == 0
    assert DESCRIBE in (tmp_path / "state" / "mmchat" / "history").read_text()


@pytest.mark.parametrize("line", ["What is this?", "/undo"])
def test_ctrl_c_around_an_answer_does_not_end_the_chat_either(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a large picture is cut, or pressed twice, so that the second one comes when the answer is over."""

    class Interrupted:
        turns: ClassVar[list[Any]] = []

        def ask(self, *args: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        undo = ask

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    session: Any = Interrupted()
    repl = _Repl(session, Talk(None, None, False, False, False), session, [], Keeping())
    try:
        assert repl.handle(line)
    except KeyboardInterrupt:  # which would end the test run as well
        pytest.fail("the chat was ended")
    assert capsys.readouterr().err == "mmchat: interrupted\n"


def test_quit_at_a_terminal(terminal: Terminal) -> None:
    terminal.wait_for("type a question; /help lists the commands")
    terminal.wait_for(">")
    terminal.type("/help\r")
    terminal.wait_for("Ctrl-C stops an answer")
    assert terminal.leave("/quit\r") == 0
    assert "Traceback" not in terminal.seen


def test_at_a_terminal_only_results_go_to_a_file(red: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        terminal = Terminal(["chat", red, "--json"], {"XDG_STATE_HOME": str(tmp_path / "state")}, out)
    try:
        terminal.wait_for(">")
        terminal.type(f"{CIRCLE}\r")
        terminal.wait_for(CIRCLE)  # who types sees it
        terminal.wait_for(">", 120)
        assert terminal.leave("/quit\r") == 0
    finally:
        terminal.close()
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert "red" in json.loads(line)["text"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_without_room_for_the_history_the_question_is_asked_all_the_same() -> None:
    from mmchat.cli.editor import _FileHistory

    history = _FileHistory("/dev/full")
    history.append_string("What is this?")
    assert history.get_strings() == ["What is this?"]


# slices and prompt


def test_slices(tmp_path: Path) -> None:
    file = io.BytesIO()
    picture("circle", "red", "blue", (400, 300)).save(file, "PNG")
    overlay = tmp_path / "cut.png"
    out, err = mmchat_command("slices", "-", "--json", "--save", overlay, stdin=file.getvalue())
    shown = json.loads(out)
    plan = mmchat_plan(400, 300, scale_resolution=112)
    assert shown["size"] == [400, 300]
    assert shown["source"] == list(plan.source)
    assert shown["grid"] == list(plan.grid)
    assert shown["n_inputs"] == plan.n_inputs == 1 + shown["grid"][0] * shown["grid"][1]
    assert shown["image_rows"] == plan.n_inputs * shown["rows_per_input"]
    assert shown["prompt_rows"] > shown["image_rows"]
    assert err == ""
    with Image.open(overlay) as image:
        image.load()
        assert image.width >= 400

    published, _ = mmchat_command("slices", "-", "--json", "--resolution", "448", stdin=file.getvalue())
    assert json.loads(published)["grid"] is None
    text, _ = mmchat_command("slices", "-", "--max-slices", "1", stdin=file.getvalue())
    assert "400x300" in text
    assert "grid      none" in text


def mmchat_plan(width: int, height: int, **rule: int) -> Any:
    from mmchat.slicing import plan_slices

    return plan_slices(width, height, **rule)


def test_prompt_equals_the_reference(reference: Path, tmp_path: Path) -> None:
    tokenizer = reference / "tokenizer" / "tokenizer.json"
    cases = json.loads((reference / "prompt_vectors.json").read_text())["cases"]
    for case in (case for case in cases if case["id"] in REFERENCE_PROMPTS):
        names = ("messages", "system_prompt", "use_image_id", "max_slice_nums")
        file = tmp_path / f"{case['id']}.json"
        file.write_text(json.dumps({name: case[name] for name in names if case.get(name) is not None}))
        code, out, err = run_here("prompt", file, "--tokenizer", tokenizer, "--json")
        assert (code, err) == (0, "")
        shown = json.loads(out)
        assert shown["ids"] == case["input_ids"], case["id"]
        assert shown["image_spans"] == case["image_bound"]
        assert shown["n_vision_inputs"] == case["n_vision_inputs"]
    assert mmchat_command("prompt", file, "--tokenizer", tokenizer, "--json") == (out, "")


HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]}
PICTURE: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "image", "size": [10, 10]}]}]}


def test_prompt_with_the_budget_of_a_model() -> None:
    out, _ = mmchat_command("prompt", "-", "--model", "demo", "--json", stdin=json.dumps(HELLO))
    shown = json.loads(out)
    assert shown["budget"] == {"rows": len(shown["ids"]), "context_rows": 2048, "left": 2048 - len(shown["ids"])}
    assert shown["plan"]["rows"] == len(shown["ids"])
    assert shown["plan"]["max_new_tokens"] == 128
    text, _ = mmchat_command("prompt", "-", "--model", "demo", stdin=json.dumps(HELLO))
    assert "left for the answer" in text
    assert "would be sent" in text


def talk(n: int) -> str:
    """n questions about a picture each; the answers to all but the last."""
    messages: list[dict[str, Any]] = []
    for number in range(n):
        parts = [{"type": "image", "size": [400, 330]}, {"type": "text", "text": f"What is @img{number + 1}?"}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": "A circle."}]
    return json.dumps({"system_prompt": "Be brief.", "messages": messages[:-1]})


def test_prompt_tells_what_would_be_degraded() -> None:
    common = ["prompt", "-", "--model", "demo", "--context", "600", "--max-new-tokens", "50"]
    code, out, _ = run_here(*common, "--json", stdin=talk(3))
    assert code == 0
    shown = json.loads(out)
    plan, spans = shown["plan"], shown["image_spans"]
    assert [(change["what"], change["form"]) for change in plan["degraded"]] == [("img1", "overview")]
    assert plan["rows"] + 50 <= plan["cap"] == 600
    assert plan["rows"] == plan["rows_new"] == len(shown["ids"]) == shown["budget"]["rows"]
    assert plan["slices_new"] == len(spans) == shown["n_vision_inputs"] == 1 + 10 + 10
    unk = ChatTokenizer(open_model("demo").tokenizer_path).special["<unk>"]
    assert all(set(shown["ids"][start:end]) == {unk} for start, end in spans)
    assert plan["seconds"]["first_token"] is None
    code, out, _ = run_here(*common, stdin=talk(3))
    assert "degraded  img1: sent without cells" in out
    assert f"vision inputs   {len(spans)}\n" in out
    assert f"ids             {' '.join(map(str, shown['ids']))}\n" in out
    code, out, _ = run_here(*common, "--policy", "error", stdin=talk(4))
    assert (code, "does not fit" in out) == (0, True)
    assert 'another policy than "error"' in out
    assert "ids " not in out
    nothing = json.loads(run_here(*common, "--policy", "error", "--json", stdin=talk(4))[1])
    assert (nothing["ids"], nothing["image_spans"], nothing["n_vision_inputs"]) == ([], [], 0)
    assert nothing["budget"]["left"] < 0
    assert 'another policy than "error"' in nothing["plan"]["error"]
    assert "policy is" in refused(*common, "--policy", "cells", stdin=talk(3), code=2)
    assert "has 2048" in refused("prompt", "-", "--model", "demo", "--context", "99999", stdin=talk(3))
    in_no_turns = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    assert json.loads(run_here(*common, "--json", stdin=json.dumps(in_no_turns))[1])["plan"] is None
    picture_said = [*HELLO["messages"], {"role": "assistant", "content": PICTURE["messages"][0]["content"]}] * 2
    assert json.loads(run_here(*common, "--json", stdin=json.dumps({"messages": picture_said[:-1]}))[1])["plan"] is None


def test_prompt_prints_the_rows_of_names_as_they_are_sent() -> None:
    named, sent = talk(2), talk(2).replace("@img", "image ")
    shown = json.loads(run_here("prompt", "-", "--model", "demo", "--json", stdin=named)[1])
    assert shown == json.loads(run_here("prompt", "-", "--model", "demo", "--json", stdin=sent)[1])
    assert shown["plan"]["rows"] == len(shown["ids"])
    tokenizer = model_folder("demo") / "tokenizer.json"
    plain = json.loads(run_here("prompt", "-", "--tokenizer", tokenizer, "--json", stdin=named)[1])
    assert set(plain) == {"ids", "image_spans", "n_vision_inputs"}
    assert len(plain["ids"]) != len(shown["ids"])  # the text as it is


def test_prompt_plans_as_a_session_on_the_board_would(open_board: Any, board: Any) -> None:
    folder = board("1.3.0")
    speeds = {"prefill_rows_per_s": 1000.0, "decode_tokens_per_s": 10.0, "encode_s_per_slice": 0.5}
    runtime = open_board(folder=folder, safe_rows=100, **speeds)
    words = ["prompt", "-", "--model", folder, "--json"]
    asked = [{"type": "image", "size": [97, 91]}, {"type": "text", "text": "What is it?"}]
    code, out, err = run_here(*words, stdin=json.dumps({"messages": [{"role": "user", "content": asked}]}))
    assert (code, err) == (0, "")
    shown = json.loads(out)["plan"]
    session = runtime.session()
    plan = session.plan("What is it?", Image.effect_noise((97, 91), 60).convert("RGB"))
    assert shown == json.loads(json.dumps(plan.to_dict()))
    assert shown["seconds"]["sources"] == ["measured by mmchat calibrate"]
    assert shown["seconds"]["prefill"] == pytest.approx(shown["rows"] / 1000)
    long = [{"role": role, "content": "word " * 30} for role in ("user", "assistant", "user")]
    text = json.dumps({"messages": long})
    shown = json.loads(run_here(*words, stdin=text)[1])
    assert (shown["plan"]["dropped"], len(shown["ids"]) <= 100) == ([1], True)
    runtime.close()
    (folder / "librkllmrt.so").unlink()
    code, out, err = run_here(*words, stdin=text)
    assert (code, json.loads(out)["plan"]["dropped"]) == (0, [])
    assert "not measured here" in json.loads(out)["plan"]["seconds"]["sources"][0]
    assert "no RKLLM library" in err


BAD_CONVERSATIONS = {
    "no JSON": "{",
    "a list": "[]",
    "no messages": json.dumps({"messages": []}),
    "unknown key": json.dumps({**HELLO, "temperature": 1}),
    "a role that is none": json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
    "a size that is none": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image", "size": [0, -1]}]}]}
    ),
    "an endless size": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image", "size": [10**400, 10]}]}]}
    ),
    "max_slice_nums of another type": json.dumps({**PICTURE, "max_slice_nums": "nine"}),
    "system_prompt of another type": json.dumps({**HELLO, "system_prompt": 5}),
    "surrogates": json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}),
    "too deep": "[" * 100_000,
    "a content that is a number": json.dumps({"messages": [{"role": "user", "content": 5}]}),
    "messages of another type": json.dumps({"messages": ["x", None]}),
}


def test_bad_conversations() -> None:
    for what, text in BAD_CONVERSATIONS.items():
        assert refused("prompt", "-", "--model", "demo", stdin=text), what
    refused("prompt", "-", stdin=json.dumps(HELLO), code=2)
    refused("prompt", "none.json", "--model", "demo")
    refused("prompt", "-", "--tokenizer", "none.json", stdin=json.dumps(HELLO))


# The rest


def test_version() -> None:
    assert mmchat_command("--version") == (f"mmchat {mmchat.__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["ask", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    command = [MMCHAT[0], "-X", "importtime", *MMCHAT[1:], *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.strip()
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "mmchat" in loaded
    assert not loaded & {"openvino", "PIL", "numpy", "tokenizers", "msgpack", "prompt_toolkit", "requests", "httpx"}


def test_import_loads_nothing_heavy() -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}; import mmchat; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"openvino", "PIL", "numpy", "tokenizers", "msgpack", "typer", "rich", "asyncio", "ssl"}


def test_python_runs_it_without_its_script() -> None:
    """python -m mmchat: where the environment's scripts are not on the PATH."""
    command = [sys.executable, "-m", "mmchat", "ask", "--context", "0", "Hello?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(mmchat.__file__).parents[1])
    assert (done.returncode, "--context" in done.stderr) == (2, True)
