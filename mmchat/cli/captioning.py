"""mmchat caption: a source to lines, subtitles, tables and pages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmchat.cli.options import Opening, UsageError, printable
from mmchat.cli.progress import View
from mmchat.errors import VideoError
from mmchat.runtime import Runtime
from mmchat.video.asking import Plan
from mmchat.video.journal import Journal
from mmchat.video.loop import follow
from mmchat.video.matches import Command, matches
from mmchat.video.outputs import SUFFIXES, open_output
from mmchat.video.pace import Pace, seconds_of
from mmchat.video.sources import open_source
from mmchat.video.values import Caption, clock


@dataclass(frozen=True)
class Wanted:
    """What to do with captions.

    files: where they go, by suffix.  resume, overwrite: what to do with files that are there.
    when: keep those that hold these words.  command: run for each that is kept and was not carried.
    as_json: print lines of JSON.
    """

    files: tuple[Path, ...]
    resume: bool
    overwrite: bool
    when: str | None
    command: str | None
    as_json: bool


def pace_of(every: str | None, fps: float | None, max_frames: int | None, official: bool) -> Pace:
    """Raises UsageError."""
    if (every is not None) + (fps is not None) + official > 1:
        raise UsageError("--every, --fps and --official say the same thing in different ways: give one")
    if fps is not None and not 0 < fps < math.inf:
        raise UsageError(f"--fps is {fps:g}; it must be more than 0 (--every 0 takes every frame)")
    try:
        return Pace(1 / fps if fps else seconds_of(every or "1s"), max_frames, official)
    except VideoError as error:
        raise UsageError(f"--every: {error}") from None


def plan_of(pace: Pace, **values: Any) -> Plan:
    """values: the other fields of Plan.  Raises UsageError."""
    try:
        return Plan(pace=pace, **values)
    except VideoError as error:
        raise UsageError(f"--{error}") from None


def caption(source: str, plan: Plan, opening: Opening, wanted: Wanted) -> None:
    try:
        command = Command(wanted.command) if wanted.command else None
    except VideoError as error:
        raise UsageError(f"--exec {error}") from None
    journal_path, others = _check_files(wanted, plan)
    opened = open_source(source)  # before a model is loaded
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(opening.open())
        journal = None
        if journal_path is not None:
            journal = Journal(journal_path, _settings(plan, runtime, wanted.when), resume=wanted.resume)
            stack.callback(journal.close)
            next(journal.captions(), None)  # refuses a file of other settings before the others are emptied
        outputs = _Outputs(others, printable(opened.name))
        stack.callback(outputs.close)
        for known in journal.captions() if journal is not None and others else ():
            outputs.write(known)
        view = stack.enter_context(View(opened, show=_is_quiet(wanted)))
        for made in follow(
            runtime,
            opened,
            plan,
            thumbnails=any(path.suffix.lower() == ".html" for path in others),
            after=journal.captions() if journal is not None else (),
            on_notice=view.notice,
        ):
            kept = wanted.when is None or matches(made.text, wanted.when)
            view.caption(made, kept)
            if not kept:
                continue
            outputs.write(made)  # the picture of a page before the line that promises it
            if journal is not None:
                journal.write(made)
            _print(made, wanted)
            problem = command.run(made) if command is not None and not made.carried else None
            if problem:
                view.notice(problem)


class _Outputs:
    """All files but the .jsonl one."""

    def __init__(self, paths: list[Path], title: str) -> None:
        self._outputs = [open_output(path, title) for path in paths]

    def write(self, caption: Caption) -> None:
        for output in self._outputs:
            output.write(caption)

    def close(self) -> None:
        for output in self._outputs:
            output.close()


def _check_files(wanted: Wanted, plan: Plan) -> tuple[Path | None, list[Path]]:
    """The JSONL file and the others.  Raises UsageError."""
    journals = [path for path in wanted.files if path.suffix.lower() == ".jsonl"]
    others = [path for path in wanted.files if path.suffix.lower() != ".jsonl"]
    if len(set(wanted.files)) < len(wanted.files) or len(journals) > 1:
        raise UsageError("the same output is named twice, or two of them are .jsonl")
    if unknown := [path for path in others if path.suffix.lower() not in SUFFIXES]:
        raise UsageError(f"{unknown[0]}: the name must end in .jsonl, {', '.join(SUFFIXES)}")
    if wanted.resume and not journals:
        raise UsageError("--resume goes on from a .jsonl file: add --out FILE.jsonl, also to the first run")
    if wanted.resume and wanted.overwrite:
        raise UsageError("--resume keeps what is there and --overwrite does not: give one")
    if wanted.resume and wanted.when and plan.story:
        raise UsageError("--resume with --when has only the captions that were kept, and --story needs them all")
    there = [path for path in wanted.files if path.exists() and path.stat().st_size]
    goes_on = bool(journals) and journals[0].exists()
    if there and wanted.resume and not goes_on:
        raise UsageError(
            f"{there[0]} is there, but not {journals[0]}, from which --resume goes on: "
            "give the first run's .jsonl file, or --overwrite"
        )
    if there and not (wanted.resume or wanted.overwrite):
        how = "--resume goes on with it, " if goes_on else ""
        raise UsageError(f"{there[0]} is there already: {how}--overwrite begins anew")
    return (journals[0] if journals else None), others


def _settings(plan: Plan, runtime: Runtime, when: str | None) -> str:
    """A name for all that decides what captions say, so that a file is not continued with something else."""
    facts = [asdict(plan), plan.question, when, runtime.spec.name, runtime.spec.encoder_digest]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _is_quiet(wanted: Wanted) -> bool:
    """Whether stderr is a terminal and stdout writes nothing into it."""
    return sys.stderr.isatty() and not (sys.stdout.isatty() and (wanted.as_json or not wanted.files))


def _print(caption: Caption, wanted: Wanted) -> None:
    if wanted.as_json:
        print(json.dumps(caption.to_dict(), ensure_ascii=False), flush=True)
    elif not wanted.files and not caption.carried:
        print(f"{clock(caption.time)}  {' '.join(caption.text.split())}", flush=True)
