"""Disks that are really full and folders that are really read-only: the answer still comes, and a warning.

Each test runs a program that has mounts of its own: a small disk at argv[1], and a /dev/shm that nobody else uses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOUNTS = 'mount -t tmpfs -o size=300k none "$1" && mount -t tmpfs -o size=400m none /dev/shm && shift && exec "$@"'
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNTS, "sh"]

HEAD = """
import json, logging, os, subprocess, sys
from pathlib import Path
import mmchat
from mmchat.cli import main
from mmchat.store import Store, open_store
from tests.test_demo import CIRCLE, picture

disk, told, seen = Path(sys.argv[1]), [], {}
os.environ["MMCHAT_STORE"] = str(disk / "store")

class Listener(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

logging.getLogger("mmchat").addHandler(Listener())

def fill():
    with (disk / "filling").open("ab", 0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass

def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

def kept(store):
    return sorted(path.name for path in store.root.glob("data/*/*"))
"""


def on_a_small_disk(folder: Path, program: str) -> dict[str, Any]:
    """What the program leaves in `seen`."""
    tail = "\nprint(json.dumps({**seen, 'told': told}))"
    command = [*UNSHARE, str(folder), sys.executable, "-c", HEAD + program + tail, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run([*UNSHARE, str(folder), "true"], capture_output=True).returncode:
        pytest.skip("mounts need user namespaces, which this machine does not allow")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_a_disk_that_fills_up_and_has_room_again(tmp_path: Path) -> None:
    """The same answers as with room: also after the LLM had to read everything again."""
    program = """
def talk(store, at_turn):
    answers, n_kept = [], []
    with mmchat.open(store=store, n_threads=1) as rt:
        chat = rt.session()
        for n, colour in enumerate(("red", "blue", "green", "red", "")):
            at_turn(n, rt)
            images = [picture("circle", colour, "white")] if colour else []
            answers.append(chat.ask(CIRCLE, images=images).text)
            n_kept.append([len(kept(rt.store)), len(kept(rt.store.spare))])
    return answers, n_kept

def trouble(n, rt):
    if n == 1:
        fill()
    if n == 3:
        rt.llm.worker.kill()
    if n == 4:
        (disk / "filling").unlink()
        seen["put"] = rt.store.put("0" * 64, __import__("numpy").zeros((1, 1), "f4"))

seen["expected"], [*_, [seen["n_distinct"], _]] = talk("/dev/shm/roomy", lambda n, rt: None)
seen["answers"], seen["kept"] = talk(None, trouble)
"""
    seen = on_a_small_disk(tmp_path, program)
    assert seen["answers"] == seen["expected"]
    assert "red" in seen["answers"][0]
    first, second, third, fourth, fifth = seen["kept"]
    assert first[1] == 0
    assert second[0] - first[0] < second[1]  # hardly anything fitted any more
    assert sum(third) == sum(fourth) == seen["n_distinct"]  # the first picture once more: nothing is made twice
    assert seen["put"] is None  # there is room: the cache is on again
    assert fifth == [fourth[0] + 1, fourth[1]]
    (warning,) = seen["told"]
    assert "the cache is off" in warning
    assert "No space left" in warning


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    """No folder can be made on it, nor a byte written."""
    program = """
fill()
picture("circle", "red", "white").save("/dev/shm/red.png")
sys.argv = ["mmchat", "ask", "/dev/shm/red.png", CIRCLE, "--threads", "1", "--json"]
try:
    main()
except SystemExit as exit:
    seen["code"] = exit.code
"""
    command_output = on_a_small_disk(tmp_path, program + "seen['folders'] = [p.name for p in disk.iterdir()]")
    assert command_output["code"] in (0, None)
    assert len(command_output["told"]) == 1
    assert "the cache is off" in command_output["told"][0]


def test_a_store_on_a_read_only_disk_is_read(tmp_path: Path) -> None:
    """What it has is used, also under a lease; a damaged file in it, and what is new, is in the spare folder."""
    program = """
def ask(rt, colour):
    reply = rt.session().ask(CIRCLE, images=[picture("circle", colour, "white")])
    return [reply.text, reply.usage.slices_encoded, reply.usage.slices_cached]

with mmchat.open(n_threads=1) as rt:
    seen["first"] = ask(rt, "red")
    reds = kept(rt.store)
    ask(rt, "blue")
    blue = next(path for path in rt.store.root.glob("data/*/*") if path.name not in reds)
blue.write_bytes(blue.read_bytes()[:-1] + b"x")
remount("ro")
told.clear()
with mmchat.open(n_threads=1) as rt:
    seen["problem"] = rt.store.problem
    seen["red"], seen["blue"], seen["green"] = ask(rt, "red"), ask(rt, "blue"), ask(rt, "green")
    seen["spare"] = len(kept(rt.store.spare))
    seen["info"] = rt.store.info().n_files
    seen["verified"] = [rt.store.verify().n_removed, rt.store.verify().n_left]
    seen["warnings"] = list(told)
    try:
        rt.store.clear()
    except mmchat.StoreError as error:
        seen["clear"] = str(error)
"""
    seen = on_a_small_disk(tmp_path, program)
    assert "Read-only" in seen["problem"]
    text, n, cached = seen["first"]
    assert (n > 1, cached) == (True, 0)
    assert seen["red"] == [text, 0, n]
    assert "blue" in seen["blue"][0]
    assert seen["blue"][1] == 1  # the damaged one alone, made again
    assert "green" in seen["green"][0]
    assert seen["spare"] == 1 + seen["green"][1]
    assert seen["info"] >= n
    assert seen["verified"] == [0, 1]
    (warning,) = seen["warnings"]
    assert "the cache is off" in warning
    assert "Read-only" in seen["clear"]


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    """As Linux does with a failing SD card."""
    program = """
with mmchat.open(n_threads=1) as rt:
    chat = rt.session()
    chat.ask(CIRCLE, images=[picture("circle", "red", "white")]).text
    remount("ro")
    seen["answer"] = chat.ask(CIRCLE, images=[picture("circle", "green", "white")]).text
    seen["earlier"] = chat.ask("What colour is the circle in the first image?").text
"""
    seen = on_a_small_disk(tmp_path, program)
    assert "green" in seen["answer"]
    assert "red" in seen["earlier"]
    assert ["the cache is off" in text for text in seen["told"]] == [True]


def test_a_matrix_that_does_not_fit_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    seen = on_a_small_disk(
        tmp_path,
        """
import numpy as np
from mmchat.convert.openvino_folder import _converted
try:
    _converted(np.zeros((1000, 1000), np.float32), "F16", disk / "matrix", "a matrix")
except OSError as error:
    seen["said"] = error.strerror
""",
    )
    assert seen["said"] == "No space left on device"
