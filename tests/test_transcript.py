"""Conversations as HTML, Markdown and JSON: everything is there, nothing of it is markup."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmchat.bundle import SavedImage, SavedModel, SavedRecord, SavedSettings, SavedTurn
from mmchat.errors import BundleError, SessionError
from mmchat.transcript import export, to_html
from tests.test_bundle import digest
from tests.test_session import picture, png

NASTY = "</p><script>alert(1)</script><img src=x onerror=alert(1)> & \"quotes\" 'single' <!-- ]]> &lt;"


def tiff() -> bytes:
    file = io.BytesIO()
    picture("green").save(file, "TIFF")
    return file.getvalue()


PNG = png(picture("red"))
FILES = {"img1": PNG, "img2": tiff(), "img3": b"<svg onload=alert(1)>", "img4": None}


def image(number: int, name: str = "a.png") -> SavedImage:
    return SavedImage(f"img{number}", (56, 42), name, 9, False, (digest(b""),))


def file_of(image: SavedImage) -> bytes:
    data = FILES[image.id]
    if data is None:
        raise BundleError("not kept")
    return data


def record(*turns: SavedTurn, system: str | None = None) -> SavedRecord:
    return SavedRecord(SavedSettings(system), SavedModel("demo <b>"), turns)


def turn(*parts: str | SavedImage, text: str = "Red.", reason: str = "stop") -> SavedTurn:
    return SavedTurn(parts, text, (1,), reason, {"n_new": 1})  # type: ignore[arg-type]


TALK = record(
    turn(image(1, f"{NASTY}.png"), "What?"),
    turn(NASTY, image(2), text=NASTY, reason="length"),
    turn(image(3), image(4), image(1, f"{NASTY}.png"), "And\nthese?", reason="cancelled"),
    system=f"Be brief. {NASTY}",
)


class Page(HTMLParser):
    """What a browser makes of it: elements with their attributes, and the text."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(record: SavedRecord) -> Page:
    return Page("".join(to_html(record, file_of)))


def test_html(tmp_path: Path) -> None:
    missing = export(TALK, file_of, tmp_path / "talk.html")
    assert missing == [
        "img3 is not shown (img3: not a picture (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM can be read))",
        "img4 is not shown (not kept)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.html"]
    found = Page((tmp_path / "talk.html").read_text(encoding="utf-8"))
    for text in (NASTY, "What?", "And\nthese?", "Be brief.", "cut at the length limit", "stopped", "demo <b>, 3 turns"):
        assert text in found.text
    assert len(found.all("section")) == 3
    shown = [base64.b64decode(str(a["src"]).split(",", 1)[1]) for a in found.all("img")]
    assert shown[0] == PNG
    assert Image.open(io.BytesIO(shown[1])).format == "PNG"  # no browser shows TIFF
    assert len(shown) == 2
    assert found.all("img")[0]["alt"] == f"img1: {NASTY}.png, 56x42"
    assert found.all("a") == [{"href": "#img1"}]  # the second time it is there already


def only_what_we_write(found: Page) -> None:
    """No element and no attribute comes from a text, and nothing is fetched."""
    known = {
        "html",
        "meta",
        "title",
        "style",
        "main",
        "section",
        "div",
        "p",
        "figure",
        "img",
        "figcaption",
        "footer",
        "a",
    }
    assert {tag for tag, _ in found.elements} <= known
    for tag, attributes in found.elements:
        assert set(attributes) <= {
            "lang",
            "charset",
            "content",
            "name",
            "http-equiv",
            "id",
            "class",
            "alt",
            "src",
            "href",
        }
        assert tag != "img" or re.match(
            r"data:image/(png|jpeg|webp|gif|bmp);base64,[A-Za-z0-9+/=]+$", str(attributes["src"])
        )
        assert tag != "a" or re.fullmatch("#img[0-9]+", str(attributes["href"]))
    (policy,) = [a for a in found.all("meta") if "http-equiv" in a]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_control_characters_are_seen() -> None:
    assert "a\\x1b[31m\\x202eb\nc" in page(record(turn("a\x1b[31m\u202eb\nc"))).text


def test_nothing_in_a_text_is_markup() -> None:
    only_what_we_write(page(TALK))


markup = st.text(st.sampled_from("<>&\"'/=!-]p imgscript#x27;\n"), max_size=40)


@given(markup, markup, markup, markup)
def test_no_text_is_markup(question: str, answer: str, system: str, name: str) -> None:
    found = page(record(turn(question, image(1, name), image(4, name), text=answer), system=system))
    only_what_we_write(found)
    for text in (question, answer, system):
        assert text in found.text
    assert len(found.all("img")) == 1


@pytest.mark.parametrize("suffix", ["md", "json"])
def test_pictures_lie_beside(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"my talk.{suffix}"
    missing = export(TALK, file_of, out)
    assert len(missing) == 2
    folder = tmp_path / "my talk.pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["img1.png", "img2.png"]
    assert (folder / "img1.png").read_bytes() == PNG
    text = out.read_text()
    if suffix == "md":
        assert text.count("](my%20talk.pictures/img1.png)") == 2
        assert "[img4: a.png, 56x42]\n" in text
    else:
        shown = json.loads(text)
        assert shown["system"].startswith("Be brief.")
        assert shown["model"] == "demo <b>"
        parts = shown["turns"][2]["user"]
        assert [part.get("file") for part in parts] == [None, None, "my talk.pictures/img1.png", None]
        assert shown["turns"][1]["assistant"] == NASTY
        assert shown["turns"][1]["usage"] == {"n_new": 1}


def test_markdown_of_others_brings_no_html_no_pictures_and_no_commands(tmp_path: Path) -> None:
    nasty = "**a\x1b]0;owned\x07\n\n<img src=http://x/t.png onerror=1> ![p](http://x/y.png) & so"
    export(record(turn(nasty, text=nasty), system=nasty), file_of, tmp_path / "talk.md")
    text = (tmp_path / "talk.md").read_text()
    assert not {found for found in ("\x1b", "<img", "![") if found in text}
    assert text.count("&lt;img src=http://x/t.png onerror=1> !\\[p](http://x/y.png) &amp; so") == 3
    question = [line for line in text.splitlines() if line.startswith(">")]
    assert len(question) == 3  # the blank line too: the question ends where the quotation does


def test_a_conversation_without_pictures_needs_no_folder(tmp_path: Path) -> None:
    assert export(record(turn("What?")), file_of, tmp_path / "talk.md") == []
    assert [path.name for path in tmp_path.iterdir()] == ["talk.md"]


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    for name in ("talk.pdf", "talk", "talk.html.exe"):
        with pytest.raises(SessionError, match=r"must end in .json, .md or .html"):
            export(TALK, file_of, tmp_path / name)
    (tmp_path / "file").touch()
    for name in ("none/talk.html", "none/talk.md", "file/talk.json"):
        with pytest.raises(SessionError, match="cannot be written"):
            export(TALK, file_of, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
