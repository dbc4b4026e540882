"""Files of captions, read back by other people's parsers; the journal; matches and commands."""

from __future__ import annotations

import contextlib
import csv
import html.parser
import json
import os
import re
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from mmchat.errors import VideoError
from mmchat.record import Usage
from mmchat.video import Caption
from mmchat.video.journal import Journal
from mmchat.video.matches import Command, matches
from mmchat.video.outputs import SUFFIXES, open_output
from mmchat.video.values import clock

TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        ["A red square.", "two\n\nlines", "1\n00:00:01,000 --> 00:00:02,000\nfake", "<b>bold</b> & <script>", "a --> b",
         "WEBVTT", "NOTE this", "NUL \0 and \x1b[31m", "line\u2028sep", "", " ", "😀 é 漢"]
    ),
)  # fmt: skip


@st.composite
def runs(draw: st.DrawFn) -> list[Caption]:
    """Captions as the loop makes them: times grow, a carried one repeats the text."""
    made: list[Caption] = []
    time = 0.0
    for index in range(draw(st.integers(1, 8))):
        carried = bool(made) and draw(st.booleans())
        length = draw(st.sampled_from([0.0, 0.04, 1.0, 59.9996, 3600.0, 360_000.0]))
        text = made[-1].text if carried else draw(TEXTS)
        made.append(
            Caption(
                round(time, 6), round(time + length, 6), index * 25, text, carried, f"{index + 16:x}".ljust(64, "0"),
                drops=index, usage=Usage(n_prompt=index, total_s=0.5), at=1.5 if index % 2 else None, name="a<b>.png",
            )
        )  # fmt: skip
        time += length * draw(st.sampled_from([1.0, 0.5, 2.0]))
    return made


def stretches(made: list[Caption]) -> list[Caption]:
    """What subtitles should show: carried captions lengthen the one before; no two overlap."""
    merged: list[Caption] = []
    for caption in made:
        if caption.carried:
            merged[-1] = replace(merged[-1], end=max(merged[-1].end, caption.end))
        else:
            if merged and merged[-1].end > caption.time:
                merged[-1] = replace(merged[-1], end=caption.time)
            merged.append(caption)
    return merged


def shown(text: str) -> str:
    return " ".join(text.split()).replace("-->", "->") or "-"


def written(made: list[Caption], path: Path) -> str:
    output = open_output(path, "a <title>")
    for caption in made:
        output.write(caption)
    output.close()
    return path.read_bytes().decode()


@given(made=runs())
def test_srt_is_what_another_parser_reads(made: list[Caption], tmp_path_factory: pytest.TempPathFactory) -> None:
    text = written(made, tmp_path_factory.mktemp("srt") / "a.srt")
    cues = list(srt.parse(text))
    wanted = stretches(made)
    assert [cue.index for cue in cues] == list(range(1, len(wanted) + 1))
    assert [cue.content for cue in cues] == [shown(caption.text) for caption in wanted]
    for cue, caption in zip(cues, wanted, strict=True):
        assert abs(cue.start - timedelta(seconds=caption.time)) <= timedelta(milliseconds=1)
        assert abs(cue.end - timedelta(seconds=caption.end)) <= timedelta(milliseconds=2)
        assert cue.end > cue.start


@given(made=runs())
def test_vtt_is_what_another_parser_reads(made: list[Caption], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("vtt") / "a.vtt"
    text = written(made, path)
    wanted = stretches(made)
    cues = webvtt.read(str(path)).captions
    assert len(cues) == len(wanted)
    for cue, caption in zip(cues, wanted, strict=True):
        assert html.unescape(cue.raw_text) == shown(caption.text)
        assert cue.start == clock(caption.time)
        assert cue.end == clock(max(caption.end, caption.time + 0.001))
    body = text.removeprefix("WEBVTT\n\n")
    assert body.count("-->") == len(wanted)
    assert not re.search("<(?!$)", body)


@given(made=runs())
def test_csv_has_a_row_per_caption(made: list[Caption], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    written(made, path)
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == [caption.text for caption in made]
    assert [float(row["time"]) for row in rows] == [caption.time for caption in made]
    assert [row["carried"] for row in rows] == [str(caption.carried) for caption in made]
    assert [row["at"] for row in rows] == ["" if caption.at is None else str(caption.at) for caption in made]


class Page(html.parser.HTMLParser):
    """The pictures, the texts of the paragraphs, and every tag of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
        if tag == "p":
            self.texts.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


@given(made=runs())
def test_the_page_shows_text_as_text(made: list[Caption], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("html") / "a.html"
    page = Page(written([replace(caption, thumbnail=caption.digest.encode()) for caption in made], path))
    wanted = stretches(made)
    assert page.texts == [caption.text for caption in wanted]
    assert set(page.tags) == {
        "html", "meta", "title", "style", "h1", "main", "figure", "img", "figcaption", "time", "small", "p",
    }  # fmt: skip
    assert [(path.parent / src).read_bytes() for src in page.pictures] == [c.digest.encode() for c in wanted]


@pytest.mark.parametrize("name", ["door #1 50%? & more", "cam:1", 'a "b"'])
def test_the_page_finds_its_pictures_whatever_its_name(name: str, tmp_path: Path) -> None:
    made = [Caption(0.0, 1.0, 0, "A cat.", False, "d" * 64, thumbnail=b"jpeg")]
    path = tmp_path / f"{name}.html"
    (src,) = Page(written(made, path)).pictures
    address = urljoin(path.as_uri(), src)  # as a browser does
    assert Path(unquote(urlsplit(address).path)).read_bytes() == b"jpeg"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_are_whole_after_every_caption(suffix: str, tmp_path: Path) -> None:
    """Whatever is written next, and even where it is killed then."""
    made = [Caption(i, i + 1.0, i, f"text {i // 2}", bool(i % 2), f"{i + 16:x}".ljust(64, "0")) for i in range(6)]
    output = open_output(tmp_path / f"a{suffix}", "a <title>")
    for n, caption in enumerate(made, 1):
        output.write(caption)
        assert (tmp_path / f"a{suffix}").read_bytes().decode() == written(made[:n], tmp_path / f"b{suffix}").replace(
            "b_f", "a_f"
        )
    output.close()


# The journal

ONE = Caption(1.0, 2.0, 25, "A red square.", False, "ab" * 32, usage=Usage(n_prompt=44), stop_reason="length", at=7.25)


def begun(path: Path, *captions: Caption) -> None:
    """A run that wrote these and ended."""
    with contextlib.closing(Journal(path, "r", resume=False)) as journal:
        for caption in captions or (ONE,):
            journal.write(caption)


def lines(path: Path, run: str = "r") -> list[Caption]:
    with contextlib.closing(Journal(path, run, resume=True)) as journal:
        return list(journal.captions())


@given(made=runs())
def test_a_journal_gives_back_what_it_was_given(made: list[Caption], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("journal") / "a.jsonl"
    begun(path, *made)
    assert lines(path) == made
    assert [json.loads(line)["caption"] for line in path.read_text().split("\n")[:-1]] == [c.text for c in made]


def test_a_line_that_was_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    begun(path, *(replace(ONE, index=index) for index in range(3)))
    data = path.read_bytes()
    ends = [i + 1 for i in range(len(data)) if data[i : i + 1] == b"\n"]
    for size in [*range(0, len(data), 13), *(end - 1 for end in ends), *ends]:
        path.write_bytes(data[:size])
        n_whole = sum(end <= size for end in ends)
        assert [caption.index for caption in lines(path)] == list(range(n_whole))
        assert path.read_bytes() == data[: ends[n_whole - 1] if n_whole else 0]


def test_a_very_long_tail_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    begun(path)
    with path.open("ab") as file:
        file.write(b"\0" * 200_000)
    assert lines(path) == [ONE]


def test_what_was_written_by_a_run_is_not_given_to_it(tmp_path: Path) -> None:
    begun(tmp_path / "a.jsonl")
    journal = Journal(tmp_path / "a.jsonl", "r", resume=True)
    reading = journal.captions()
    journal.write(replace(ONE, index=26))
    assert list(reading) == [ONE]
    journal.close()
    assert len(lines(tmp_path / "a.jsonl")) == 2


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    begun(tmp_path / "a.jsonl")
    Journal(tmp_path / "a.jsonl", "r", resume=False).close()
    assert lines(tmp_path / "a.jsonl") == []


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", "r", resume=True)
    journal.write(ONE)
    with pytest.raises(VideoError, match="another run is writing it"):
        Journal(tmp_path / "a.jsonl", "r", resume=False)
    journal.close()
    assert lines(tmp_path / "a.jsonl") == [ONE]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    begun(tmp_path / "a.jsonl")
    with pytest.raises(VideoError, match="line 1 was made with other settings"):
        lines(tmp_path / "a.jsonl", "s")


@pytest.mark.parametrize(
    "line",
    ["", "rubbish", "[]", "7", "{}", '{"run": "r"}', '{"run": "r", "time": 0}', "[" * 100_000,
     json.dumps({**ONE.to_dict(), "run": "r", "time": "now"}), json.dumps({**ONE.to_dict(), "run": "r", "index": None}),
     json.dumps({**ONE.to_dict(), "run": "r", "usage": 7})],
)  # fmt: skip
def test_a_line_that_is_no_caption_is_told(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    begun(path)
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(VideoError, match="line 2 is no caption"):
        lines(path)


# Matches


@pytest.mark.parametrize(
    ("text", "wanted", "there"),
    [
        ("Yes.", "yes", True),
        ("The circle is red, so YES", "yes", True),
        ("yesterday", "yes", False),
        ("Eyes", "yes", False),
        ("No.", "yes", False),
        ("a red  car", "red car", False),
        ("a red car!", " red car ", True),
        ("50% (approx.)", "50%", True),
        ("a.b", "a+b", False),
        ("été", "Été", True),
        ("", "yes", False),
        ("图中有人。", "有人", True),
        ("사람이 있다", "사람", True),
        ("눈사람이 있다", "사람", False),
        ("질문이 있다", "문", False),
        ("который час", "кот", False),
        ("voituré", "voiture", False),
    ],
)
def test_words_match_as_words(text: str, wanted: str, there: bool) -> None:
    assert matches(text, wanted) is there


HOSTILE = "$(touch pwned); `touch pwned` | touch pwned && touch pwned\ntouch pwned\n' \" \\ --help\0"


def test_a_command_gets_the_caption_and_no_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = (
        "import json, os, sys; given = json.load(sys.stdin);"
        "json.dump([sys.argv[1:], given, dict(os.environ)], open('got', 'w'))"
    )
    command = Command(f'{sys.executable} -c "{script}" one "two three" $HOME')
    assert command.run(replace(ONE, text=HOSTILE, name="b$(c).png")) is None
    words, given, variables = json.loads((tmp_path / "got").read_text())
    assert words == ["one", "two three", "$HOME"]
    assert given == replace(ONE, text=HOSTILE, name="b$(c).png").to_dict()
    assert variables["MMCHAT_CAPTION"] == HOSTILE.replace("\0", "")
    assert (variables["MMCHAT_TIME"], variables["MMCHAT_INDEX"]) == ("1.0", "25")
    assert sorted(os.listdir()) == ["got"]


def test_a_command_that_fails_hangs_or_vanishes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmchat.video.matches.COMMAND_S", 0.3)
    assert Command("false").run(ONE) == "false ended with exit code 1"
    assert Command("sleep 100").run(ONE) == "sleep did not end within 0.3 s and was killed"
    program = tmp_path / "program"
    program.write_text("#!/nothing\n")
    program.chmod(0o755)
    command = Command(str(program))
    assert "No such file" in (command.run(ONE) or "")
    assert Command("true").run(replace(ONE, text="x" * 1_000_000)) is not None  # more than a variable holds


@pytest.mark.parametrize("line", ["", "  ", "no-such-program-here", "'open"])
def test_what_is_no_command_is_refused(line: str) -> None:
    with pytest.raises(VideoError, match=r"no command|no program"):
        Command(line)
