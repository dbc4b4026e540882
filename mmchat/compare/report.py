"""A comparison as files: compare.json, compare.csv, and compare.html, one page with small pictures in it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mmchat.checkpoint import write_atomic
from mmchat.compare.facts import Answers, Compared, summary
from mmchat.images import read_image

_THUMBNAIL = (320, 320)
_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .4rem 0 1rem; }
th { white-space: nowrap; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
section { display: flex; gap: 1.5rem; padding: 1.2rem 0; border-top: 2px solid #ccc; flex-wrap: wrap; }
section > img { max-width: 320px; height: auto; align-self: flex-start; }
section > div { flex: 1 1 24rem; min-width: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1rem 0 0; } small { color: #555; } mark { background: #ffe08a; }
"""


def save(found: Sequence[Compared], a: str, b: str, pictures: dict[str, Path], folder: Path) -> list[Path]:
    """Write the three files; a, b: what the models are called.  pictures: by name.  Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "compare.json": json.dumps(to_dict(found, a, b), indent=1, ensure_ascii=False) + "\n",
        "compare.csv": _csv(found),
        "compare.html": _page(found, a, b, pictures),
    }
    for name, text in contents.items():
        data = text.encode("utf-8", "backslashreplace")
        write_atomic(folder / name, lambda file, data=data: file.write(data))
    return [folder / name for name in contents]


def to_dict(found: Sequence[Compared], a: str, b: str) -> dict[str, Any]:
    return {"a": a, "b": b, "summary": summary(found), "compared": [one.to_dict() for one in found]}


def rows(found: Sequence[Compared]) -> list[tuple[str, str]]:
    """The summary, for people."""
    sums = summary(found)
    lines = [
        ("pictures, questions", f"{sums['pictures']}, {sums['questions']}"),
        ("cosine of embeddings", f"least {_figure(sums['least_cosine'], 7)}, mean {_figure(sums['mean_cosine'], 7)}"),
        ("largest difference", _figure(sums["max_error"], 6)),
        ("of slices", str(sums["slices"])),
        ("same answers", f"{sums['same_answers']} of {sums['answers']}"),
        ("equal tokens", _figure(sums["mean_agreement"], 3)),
        ("earliest divergence", "none" if sums["first_divergence"] is None else f"token {sums['first_divergence']}"),
        ("similarity of texts", _figure(sums["mean_similarity"], 3)),
        ("seconds", f"{sums['seconds_a']:.1f} and {sums['seconds_b']:.1f}"),
    ]
    if sums["mean_agreement"] is None:  # other tokens
        lines = [line for line in lines if line[0] not in ("equal tokens", "earliest divergence")]
    if not sums["answers"]:  # encoders
        lines = [("pictures", str(sums["pictures"])), *lines[1:4]]
    if sums["cut_differently"]:
        lines.insert(4, ("pictures that were cut differently", str(sums["cut_differently"])))
    if sums["judged_a"] is not None:
        lines.append(("CLIP score", f"{sums['judged_a']:.2f} and {sums['judged_b']:.2f}"))
    return lines


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _csv(found: Sequence[Compared]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        ("picture", "question", "slices", "least_cosine", "max_error", "same", "agreement", "diverges_at", "similarity",
         "judged_a", "judged_b", "answer_a", "answer_b")
    )  # fmt: skip
    for one in found:
        answers, cosines, errors = one.answers, one.slices.cosines or (), one.slices.max_errors or ()
        said: tuple[object, ...] = ("",) * 8
        if answers:
            said = (int(answers.same), _blank(answers.agreement), _blank(answers.diverges_at), answers.similarity,
                    _blank(answers.a.judged), _blank(answers.b.judged), answers.a.text, answers.b.text)  # fmt: skip
        writer.writerow(
            (one.picture, one.question, len(cosines), min(cosines, default=""), max(errors, default=""), *said)
        )
    return out.getvalue()


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _page(found: Sequence[Compared], a: str, b: str, pictures: dict[str, Path]) -> str:
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows(found))
    title = f"{a} and {b}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><table>{table}</table>",
    ]
    for name, group in groupby(found, key=lambda one: one.picture):
        asked = list(group)
        cosines = ", ".join(f"{value:.5f}" for value in asked[0].slices.cosines or ()) or "cut differently"
        parts.append(
            f'<section><img src="{_thumbnail(pictures[name])}" alt="{html.escape(name)}"><div>'
            f"<small>{html.escape(name)}; cosine of each slice: {cosines}</small>"
        )
        for one in asked:
            if one.answers is None:
                continue
            lines = _answer(a, one.answers, 0) + _answer(b, one.answers, 1)
            parts.append(f"<h2>{html.escape(one.question)}</h2><table>{lines}</table>")
        parts.append("</div></section>")
    return "\n".join([*parts, "</html>\n"])


def _answer(name: str, answers: Answers, which: int) -> str:
    """With what comes after the common beginning marked."""
    said, other = (answers.a, answers.b)[which], (answers.b, answers.a)[which]
    n = next((i for i, (x, y) in enumerate(zip(said.text, other.text, strict=False)) if x != y), None)
    if n is None:
        n = min(len(said.text), len(other.text))
    rest = f"<mark>{html.escape(said.text[n:])}</mark>" if said.text[n:] else ""
    judged = f" <small>CLIP {said.judged:.2f}</small>" if said.judged is not None else ""
    return f"<tr><th>{html.escape(name)}</th><td>{html.escape(said.text[:n])}{rest}{judged}</td></tr>"


def _thumbnail(path: Path) -> str:
    """As a data: address, so that the page is one file."""
    image = read_image(path)
    image.thumbnail(_THUMBNAIL)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
