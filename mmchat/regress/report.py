"""What a run of the kit has found, as text, JSON and JUnit XML."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from xml.etree import ElementTree

from mmchat import __version__
from mmchat.checkpoint import write_atomic
from mmchat.regress.broken import PROPERTIES
from mmchat.regress.trial import Failure

if TYPE_CHECKING:
    from mmchat.regress.hunt import Outcome

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # what XML cannot hold


def to_dict(outcome: Outcome, saved: Path | None) -> dict[str, Any]:
    """saved: where the failing conversation is."""
    return {
        "mmchat": __version__,
        "passed": outcome.good,
        **outcome.facts,
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "conversations": outcome.n_talks,
        "turns": outcome.n_turns,
        "requests": outcome.n_requests,
        "longest_prompt": outcome.longest,
        "most_rows": outcome.most_rows,
        "failure": _failure(outcome.failure),
        "flaky": [_failure(failure) for failure in outcome.flaky],
        "replay": str(saved) if saved else None,
    }


def to_text(outcome: Outcome, saved: Path | None, options: Sequence[str] = ()) -> str:
    """options: of the command, that a replay needs, too."""
    found = outcome.facts
    lines = [
        ("model", f"{found['model']}, {found['context_rows']} rows of context"),
        ("strategy", ", ".join(found.get("strategies", [found["strategy"]]))),
        ("played", f"{outcome.n_talks} conversations, {outcome.n_turns} turns, {outcome.n_requests} answers"),
        ("longest", f"a prompt of {outcome.longest} rows{_cut(outcome.most_rows)}"),
        ("seconds", f"{outcome.seconds:g}{'' if outcome.seed is None else f', seed {outcome.seed}'}"),
    ]
    if outcome.failure:
        failure = outcome.failure
        lines += [
            ("FAILED", f"{PROPERTIES[failure.name]}; but"),
            ("", failure.what),
            *(("", line) for talk in failure.talks for line in _steps(talk.to_dict())),
        ]
        if saved:
            again = ["mmchat", "regress", "--model", found["folder"], *options, "--replay", str(saved)]
            lines.append(("again with", shlex.join(again)))
    lines += [("flaky", f"seen once, and not again on new workers: {flaky.what}") for flaky in outcome.flaky]
    lines.append(("verdict", "passed" if outcome.good else "failed" if outcome.failure else "flaky"))
    return "\n".join(f"{name:12}{text}".rstrip() for name, text in lines)


def to_junit(outcome: Outcome) -> bytes:
    """One test case per property; a flaky one fails with type "flaky"."""
    failures = [*([outcome.failure] if outcome.failure else []), *outcome.flaky]
    failed = {failure.name for failure in failures}
    suite = ElementTree.Element(
        "testsuite",
        name="mmchat.regress",
        tests=str(len(PROPERTIES)),
        failures=str(len(failed)),
        errors="0",
        skipped="0",
        time=f"{outcome.seconds:g}",
    )
    listed = ElementTree.SubElement(suite, "properties")
    for name, value in {**outcome.facts, "seed": outcome.seed}.items():
        ElementTree.SubElement(listed, "property", name=name, value=_clean(str(value)))
    for name, title in PROPERTIES.items():
        case = ElementTree.SubElement(suite, "testcase", classname="mmchat.regress", name=title, time="0")
        mine = [failure for failure in failures if failure.name == name][:1]
        for failure in mine:
            kind = "failed" if failure is outcome.failure else "flaky"
            element = ElementTree.SubElement(case, "failure", message=_clean(failure.what), type=kind)
            element.text = _clean(json.dumps([talk.to_dict() for talk in failure.talks], indent=2))
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    data: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return data


def write(path: Path, data: bytes) -> None:
    """Raises OSError."""

    def put(file: IO[bytes]) -> None:
        file.write(data)

    write_atomic(path, put)


def _failure(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {
        "property": failure.name,
        "means": PROPERTIES[failure.name],
        "what": failure.what,
        "rows": failure.rows or None,
        "talks": [talk.to_dict() for talk in failure.talks],
    }


def _steps(talk: dict[str, Any]) -> list[str]:
    return [f"{number}. {json.dumps(step, ensure_ascii=True)}" for number, step in enumerate(talk["steps"], 1)]


def _cut(most_rows: int | None) -> str:
    return "" if most_rows is None else f"; above {most_rows} they take too long for the time: give more --minutes"


def _clean(text: str) -> str:
    return _CONTROL.sub("�", text)
