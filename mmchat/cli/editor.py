"""Line editing for the chat: history across runs, completion, Alt-Enter for a new line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


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
    )
    return session.prompt


def _history() -> History:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "mmchat" / "history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
