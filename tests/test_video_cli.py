"""mmchat caption as its users meet it: a process, its files, its exit code, and what is left of it after a kill."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import srt
import webvtt

from mmchat.cli.progress import View
from mmchat.video import Caption
from mmchat.video.pictures import Arrays
from tests.test_cli import MMCHAT, mmchat_command, refused, run_here
from tests.test_video_live import Camera
from tests.video_kit import COLOURS, FakeRuntime, colour, distinct, make_video, many
from tools.make_test_video import at, scenes, write

ROOT = Path(__file__).resolve().parents[1]
ASK = ("--ask", "What color is the background?")


@pytest.fixture
def no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """The command line in this process, on a runtime without a model."""
    fake = FakeRuntime(tmp_path / "store")
    monkeypatch.setattr("mmchat.runtime.open", lambda *args, **kwargs: fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Six seconds, six colours."""
    return make_video(tmp_path / "six.mkv", [colour(name, (112, 84)) for name in COLOURS for _ in range(5)], rate=5)


def captions_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(path: Path) -> list[dict[str, Any]]:
    """All of the lines that does not depend on caches and clocks."""
    return [{name: value for name, value in line.items() if name != "usage"} for line in captions_in(path)]


# With the demo model


def test_the_demo_model_captions_a_video(tmp_path: Path) -> None:
    """The main thing: a video to JSON, subtitles, a table and a page, and what they say is right."""
    made = scenes(20, fps=25, seed=3)
    write(tmp_path / "a.mp4", made, fps=25)
    files = [tmp_path / f"out.{suffix}" for suffix in ("jsonl", "srt", "vtt", "csv")]
    page = tmp_path / "page.html"
    words = [word for file in files for word in ("-o", file)]
    out, err = mmchat_command("caption", tmp_path / "a.mp4", *ASK, "--changed", "0.1", *words, "--html", page)
    assert (out, err) == ("", "")
    lines = captions_in(files[0])
    assert [line["index"] for line in lines] == list(range(0, 500, 25))
    right: dict[float, bool] = {}
    for line in lines:
        held = at(made, line["time"])
        right.setdefault(held.start, held.background in line["caption"].lower())
    assert sum(right.values()) >= 0.8 * len(right)  # an interim model; tools/measure_video.py looks closer
    assert sum(line["usage"]["slices_encoded"] for line in lines) == sum(not line["carried"] for line in lines)
    assert sum(not line["carried"] for line in lines) == len(right)
    cues = list(srt.parse(files[1].read_text()))
    asked = [line for line in lines if not line["carried"]]
    assert [cue.content for cue in cues] == [line["caption"] for line in asked]
    assert cues[-1].end.total_seconds() == 20
    assert [cue.text for cue in webvtt.read(str(files[2])).captions] == [line["caption"] for line in asked]
    with files[3].open(newline="") as file:
        assert [row["digest"] for row in csv.DictReader(file)] == [line["digest"] for line in lines]
    assert page.read_text().count("<figure>") == len(asked)
    assert len(list((tmp_path / "page_files").iterdir())) == len(asked)


def test_a_kill_of_the_whole_program_loses_nothing(tmp_path: Path) -> None:
    """The real program, with its workers: they go with it, and the next run goes on."""
    write(tmp_path / "a.mkv", scenes(8, seed=4))
    command: list[str | Path] = ["caption", tmp_path / "a.mkv", *ASK, "--every", "0.4", "-o"]
    mmchat_command(*command, tmp_path / "whole.jsonl")
    killed = tmp_path / "killed.jsonl"
    process = subprocess.Popen([*MMCHAT, *map(str, command), str(killed), "--resume"])
    deadline = time.monotonic() + 120
    while not killed.exists() or killed.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    n_before = killed.read_bytes().count(b"\n")
    assert n_before < 20
    mmchat_command(*command, killed, "--resume")
    assert facts(killed) == facts(tmp_path / "whole.jsonl")


def test_the_example_runs(tmp_path: Path, video: Path) -> None:
    example = ROOT / "examples" / "caption_camera.py"
    assert len(example.read_text().splitlines()) < 30
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(example), str(video)], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("background") >= 4


# kill -9


def caption_child(store: Path, *words: str | Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.caption_child", str(store), "caption", *map(str, words)],
        cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", [("--changed", "0.1"), ("--window", "2", "--story", "2"), ("--when", "yes")])
def test_kills_at_any_moment_lose_and_double_no_line(mode: tuple[str, ...], tmp_path: Path) -> None:
    pictures = [distinct(i // 3, (56, 42)) for i in range(150)]
    video = make_video(tmp_path / "a.mkv", pictures, codec="ffv1", form="bgr0")
    words: list[str | Path] = [video, "--every", "0", *mode]
    whole, out, subtitles = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", tmp_path / "out.srt"
    started = time.monotonic()
    process = caption_child(tmp_path / "store", *words, "-o", whole, "-o", tmp_path / "whole.srt")
    assert process.communicate(timeout=600) == (b"", b"")
    took_s = time.monotonic() - started
    expected = facts(whole)
    assert len(expected) > 20
    rng = random.Random(str(mode))
    n_seen = n_interrupted = 0
    for number in range(many(1, 34)):
        process = caption_child(tmp_path / "store", *words, "-o", out, "-o", subtitles, "--resume")
        if number > 0:
            time.sleep(rng.uniform(0.2, took_s))
        while number == 0 and not (out.exists() and b"\n" in out.read_bytes()):  # one hits for certain
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.communicate()
        if out.exists():
            kept = out.read_text()[: out.read_text().rfind("\n") + 1].splitlines()
            assert len(kept) >= n_seen
            n_seen = len(kept)
            n_interrupted += 0 < n_seen < len(expected)
        if n_seen == len(expected):  # it was quicker than the kill: begin anew
            assert facts(out) == expected
            out.unlink()
            subtitles.unlink()
            n_seen = 0
    assert n_interrupted
    process = caption_child(tmp_path / "store", *words, "-o", out, "-o", subtitles, "--resume")
    assert process.communicate(timeout=600) == (b"", b"")
    assert process.returncode == 0
    assert facts(out) == expected
    assert subtitles.read_text() == (tmp_path / "whole.srt").read_text()


# What is said and done


def test_captions_go_to_stdout(no_model: FakeRuntime, video: Path) -> None:
    code, out, err = run_here("caption", video, "--max-new-tokens", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 6
    assert all(re.match(rf"00:00:0{i}\.000  ", line) for i, line in enumerate(lines))
    code, out, err = run_here("caption", video, "--max-new-tokens", "3", "--json", "--fps", "0.5")
    made = [json.loads(line) for line in out.splitlines()]
    assert [line["time"] for line in made] == [0, 2, 4]
    assert set(made[0]) == {
        "time", "end", "index", "caption", "carried", "digest", "drops", "skipped", "frames", "name", "stop_reason",
        "at", "usage",
    }  # fmt: skip
    assert [Caption.from_dict(line).to_dict() for line in made] == made


def test_files_that_are_there_are_kept_unless_told_otherwise(no_model: FakeRuntime, video: Path) -> None:
    short = ("--max-new-tokens", "2")
    assert run_here("caption", video, "-o", "a.jsonl", "-o", "a.srt", *short)[0] == 0
    before = Path("a.srt").read_text(), Path("a.jsonl").read_text()
    assert "a.jsonl is there already" in refused("caption", video, "-o", "a.jsonl", *short, code=2)
    assert "a.srt is there already" in refused("caption", video, "-o", "b.jsonl", "-o", "a.srt", *short, code=2)
    told = refused("caption", video, "-o", "a.jsonl", "-o", "a.srt", "--resume", "--ask", "Else?", *short)
    assert "other settings" in told
    assert (Path("a.srt").read_text(), Path("a.jsonl").read_text()) == before
    n_requests = no_model.engine.n_requests
    assert run_here("caption", video, "-o", "a.jsonl", "-o", "a.vtt", "--resume", *short) == (0, "", "")
    assert no_model.engine.n_requests == n_requests
    assert Path("a.jsonl").read_text() == before[1]
    assert len(webvtt.read("a.vtt").captions) == 6
    assert run_here("caption", video, "-o", "a.jsonl", "--overwrite", "--every", "2s", *short)[0] == 0
    assert len(captions_in(Path("a.jsonl"))) == 3


def test_resume_never_empties_what_it_cannot_make_again(no_model: FakeRuntime, video: Path) -> None:
    """Without the journal of the first run, with a mistyped name, or with somebody else's file."""
    short = ("--max-new-tokens", "2")
    assert run_here("caption", video, "-o", "a.srt", *short)[0] == 0
    made = Path("a.srt").read_text()
    told = refused("caption", video, "-o", "a.srt", *short, code=2)
    assert "a.srt is there already: --overwrite begins anew" in told
    told = refused("caption", video, "-o", "a.srt", "-o", "a.jsonl", "--resume", *short, code=2)
    assert "a.srt is there, but not a.jsonl, from which --resume goes on" in told
    for content in ("precious", '{"id": 0}\nprecious'):
        Path("theirs.jsonl").write_text(content)
        told = refused("caption", video, "-o", "theirs.jsonl", "--resume", *short)
        assert "line 1 is no caption" in told
        assert Path("theirs.jsonl").read_text() == content
    assert Path("a.srt").read_text() == made


def test_a_page_of_captions_that_were_made_without_one_has_no_broken_pictures(
    no_model: FakeRuntime, video: Path
) -> None:
    short = ("--max-new-tokens", "2")
    assert run_here("caption", video, "-o", "a.jsonl", *short)[0] == 0
    assert run_here("caption", video, "-o", "a.jsonl", "-o", "a.html", "--resume", *short)[0] == 0
    page = Path("a.html").read_text()
    assert page.count("<figure>") == 6
    assert "<img" not in page


def test_resume_notices_another_source(no_model: FakeRuntime, video: Path) -> None:
    assert run_here("caption", video, "-o", "a.jsonl", "--max-new-tokens", "2")[0] == 0
    make_video(Path("other.mkv"), [colour("gray", (112, 84))] * 9, rate=5)
    assert "another source" in refused("caption", "other.mkv", "-o", "a.jsonl", "--resume", "--max-new-tokens", "2")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--every", "2s", "--fps", "1"), "give one"),
        (("--official", "--every", "2s"), "give one"),
        (("--every", "soon"), "--every: 'soon' is no time"),
        (("--fps", "0"), "--fps is 0"),
        (("--fps", "-1"), "--fps is -1"),
        (("--changed", "2"), "--changed is 2"),
        (("-o", "a.txt"), "a.txt: the name must end in .jsonl, .srt, .vtt, .csv, .html"),
        (("-o", "a.srt", "-o", "a.srt"), "named twice"),
        (("-o", "a.jsonl", "-o", "b.jsonl"), "two of them are .jsonl"),
        (("--resume",), "--resume goes on from a .jsonl file"),
        (("--resume", "-o", "a.srt"), "--resume goes on from a .jsonl file"),
        (("--resume", "--overwrite", "-o", "a.jsonl"), "give one"),
        (("--resume", "-o", "a.jsonl", "--when", "yes", "--story", "2"), "--story needs them all"),
        (("--exec", "no-such-program-here"), "no program of that name"),
        (("--exec", "'"), "no command"),
        (("--top-p", "7"), "--top-p is 7"),
    ],
)
def test_wrong_usage_says_what_is_wrong(no_model: FakeRuntime, video: Path, words: tuple[str, ...], told: str) -> None:
    assert told in refused("caption", video, *words, code=2)


@pytest.mark.parametrize("source", ["nothing.mp4", "*.png", "gopher://x/y", "/dev/video99", "http://127.0.0.1:9/"])
def test_a_source_that_is_not_there_is_a_failure(no_model: FakeRuntime, source: str) -> None:
    assert "mmchat:" in refused("caption", source, code=1)


def test_when_keeps_matches_and_exec_runs_for_them(no_model: FakeRuntime, video: Path) -> None:
    no_model.engine.script = ["No.", "So, YES", "yesterday", "yes", "$(touch pwned)", "yes; touch pwned"]
    script = "import os; print(os.environ['MMCHAT_CAPTION'], file=open('got', 'a'))"
    words = ("--when", "yes", "--exec", f'{sys.executable} -c "{script}"', "-o", "a.jsonl", "--json")
    code, out, err = run_here("caption", video, *words)
    assert (code, err) == (0, "")
    assert [json.loads(line)["caption"] for line in out.splitlines()] == ["So, YES", "yes", "yes; touch pwned"]
    assert [line["index"] for line in captions_in(Path("a.jsonl"))] == [5, 15, 25]
    assert Path("got").read_text().splitlines() == ["So, YES", "yes", "yes; touch pwned"]
    assert not Path("pwned").exists()


def test_exec_does_not_run_for_what_was_carried(no_model: FakeRuntime, video: Path) -> None:
    script = "open('got', 'a').write('x')"
    run_here("caption", video, "--every", "0", "--changed", "0.1", "--exec", f'{sys.executable} -c "{script}"')
    assert Path("got").read_text() == "x" * 6
    code, _, err = run_here("caption", video, "--every", "3s", "--exec", "false")
    assert (code, err) == (0, "mmchat: false ended with exit code 1\n" * 2)


def test_bad_frames_are_told_and_the_rest_is_captioned(no_model: FakeRuntime, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.png").write_bytes(b"rubbish")
    colour("red").save(folder / "60.png")
    code, out, err = run_here("caption", folder, "--json", "--max-new-tokens", "2")
    assert code == 0
    assert [json.loads(line)["skipped"] for line in out.splitlines()] == [60]
    assert json.loads(out)["name"] == "60.png"
    told = err.splitlines()
    assert len(told) == 21
    assert told[0].startswith("mmchat: frame 0 (00:00:00.000) skipped: ")
    assert told[-1] == "mmchat: 40 more of these were not shown"
    (folder / "60.png").unlink()
    code, out, err = run_here("caption", folder)
    assert (code, out) == (1, "")
    assert "not one frame could be read" in err


def test_a_file_cut_anywhere_ends_as_documented(no_model: FakeRuntime, video: Path) -> None:
    data = video.read_bytes()
    rng = random.Random(5)
    codes = set()
    for _ in range(many(6, 100)):
        Path("cut.mkv").write_bytes(data[: rng.randrange(len(data))])
        code, out, err = run_here("caption", "cut.mkv", "--max-new-tokens", "1")
        assert "Traceback" not in err
        assert (code, bool(out)) in ((0, True), (1, False)), err
        assert all(line.startswith("mmchat: ") for line in err.splitlines())
        codes.add(code)
    assert 0 in codes


def test_ctrl_c_ends_it_in_order(tmp_path: Path, video: Path) -> None:
    make_video(tmp_path / "long.mkv", [distinct(i, (56, 42)) for i in range(2000)], codec="ffv1", form="bgr0")
    out = tmp_path / "out.jsonl"
    process = caption_child(
        tmp_path / "store", tmp_path / "long.mkv", "--every", "0", "-o", out, "-o", tmp_path / "a.srt"
    )
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, b"", b"mmchat: interrupted\n")
    assert len(list(srt.parse((tmp_path / "a.srt").read_text()))) == len(captions_in(out))


def test_notices_of_a_long_run_are_told_again_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [1000.0], list[str]()
    monkeypatch.setattr("mmchat.cli.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("mmchat.cli.progress.say", said.append)
    with View(Arrays([], rate=1), show=False) as view:
        for number in range(25):
            view.notice(f"broke off {number}")
        now[0] += 61
        view.notice("broke off again")
    assert said[-3:] == ["broke off 19", "broke off again", "5 more of these were not shown"]


# At a terminal


def at_terminal(store: Path, *words: str | Path) -> tuple[int, str]:
    """Exit code, and what a person sees on stderr, cursor movements included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    command = [sys.executable, "-m", "tests.caption_child", str(store), "caption", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(ours, 65536):
            seen += data
    os.close(ours)
    return process.wait(60), seen.decode()


def test_a_file_has_a_bar_and_the_time_that_is_left(tmp_path: Path, video: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        colour(COLOURS[i % 6]).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "7.png").write_bytes(b"rubbish")
    code, seen = at_terminal(tmp_path / "store", tmp_path / "pictures", "-o", tmp_path / "a.srt")
    assert code == 0
    assert re.search(r"19 captions.*100%.*0:00:00.*left", seen)
    assert "mmchat: frame 7 (00:00:07.000) skipped" in seen
    assert "Traceback" not in seen


def test_a_stream_has_a_line_of_counts(tmp_path: Path) -> None:
    pictures = [distinct(i, (96, 64)) for i in range(75)]
    camera = Camera(make_video(tmp_path / "a.ts", pictures, g="10"), ["send"])
    try:
        code, seen = at_terminal(
            tmp_path / "store",
            camera.address,
            "--every",
            "0",
            "--max-frames",
            "5",
            "--when",
            "yes",
            "-o",
            tmp_path / "a.srt",
        )
    finally:
        camera.close()
    assert code == 0
    assert re.search(r"5 captions(, \d kept)?, \d+ frames passed over, \d+\.\d s for the last", seen)
