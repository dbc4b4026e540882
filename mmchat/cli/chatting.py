"""mmchat ask and mmchat chat."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import typer

from mmchat.cli.options import Keeping, Opening, Talk, UsageError, describe, policy, printable, say
from mmchat.cli.terminal import Waiting, describe_changes, describe_plan, print_stats, reply_to_json
from mmchat.errors import MmchatError
from mmchat.images import SUFFIXES as PICTURE_SUFFIXES
from mmchat.images import open_image
from mmchat.runtime import Runtime
from mmchat.saving import FORMS
from mmchat.sections import same_place
from mmchat.session import Reply, Session
from mmchat.transcript import SUFFIXES, export

_IN_TEXT = re.compile(r"(?<!\\)\{\{[ \t]*([^{}\s][^{}]*?)[ \t]*\}\}")

HELP = """\
/image PATH...   attach pictures to the next question ({{PATH}} in a question puts one right there)
/drop            forget what /image attached
/images          list the pictures of this conversation; @img2 in a question names one
/pin WHAT        keep a picture (img2) or a turn (3) when the context is full; /unpin WHAT ends that
/forget IMG      make a picture a line of text; /reattach IMG sends it whole again
/cost [QUESTION] what the next question would send and cost
/undo [N]        take back the last turn, or the last N
/retry           answer the last question once more
/edit N QUESTION ask another question in the place of turn N, and go on from there
/branch [N]      go on after turn N (or the last) in a conversation of its own; /switch [K] goes to another
/save FILE       save the conversation, for --resume; .html, .md or .json export it
/stats           print times after each answer, or stop that
/help            this list
/quit            leave (Ctrl-D does too); Ctrl-C stops an answer"""


def ask(words: list[str], opening: Opening, talk: Talk, sampling: dict[str, Any]) -> None:
    """One question.  words: pictures, then the question."""
    *pictures, question = words
    if words.count("-") > 1:
        raise UsageError("stdin can be one thing only: a picture, or the question")
    if question == "-":
        try:
            question = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError:
            raise UsageError("the question on stdin is not text (UTF-8); a picture comes before the question") from None
    elif Path(question).suffix.lower() in PICTURE_SUFFIXES and _is_file(question):
        raise UsageError(f"the last word must be the question, but {question} is a picture")
    parts = split_pictures(question)
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise UsageError("the question is empty: ask something")
    images = [sys.stdin.buffer.read() if picture == "-" else Path(picture) for picture in pictures]
    for image in images:  # before a model is loaded
        with open_image(image):
            pass
    with opening.open() as runtime:
        session = _session(runtime, talk, sampling)
        reply = session.ask(parts, images)
        _show(reply, runtime, talk)


def chat(pictures: list[str], opening: Opening, talk: Talk, sampling: dict[str, Any], keeping: Keeping) -> None:
    """Many questions, from a terminal or from lines of stdin."""
    if keeping.pictures not in (None, *FORMS):
        raise UsageError(f"--save-pictures {keeping.pictures}: known are {', '.join(FORMS)}")
    if keeping.resume and (talk.system is not None or talk.max_slices is not None or talk.reference_pixels):
        raise UsageError(
            "--system, --max-slices and --reference-pixels are those of the conversation that --resume names"
        )
    if keeping.save and Path(keeping.save).suffix.lower() in SUFFIXES:
        raise UsageError(
            f"--save {keeping.save}: what --resume reads is kept there, so it must not end in {', '.join(SUFFIXES)}; "
            "in the chat, /save writes those"
        )
    attached: list[Path] = [_readable(picture) for picture in pictures]
    with opening.open() as runtime:
        repl = _Repl(runtime, talk, _begin(runtime, talk, sampling, keeping), attached, keeping)
        if sys.stdin.isatty():
            _converse(repl)
        else:
            for line in sys.stdin.buffer:
                if not repl.handle(line.decode(errors="replace")) or repl.is_interrupted:
                    break
        repl.save_again()
        if repl.is_interrupted and not sys.stdin.isatty():
            say("interrupted")
            raise typer.Exit(130)
        if repl.is_unsaved or (repl.n_failed and not sys.stdin.isatty()):
            raise typer.Exit(1)


def _begin(runtime: Runtime, talk: Talk, sampling: dict[str, Any], keeping: Keeping) -> Session:
    """The conversation that the options name."""
    save = os.path.expanduser(keeping.save) if keeping.save else None
    if keeping.resume:
        session = runtime.load(os.path.expanduser(keeping.resume), autosave=save is None)
        session.sampling.update(sampling)
        if talk.policy is not None:
            session.policy = policy(talk.policy)
        for note in session.notes:
            say(note)
        say(f"going on after {len(session.turns)} turn(s) and {len(session.images)} picture(s)")
    else:
        session = _session(runtime, talk, sampling)
    if save is not None:
        form = keeping.pictures or session.saved_form
        if keeping.pictures is None and keeping.embeddings and form == "jpeg":
            form = "original"  # which here are JPEGs, too
        session.autosave(save, images=form, embeddings=keeping.embeddings)
    return session


def _converse(repl: _Repl) -> None:
    """At a terminal: line editing, history, completion of commands and paths.  No Ctrl-C ends it."""
    from mmchat.cli.editor import editor

    say("type a question; /help lists the commands")
    read = editor(HELP)
    while True:
        try:
            if not repl.handle(read()):
                return
        except KeyboardInterrupt:
            say("/quit or Ctrl-D leaves")
        except EOFError:
            return


class _Repl:
    """handle(line) does what a line says; False where it says to leave."""

    def __init__(self, runtime: Runtime, talk: Talk, session: Session, attached: list[Path], keeping: Keeping) -> None:
        self._runtime, self._attached = runtime, attached
        self._talk, self._keeping = talk, keeping
        self._sessions, self._at = [session], 0
        self.n_failed = 0
        self.is_interrupted = False  # by Ctrl-C, at any time

    @property
    def is_unsaved(self) -> bool:
        """Whether a turn is not in the file where it is to be kept; the log has said so."""
        return any(session.unsaved for session in self._sessions)

    def save_again(self) -> None:
        """What could not be saved, or was interrupted, once more."""
        for session in self._sessions:
            if session.unsaved:
                with session.claim("saving"):
                    pass

    def handle(self, line: str) -> bool:
        line = line.strip()
        try:
            if line in ("/quit", "/exit"):
                return False
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            elif line:
                self._ask(line)
        except BrokenPipeError:
            raise
        except (MmchatError, OSError, UsageError) as error:
            self.n_failed += 1
            say(describe(error))
        except KeyboardInterrupt:
            self.is_interrupted = True
            if sys.stdin.isatty():  # else chat() says it, and ends
                say("interrupted")
        return True

    @property
    def _session(self) -> Session:
        return self._sessions[self._at]

    def _ask(self, question: str) -> None:
        self._run(self._session.ask(split_pictures(question), self._attached))

    def _run(self, reply: Reply, *, takes_attached: bool = True) -> None:
        turns = self._session.turns
        previous = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, previous)  # a second Ctrl-C does not wait
            self.is_interrupted = True
            reply.cancel()

        signal.signal(signal.SIGINT, stop)
        try:
            _show(reply, self._runtime, self._talk)
        finally:
            signal.signal(signal.SIGINT, previous)
            if takes_attached and self._session.turns != turns:  # else they wait for the next question
                self._attached = []

    def _command(self, name: str, rest: str = "") -> None:
        command = self._commands.get(name)
        if command is None:
            raise UsageError(f"unknown command {name}; /help lists the commands")
        command(self, rest)

    def _image(self, rest: str) -> None:
        if not rest:
            raise UsageError("/image needs the path of a picture")
        paths = [rest] if _is_file(rest) else rest.split()
        if not all(map(_is_file, paths)):
            with contextlib.suppress(ValueError):  # quotes that do not close
                paths = shlex.split(rest)  # terminals quote the names of files that are dropped on them
        self._attached += [_readable(path) for path in paths]
        say(f"{len(self._attached)} picture(s) go with the next question")

    def _drop(self, rest: str) -> None:
        say(f"{len(self._attached)} picture(s) do not go with the next question after all")
        self._attached = []

    def _images(self, rest: str) -> None:
        _print_images(self._session, self._attached, self._talk.as_json)

    def _pin(self, rest: str) -> None:
        what = _picture_or_turn("/pin", rest)
        self._session.pin(what)
        say(f"{rest} stays as it is when the context is full")
        name = str(what).removeprefix("@")
        if name in {image.id for image in self._session.images} - set(self._session.numbers):
            say(f"but the model does not see {name} as things are: /reattach {name} brings it back")

    def _unpin(self, rest: str) -> None:
        self._session.unpin(_picture_or_turn("/unpin", rest))
        say(f"{rest} may go when the context is full")

    def _forget(self, rest: str) -> None:
        self._session.forget(_picture("/forget", rest))
        say(f"{rest} is a line of text from now on; /reattach {rest} brings it back")

    def _reattach(self, rest: str) -> None:
        self._session.reattach(_picture("/reattach", rest))
        say(f"{rest} is sent whole again")

    def _cost(self, rest: str) -> None:
        plan = self._session.plan(split_pictures(rest or "?"), self._attached)
        print(json.dumps(plan.to_dict()) if self._talk.as_json else "\n".join(describe_plan(plan)), flush=True)

    def _undo(self, rest: str) -> None:
        taken = self._session.undo(_number("/undo takes a number of turns", rest or "1"))
        say(f"took back {len(taken)} turn(s); {len(self._session.turns)} left")

    def _retry(self, rest: str) -> None:
        reply = self._session.regenerate()
        if reply.sampling.temperature == 0:
            say("without a --temperature the answer will be the same")
        self._run(reply, takes_attached=False)

    def _edit(self, rest: str) -> None:
        number, _, question = rest.partition(" ")
        turn = _number("/edit takes the number of a turn, then the question", number)
        parts = split_pictures(question.strip())
        # A list has the pictures that stand in it; else those that were attached, or else the turn's own.
        text = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else parts
        self._run(self._session.edit(turn, text, self._attached or None))

    def _branch(self, rest: str) -> None:
        at = _number("/branch takes the number of a turn", rest) if rest else None
        session = self._session
        branch, saved_to = session.branch(at), session.saved_to
        if saved_to is not None:
            saved_to = _free_name(saved_to)
            branch.autosave(saved_to, images=session.saved_form, embeddings=session.saves_embeddings)
            say(f"it is saved to {printable(saved_to)}")
        self._sessions.append(branch)
        self._at = len(self._sessions) - 1
        say(f"conversation {self._at + 1}, after {len(self._session.turns)} turn(s); /switch goes to another")

    def _switch(self, rest: str) -> None:
        if rest:
            number = _number("/switch takes the number of a conversation", rest)
            if not 1 <= number <= len(self._sessions):
                raise UsageError(f"there is no conversation {number}: they are 1 to {len(self._sessions)}")
            self._at = number - 1
        for number, session in enumerate(self._sessions, 1):
            here = ", this one" if number == self._at + 1 else ""
            say(f"conversation {number}: {len(session.turns)} turn(s){here}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file name")
        path = Path(os.path.expanduser(rest))
        is_own = self._session.saved_to is not None and same_place(path, self._session.saved_to)
        if path.suffix.lower() in SUFFIXES:
            if any(one.saved_to is not None and same_place(path, one.saved_to) for one in self._sessions):
                raise UsageError(f"/save {rest}: the conversation is kept there already; give the page another name")
            read = {image.id: image.original.read for image in self._session.images if image.original}
            for missing in export(self._session.saved(), lambda image: read[image.id](), path):
                say(missing)
        else:
            session, keeping = self._session, self._keeping
            form = session.saved_form if is_own else keeping.pictures or session.saved_form
            session.save(path, images=form, embeddings=keeping.embeddings or session.saves_embeddings)
        say(f"saved {len(self._session.turns)} turn(s) to {rest}")

    def _stats(self, rest: str) -> None:
        self._talk = replace(self._talk, stats=not self._talk.stats)
        say(f"times are {'shown' if self._talk.stats else 'not shown'}")

    def _help(self, rest: str) -> None:
        print(HELP, file=sys.stderr if self._talk.as_json else sys.stdout)

    _commands: ClassVar[dict[str, Callable[[_Repl, str], None]]] = {
        "/image": _image,
        "/drop": _drop,
        "/images": _images,
        "/pin": _pin,
        "/unpin": _unpin,
        "/forget": _forget,
        "/reattach": _reattach,
        "/cost": _cost,
        "/undo": _undo,
        "/retry": _retry,
        "/edit": _edit,
        "/branch": _branch,
        "/switch": _switch,
        "/save": _save,
        "/stats": _stats,
        "/help": _help,
    }


def _free_name(path: Path) -> Path:
    """talk.mmchat -> talk-2.mmchat, or the next that is free."""
    stem, number = re.fullmatch(r"(.*?)(?:-(\d{1,6}))?", path.stem, re.DOTALL).groups()  # type: ignore[union-attr]
    names = (path.with_name(f"{stem}-{n}{path.suffix}") for n in itertools.count(int(number or 1) + 1))
    return next(name for name in names if not name.exists())


def _number(usage: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{usage}, not {text!r}")
    return int(text)


def _picture(command: str, text: str) -> str:
    if not text:
        raise UsageError(f"{command} needs the name of a picture, such as img2; /images lists them")
    return text


def _picture_or_turn(command: str, text: str) -> str | int:
    if not text:
        raise UsageError(f"{command} needs the name of a picture, such as img2, or the number of a turn")
    return _number(f"{command} takes the number of a turn", text) if text.isdecimal() else text


def _is_file(text: str) -> bool:
    try:
        return Path(os.path.expanduser(text)).is_file()
    except (OSError, ValueError):  # too long, a null character
        return False


def split_pictures(text: str) -> list[str | Path]:
    """ "Is {{a.png}} like {{b.png}}?" -> texts and paths, in order, blanks around a picture removed.

    A backslash before {{ makes it text.  Raises UsageError for a name that is no file.
    """
    pieces = _IN_TEXT.split(text)  # texts at even places, paths at odd ones
    if len(pieces) == 1:
        return [text.replace("\\{{", "{{")]
    parts: list[str | Path] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            parts += [piece.strip().replace("\\{{", "{{")] if piece.strip() else []
        elif _is_file(piece):
            parts.append(Path(os.path.expanduser(piece)))
        else:
            raise UsageError(f"{{{{{piece}}}}} in the question: no such file (write \\{{{{ for braces that are text)")
    return parts


def _session(runtime: Runtime, talk: Talk, sampling: dict[str, Any]) -> Session:
    return runtime.session(
        system=talk.system,
        max_slice_nums=talk.max_slices,
        reference_pixels=talk.reference_pixels,
        policy=policy(talk.policy),
        sampling=sampling,
    )


def _show(reply: Reply, runtime: Runtime, talk: Talk) -> None:
    """Stream an answer to stdout, or print it as JSON when it is whole."""
    waiting = Waiting()
    waiting.watch(reply)
    try:
        for text in reply:
            waiting.stop()
            if not talk.as_json:
                sys.stdout.write(text)
                sys.stdout.flush()
    finally:
        waiting.stop()
    if talk.as_json:
        print(json.dumps(reply_to_json(reply), ensure_ascii=False), flush=True)
    else:
        print(flush=True)
        if reply.stop_reason == "length":
            say(f"the answer was cut at {reply.usage.n_new} tokens (--max-new-tokens)")
        elif reply.stop_reason == "cancelled":
            say("stopped")
        if reply.degraded:
            say(f"the context is full; {describe_changes(reply.degraded)}")
        known = {image.id for image in reply.plan.images}
        for name in reply.plan.unseen:
            if name in known:
                say(f"the model does not see {name}: /images lists what it does, /reattach brings a picture back")
            else:
                say(f"there is no {name} in this conversation, and the question was sent as it stands: see /images")
    if reply.usage.restarts:
        say(f"a worker died and was replaced {reply.usage.restarts} time(s); nothing was lost")
    if talk.stats:
        print_stats(reply.usage, runtime.spec.vision.query_num)


def _readable(picture: str) -> Path:
    """Raises ImageError now, not when the question is asked."""
    path = Path(os.path.expanduser(picture))
    with open_image(path) as opened:
        opened.read()
    return path


def _print_images(session: Session, attached: Sequence[Path], as_json: bool) -> None:
    marks, numbers = session.marks, session.numbers
    told: list[dict[str, Any]] = []
    for image in session.images:
        form = "dropped" if image.turn in marks.dropped else marks.form(image)
        pinned = image.id in marks.pinned or image.turn in marks.pinned_turns
        values = {name: getattr(image, name) for name in ("id", "turn", "size", "slices", "rows", "name")}
        told.append({**values, "form": form, "number": numbers.get(image.id), "pinned": pinned})
    if as_json:
        print(json.dumps({"images": told, "attached": [printable(path) for path in attached]}), flush=True)
        return
    for picture in told:
        size = "{}x{}".format(*picture["size"])
        cost = f"{picture['slices']:>2} slices  {picture['rows']:>4} rows"
        notes = [picture["form"]] if picture["form"] != "whole" else []
        notes += ["pinned"] if picture["pinned"] else []
        note = f"  ({', '.join(notes)})" if notes else ""
        print(f"{picture['id']:6} turn {picture['turn']:<3} {size:>11}  {cost}  {picture['name']}{note}")
    for path in attached:
        print(f"{'next':6} {printable(path)}")
    if not told and not attached:
        print("no pictures yet: /image PATH")
