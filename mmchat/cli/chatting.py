"""mmchat ask and mmchat chat."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import typer

import mmchat
from mmchat.cli.options import Keeping, Opening, Talk, UsageError, describe, printable, say
from mmchat.cli.terminal import Waiting, print_stats, reply_to_json
from mmchat.errors import MmchatError
from mmchat.images import open_image
from mmchat.record import ImageHandle
from mmchat.runtime import Runtime
from mmchat.saving import FORMS
from mmchat.session import Reply, Session
from mmchat.transcript import SUFFIXES, export

_IN_TEXT = re.compile(r"(?<!\\)\{\{[ \t]*([^{}\s][^{}]*?)[ \t]*\}\}")
_PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}

HELP = """\
/image PATH...   attach pictures to the next question ({{PATH}} in a question puts one right there)
/drop            forget what /image attached
/images          list the pictures of this conversation
/undo [N]        take back the last turn, or the last N
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
    elif Path(question).suffix.lower() in _PICTURE_SUFFIXES and _is_file(question):
        raise UsageError(f"the last word must be the question, but {question} is a picture")
    parts = split_pictures(question)
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise UsageError("the question is empty: ask something")
    images = [sys.stdin.buffer.read() if picture == "-" else Path(picture) for picture in pictures]
    for image in images:  # before a model is loaded
        with open_image(image):
            pass
    with _open(opening) as runtime:
        session = _session(runtime, talk, sampling)
        reply = session.ask(parts, images)
        _show(reply, runtime, talk)


def chat(pictures: list[str], opening: Opening, talk: Talk, sampling: dict[str, Any], keeping: Keeping) -> None:
    """Many questions, from a terminal or from lines of stdin."""
    if keeping.pictures not in FORMS:
        raise UsageError(f"--save-pictures {keeping.pictures}: known are {', '.join(FORMS)}")
    if keeping.resume and (talk.system is not None or talk.max_slices is not None or talk.reference_pixels):
        raise UsageError(
            "--system, --max-slices and --reference-pixels are those of the conversation that --resume names"
        )
    attached: list[Path] = [_readable(picture) for picture in pictures]
    with _open(opening) as runtime:
        repl = _Repl(runtime, talk, _begin(runtime, talk, sampling, keeping), attached)
        if sys.stdin.isatty():
            _converse(repl)
        else:
            for line in sys.stdin.buffer:
                if not repl.handle(line.decode(errors="replace")):
                    break
        if repl.is_unsaved or (repl.n_failed and not sys.stdin.isatty()):
            raise typer.Exit(1)


def _begin(runtime: Runtime, talk: Talk, sampling: dict[str, Any], keeping: Keeping) -> Session:
    """The conversation that the options name."""
    save = os.path.expanduser(keeping.save) if keeping.save else None
    if keeping.resume:
        session = runtime.load(os.path.expanduser(keeping.resume), autosave=save is None)
        session.sampling.update(sampling)
        for note in session.notes:
            say(note)
        say(f"going on after {len(session.turns)} turn(s) and {len(session.images)} picture(s)")
    else:
        session = _session(runtime, talk, sampling)
    if save is not None:
        session.autosave(save, images=keeping.pictures)
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

    def __init__(self, runtime: Runtime, talk: Talk, session: Session, attached: list[Path]) -> None:
        self._runtime, self._session, self._attached = runtime, session, attached
        self._talk = talk
        self.n_failed = 0

    @property
    def is_unsaved(self) -> bool:
        """Whether the last turn is not in the file where it is to be kept; the log has said so."""
        return self._session.unsaved is not None

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
            say("interrupted")
        return True

    def _ask(self, question: str) -> None:
        reply = self._session.ask(split_pictures(question), self._attached)
        n_turns = len(self._session.turns)
        previous = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, previous)  # a second Ctrl-C does not wait
            reply.cancel()

        signal.signal(signal.SIGINT, stop)
        try:
            _show(reply, self._runtime, self._talk)
        finally:
            signal.signal(signal.SIGINT, previous)
            if len(self._session.turns) > n_turns:  # else they wait for the next question
                self._attached = []

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/image":
            if not rest:
                raise UsageError("/image needs the path of a picture")
            paths = [rest] if _is_file(rest) else rest.split()
            self._attached += [_readable(path) for path in paths]
            say(f"{len(self._attached)} picture(s) go with the next question")
        elif name == "/drop":
            say(f"{len(self._attached)} picture(s) do not go with the next question after all")
            self._attached = []
        elif name == "/images":
            _print_images(self._session.images, self._attached, self._talk.as_json)
        elif name == "/undo":
            if rest and not rest.isdecimal():
                raise UsageError(f"/undo takes a number of turns, not {rest!r}")
            taken = self._session.undo(int(rest or 1))
            say(f"took back {len(taken)} turn(s); {len(self._session.turns)} left")
        elif name == "/save":
            if not rest:
                raise UsageError("/save needs a file name")
            path = Path(os.path.expanduser(rest))
            if path.suffix.lower() in SUFFIXES:
                handles = {image.id: image for image in self._session.images}
                for missing in export(self._session.saved(), lambda image: handles[image.id].original.read(), path):
                    say(missing)
            else:
                self._session.save(path)
            say(f"saved {len(self._session.turns)} turn(s) to {rest}")
        elif name == "/stats":
            self._talk = replace(self._talk, stats=not self._talk.stats)
            say(f"times are {'shown' if self._talk.stats else 'not shown'}")
        elif name == "/help":
            print(HELP, file=sys.stderr if self._talk.as_json else sys.stdout)
        else:
            raise UsageError(f"unknown command {name}; /help lists the commands")


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


def _open(opening: Opening) -> Runtime:
    return mmchat.open(
        opening.model,
        engine=opening.engine,
        store=opening.store,
        context_rows=opening.context,
        n_threads=opening.threads,
    )


def _session(runtime: Runtime, talk: Talk, sampling: dict[str, Any]) -> Session:
    return runtime.session(talk.system, talk.max_slices, reference_pixels=talk.reference_pixels, sampling=sampling)


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


def _print_images(images: Sequence[ImageHandle], attached: Sequence[Path], as_json: bool) -> None:
    if as_json:
        known = [
            {"id": i.id, "turn": i.turn, "size": i.size, "slices": i.slices, "rows": i.rows, "name": i.name}
            for i in images
        ]
        print(json.dumps({"images": known, "attached": [printable(path) for path in attached]}), flush=True)
        return
    for image in images:
        size = f"{image.size[0]}x{image.size[1]}"
        cost = f"{image.slices:>2} slices  {image.rows:>4} rows"
        print(f"{image.id:6} turn {image.turn:<3} {size:>11}  {cost}  {image.name}")
    for path in attached:
        print(f"{'next':6} {printable(path)}")
    if not images and not attached:
        print("no pictures yet: /image PATH")
