"""kill -9 while a conversation is being saved: every finished turn is there, and it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

from mmchat.bundle import Bundle
from tests.test_cli import MMCHAT
from tests.test_demo import picture

IS_DEEP = settings().max_examples > 50
PROGRAM = [sys.executable, "-m", "tests.autosaving"]
PICTURE_BYTES = 1_440_000  # of which tests.autosaving adds one per turn
TORN = "what was being saved when the file was cut off"


class Program:
    """A process whose lines of stdout are kept, and which is killed with all that it started."""

    def __init__(self, command: Sequence[str | Path], stdin: bytes = b"") -> None:
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert self.process.stdin
        self.lines: list[str] = []
        self.errors = ""
        self._readers = [threading.Thread(target=read) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(stdin)
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self.lines.append(line.decode())

    def _read_errors(self) -> None:
        assert self.process.stderr
        self.errors = self.process.stderr.read().decode()

    def wait_for_lines(self, n: int, timeout_s: float = 1200.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.lines) < n and self.process.poll() is None:
            assert time.monotonic() < deadline, "nothing comes"
            time.sleep(0.002)

    def kill(self) -> None:
        """With SIGKILL; afterwards lines has all that was ever written."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def is_read(path: Path) -> Bundle:
    """Whole, but for what was being added."""
    bundle = Bundle(path)
    assert not bundle.damaged
    assert set(bundle.lost) <= {TORN}
    assert all(bundle.has_picture(image) for image in bundle.record.images)
    return bundle


@pytest.mark.timeout(3600)
def test_kill_while_a_picture_is_written(tmp_path: Path) -> None:
    """No model and a slow disk: a turn is little more than its saving, so that many a kill falls into it."""
    rng = random.Random(1)
    path, n_torn, known = tmp_path / "talk.mmchat", 0, list[str]()
    n_kills = 200 if IS_DEEP else 6
    for number in range(n_kills):
        command: list[str | Path] = [*PROGRAM, path, tmp_path / "store"]
        if number % 2:  # at any moment
            program = Program(command)
            program.wait_for_lines(rng.randrange(1, 4))
            time.sleep(rng.random() * 0.4)
        else:  # at any byte, however fast machine and disk are
            program = Program([*command, str(rng.randrange(1, 3 * PICTURE_BYTES))])
            program.process.wait(1200)
        program.kill()
        assert program.process.returncode == -signal.SIGKILL, program.errors
        told = [json.loads(line)["turns"] for line in program.lines]
        known = told[-1] if told else known
        if not path.exists():
            assert not known
            continue
        bundle = is_read(path)
        n_torn += bundle.torn
        found = [turn.text for turn in bundle.record.turns]
        one_more = [*known, f"answer {len(known)}"]
        taken_back = known[:-2] if len(known) % 3 == 0 else known
        assert found in (known, one_more, taken_back)
        known = found
        if path.stat().st_size > 60 << 20:
            path.unlink()
            known = []
    print(f"\nkilled {n_kills} times, {n_torn} of them while something was being added")
    assert n_torn > n_kills // 10


@pytest.mark.timeout(7200)
def test_kill_of_the_whole_program(tmp_path: Path) -> None:
    """mmchat chat with its workers, at random moments; each time it is resumed, and killed again."""
    rng = random.Random(2)
    picture("circle", "red", "blue").save(tmp_path / "red.png")
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "noise.png")
    questions = ["What colour is the circle?", f"{{{{{tmp_path / 'noise.png'}}}}} And this?", "Say it again."]
    path, known, n_kept = tmp_path / "talk.mmchat", list[tuple[str, str]](), 0
    for moment in range(200 if IS_DEEP else 5):
        is_new = not path.exists()
        known = [] if is_new else known
        asked = [rng.choice(questions) for _ in range(4)]
        begin = ["--save", path, tmp_path / "red.png"] if is_new else ["--resume", path]
        words = ["chat", "--json", "--store", tmp_path / "store", "--max-new-tokens", "6", "--threads", "1", *begin]
        program = Program([*MMCHAT, *map(str, words)], "".join(f"{text}\n" for text in asked).encode())
        program.wait_for_lines(rng.randrange(0, 4))
        time.sleep(rng.random() * (0.5 if program.lines else 3.0))
        program.kill()
        answers = [json.loads(line)["text"] for line in program.lines]
        if not path.exists():
            assert not answers
            continue
        turns = is_read(path).record.turns
        found = [turn.text for turn in turns]
        said = [*(answer for _, answer in known), *answers]
        assert found[: len(said)] == said, f"moment {moment}: {program.errors}"
        assert len(found) <= len(said) + 1
        assert [str(turn.parts[-1]) for turn in turns[: len(known)]] == [text for text, _ in known]
        known = [(str(turn.parts[-1]), turn.text) for turn in turns]
        n_kept += len(answers)
        if len(known) > 12:  # the context is finite
            path.unlink()
    print(f"\n{n_kept} finished turns, none lost")
    assert n_kept
