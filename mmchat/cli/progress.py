"""What a person sees while a source is captioned.  All of it on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from mmchat.cli.options import say
from mmchat.video.values import Caption, Source

if TYPE_CHECKING:
    from rich.progress import Progress

_MOST_NOTICES = 20  # in a minute
_MINUTE_S = 60.0


class View:
    """A bar with the time that is left, for a source with an end; else a line of counts.  Notices in any case."""

    def __init__(self, source: Source, *, show: bool) -> None:
        """show: a bar or a line, too."""
        self._source = source
        self._n_captions = self._n_kept = self._n_drops = self._n_notices = self._n_hidden = 0
        self._minute_began = 0.0
        self._progress: Progress | None = _progress(source) if show else None

    def __enter__(self) -> View:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("loading", total=self._source.length)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._n_hidden:
            say(f"{self._n_hidden} more of these were not shown")

    def caption(self, caption: Caption, kept: bool) -> None:
        self._n_captions += 1
        self._n_kept += kept
        self._n_drops += caption.drops
        if self._progress is None:
            return
        counts = f"{self._n_captions} captions"
        if self._n_kept < self._n_captions:
            counts += f", {self._n_kept} kept"
        if self._source.live:
            counts += f", {self._n_drops} frames passed over, {caption.usage.total_s:.1f} s for the last"
        self._progress.update(self._task, description=counts, completed=caption.end)

    def notice(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._minute_began + _MINUTE_S:
            self._minute_began, self._n_notices = now, 0
        self._n_notices += 1
        if self._n_notices <= _MOST_NOTICES:
            say(text)
        else:
            self._n_hidden += 1


def _progress(source: Source) -> Progress:
    from rich import progress as rich
    from rich.console import Console

    counts = rich.TextColumn("{task.description}")
    columns: list[rich.ProgressColumn] = [rich.SpinnerColumn(), counts, rich.TimeElapsedColumn()]
    if source.length:
        columns += [rich.BarColumn(), rich.TaskProgressColumn(), rich.TimeRemainingColumn(), rich.TextColumn("left")]
    # Results are for stdout alone.
    return rich.Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
