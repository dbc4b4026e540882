"""Line editing for the chat: history across runs, completion, Alt-Enter for a new line."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from mmchat.profile import state_folder


class _ChatCompleter(Completer):
    def __init__(self, commands: list[str]) -> None:
        self._commands = WordCompleter(commands, sentence=True)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        path = re.search(r"(?:^/(?:image|save)\s+|\{\{)([^}]*)$", text)
        if path:
            yield from self._paths.get_completions(Document(path[1]), complete_event)
        elif text.startswith("/"):
            yield from self._commands.get_completions(document, complete_event)


class _FileHistory(FileHistory):
    """A disk that is full, or read-only by now, costs the history and not the question."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def editor(help_text: str) -> Callable[[], str]:
    """A function that reads one line.  It raises KeyboardInterrupt (Ctrl-C) and EOFError (Ctrl-D)."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        history=_history(),
        completer=_ChatCompleter(re.findall(r"^/\w+", help_text, re.MULTILINE)),
        complete_while_typing=False,
        key_bindings=keys,
        output=create_output(stdout=None if sys.stdout.isatty() else sys.stderr),
    )
    return session.prompt


def _history() -> History:
    file = state_folder() / "history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(file))
