"""What a person sees while and after an answer is made.  All of it on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmchat.context import Change
from mmchat.forecast import Plan
from mmchat.record import Usage
from mmchat.session import Reply

if TYPE_CHECKING:
    from rich.status import Status

# A wait shorter than this shows nothing.
_PATIENCE_S = 0.6


class Waiting:
    """A spinner with the current stage, from when a wait becomes noticeable until stop()."""

    def __init__(self, text: str = "loading the model") -> None:
        self._text = text
        self._status: Status | None = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        if sys.stderr.isatty():
            self._timer = threading.Timer(_PATIENCE_S, self._show)
            self._timer.daemon = True
            self._timer.start()

    def watch(self, reply: Reply) -> None:
        """Show the reply's stages."""
        units = {"encode": "encoding slices", "prefill": "reading rows"}
        reply.on_wait = lambda stage, done, total: self._say(f"{units[stage]} {done} of {total}")

    def stop(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._status is not None:
                self._status.stop()
                self._status = None

    def _say(self, text: str) -> None:
        with self._lock:
            self._text = text
            if self._status is not None:
                self._status.update(text)

    def _show(self) -> None:
        from rich.console import Console

        with self._lock:
            if self._timer is not None:
                self._status = Console(stderr=True).status(self._text)
                self._status.start()


def print_stats(usage: Usage, query_num: int) -> None:
    """Stage, total ms, tokens, ms per token, tokens per second: the table that RKLLM prints."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage")
    for name in ("total ms", "tokens", "ms per token", "tokens per s"):
        table.add_column(name, justify="right")
    for stage, seconds, tokens in (
        ("encode", usage.encode_s, usage.slices_encoded * query_num),
        ("prefill", usage.prefill_s, usage.n_prefilled),
        ("generate", usage.generate_s, usage.n_new),
    ):
        each = f"{1000 * seconds / tokens:.2f}" if tokens else "-"
        rate = f"{tokens / seconds:.1f}" if tokens and seconds else "-"
        table.add_row(stage, f"{1000 * seconds:.1f}", str(tokens), each, rate)
    console = Console(stderr=True)
    console.print(table)
    console.print(describe_usage(usage), highlight=False)


def describe_usage(usage: Usage) -> str:
    """One line of counts."""
    slices = f"slices: {usage.slices_encoded} encoded, {usage.slices_cached} cached"
    rows = f"rows: {usage.n_prompt} = {usage.n_reused} reused + {usage.n_prefilled} prefilled, {usage.n_new} new"
    restarts = f"; restarts: {usage.restarts}" if usage.restarts else ""
    return f"{rows}; {slices}; {usage.total_s:.2f} s{restarts}"


def describe_changes(changes: Sequence[Change]) -> str:
    """ "img3: sent without cells; turns 1, 2 with img1, img2: not sent any more"; "" for none."""
    told = []
    for form, words in _CHANGES.items():
        names = [change.what for change in changes if change.form == form]
        numbers = [name.removeprefix("turn ") for name in names if name.startswith("turn ")]
        images = [name for name in names if not name.startswith("turn ")]
        turns = [f"turn{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"] if numbers else []
        told += [f"{' with '.join([*turns, *([', '.join(images)] if images else [])])}: {words}"] if names else []
    return "; ".join(told)


_CHANGES = {
    "overview": "sent without cells",
    "described": "now a line of text with what was said of it",
    "line": "now a line of text",
    "dropped": "not sent any more",
}


def describe_plan(plan: Plan) -> list[str]:
    """Lines."""
    left = plan.cap - plan.rows - plan.max_new_tokens
    lines = [
        f"rows      {plan.rows} + {plan.max_new_tokens} for the answer, of {plan.cap}; {left} left",
        f"to do     {plan.rows_new} rows to compute, {plan.rows_reused} reused; {plan.slices_new} slices to encode",
    ]
    forms = [f"{image.id} {'turn dropped' if image.form == 'dropped' else image.form}" for image in plan.images]
    if set(forms) - {f"{image.id} whole" for image in plan.images}:
        lines.append(f"pictures  {', '.join(forms)}")
    if plan.dropped:
        lines.append(f"not sent  turns {', '.join(map(str, plan.dropped))}")
    if plan.degraded:
        lines.append(f"degraded  {describe_changes(plan.degraded)}")
    if plan.unseen:
        lines.append(f"unseen    {', '.join(plan.unseen)}")
    seconds = plan.seconds
    if seconds.first_token is not None:
        token = "" if seconds.token is None else f", then {seconds.token:.3g} s per token"
        lines.append(f"time      {seconds.first_token:.3g} s to the first token{token} ({'; '.join(seconds.sources)})")
    else:
        lines.append("time      not known before something has run")
    return lines


def reply_to_json(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "stop_reason": reply.stop_reason,
        "usage": reply.usage.to_dict(),
        "degraded": [asdict(change) for change in reply.degraded],
        "unseen": list(reply.plan.unseen),
    }
