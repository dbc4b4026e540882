"""mmchat regress."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmchat.cli.options import Opening, UsageError, say
from mmchat.errors import RegressError
from mmchat.profile import state_folder
from mmchat.regress import report, talk
from mmchat.regress.talk import STORE_BYTES

if TYPE_CHECKING:
    from mmchat.regress.hunt import Outcome


@dataclass(frozen=True)
class Wanted:
    """What to do and to write; see the options of `mmchat regress`."""

    minutes: float
    seed: int | None
    database: Path | None
    report: Path | None
    junit: Path | None
    save: Path
    replay: Path | None
    as_json: bool


def regress(opening: Opening, wanted: Wanted) -> None:
    if not wanted.minutes > 0:
        raise UsageError(f"--minutes is {wanted.minutes:g}; it must be more than 0")
    try:
        talks = talk.load(wanted.replay) if wanted.replay else ()
    except RegressError as error:
        raise UsageError(f"--replay {error}") from None
    _check_hypothesis()
    for path in (wanted.report, wanted.junit, wanted.save):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no such folder to write it to")
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise UsageError(f"{path}: cannot be written")
    outcome = _run(opening, wanted, talks)
    saved = None
    if outcome.failure and not wanted.replay:
        talk.save(outcome.failure.talks, wanted.save)
        saved = wanted.save
    if wanted.report:
        report.write(wanted.report, json.dumps(report.to_dict(outcome, saved), indent=2).encode() + b"\n")
    if wanted.junit:
        report.write(wanted.junit, report.to_junit(outcome))
    if wanted.as_json:
        print(json.dumps(report.to_dict(outcome, saved)))
    else:
        print(report.to_text(outcome, saved, _conditions(opening)))
    if not outcome.good:
        raise typer.Exit(1)


def _conditions(opening: Opening) -> list[str]:
    """What was given of how the model is opened, as words of a command."""
    given = {"--context": opening.context, "--threads": opening.threads, "--store": opening.store}
    words = [] if opening.engine == "auto" else ["--engine", opening.engine]
    return words + [word for name, value in given.items() if value is not None for word in (name, str(value))]


def _check_hypothesis() -> None:
    try:
        importlib.import_module("hypothesis")
    except ImportError:
        raise UsageError("regress needs hypothesis: pip install hypothesis") from None


def _run(opening: Opening, wanted: Wanted, talks: tuple[talk.Talk, ...]) -> Outcome:
    from mmchat.regress import hunt

    with tempfile.TemporaryDirectory(prefix="mmchat-") as folder:
        # An empty store: pictures are to be encoded.
        runtime = opening.open() if opening.store else replace(opening, store=folder).open(store_cap_bytes=STORE_BYTES)
        with runtime:
            say("loading the model")
            if talks:
                return hunt.replay(runtime, talks)
            database = wanted.database or state_folder() / "regress"
            database.mkdir(parents=True, exist_ok=True)
            return hunt.hunt(runtime, minutes=wanted.minutes, seed=wanted.seed, database=database, say=say)
