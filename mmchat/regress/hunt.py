"""Look for a talk that fails, for so many minutes, and make it small.

First come a few talks, one per habit that breaks libraries; then hypothesis, whose example database remembers what
failed before; it stops at the first failure and shrinks it.  What it leaves is then made smaller by taking things away
from it, and the length of a prompt by halving.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.database import DirectoryBasedExampleDatabase

from mmchat.errors import MmchatError
from mmchat.regress.broken import Broken
from mmchat.regress.rows import digits
from mmchat.regress.strategies import conversations
from mmchat.regress.talk import ASKING, Sketch, Step, Talk
from mmchat.regress.trial import Failure, Trial
from mmchat.runtime import Runtime

_SHRINK_S = 60.0  # that a failure in the last minute still gets
_SAY_EVERY_S = 20.0

_COLOUR = "What colour is the background?"
OPENINGS = (
    Talk((Step(),)),
    Talk((Step(text="Describe the image.", max_new_tokens=16), Step(text="Say it again.", max_new_tokens=16))),
    Talk((Step(text=_COLOUR, pictures=(Sketch(0),)), Step("edit", text=_COLOUR, pictures=(Sketch(2),)))),
    Talk((Step(text=_COLOUR, pictures=(Sketch(0),)), Step(session=1, text=_COLOUR, pictures=(Sketch(3),)))),
    Talk((Step(text=_COLOUR, pictures=(Sketch(1, 640, 480),)), Step("again"))),
    Talk((Step(text="Describe the image.", max_new_tokens=32, cancel_after=1), Step(text="Say it again."))),
)


@dataclass(frozen=True)
class Outcome:
    """What a run of the kit has found.

    failure: the failing talk, made small; None where nothing failed.  flaky: seen once, and not again on new workers.
    facts: of model, library and strategies.  seconds: it took.  n_*: what was played; longest: rows of one prompt.
    """

    failure: Failure | None
    flaky: tuple[Failure, ...]
    facts: dict[str, Any]
    seed: int | None
    seconds: float
    n_talks: int
    n_turns: int
    n_requests: int
    longest: int

    @property
    def good(self) -> bool:
        return self.failure is None and not self.flaky


def facts(runtime: Runtime) -> dict[str, Any]:
    """What was tried; the library by its SHA-256."""
    found: dict[str, Any] = {
        "model": runtime.spec.name,
        "folder": str(runtime.spec.folder),
        "context_rows": runtime.context_rows,
        "strategy": runtime.strategy,
    }
    if runtime.rkllm:
        found["strategies"] = list(runtime.rkllm.profile.allowed)
        found["library"] = str(runtime.rkllm.library)
        found["library_sha256"] = _sha256(runtime.rkllm.library)
        found["profile"] = str(runtime.rkllm.profile.path)
    return found


def replay(runtime: Runtime, talks: tuple[Talk, ...]) -> Outcome:
    """Play talks of a file on new workers, once."""
    started, trial = time.monotonic(), Trial(runtime)
    failure = trial.replay(talks)
    if failure:
        record_crash(runtime, failure)
    return _outcome(trial, failure, None, started)


def hunt(
    runtime: Runtime,
    *,
    minutes: float,
    seed: int | None = None,
    database: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Try talks for so many minutes, or up to the first failure, which is then made small.

    seed: of what hypothesis draws; None draws one.  database: hypothesis's examples, a folder.  say: told of progress.

    What crashed is written to the profile (see record_crash).  Raises RegressError, OSError (the database).
    """
    started = time.monotonic()
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    search = _Search(runtime, started + 60 * minutes, say)
    failure = search.run(seed, database)
    if failure is not None:
        record_crash(runtime, failure)
    return _outcome(search.trial, failure, seed, started)


def record_crash(runtime: Runtime, failure: Failure) -> None:
    """Write a crash to the calibration profile, and let mmchat judge whether its length is to blame.

    The length goes to probes["regress"], with the library's digest.  Then a plain prompt of that length is asked
    without watching: where that crashes twice and a short one does not, none is as long from then on (mmchat.llm_proc).
    """
    if not runtime.rkllm or failure.name != "crash" or not failure.rows:
        return
    profile = runtime.rkllm.profile
    known = profile.probes.get("regress", {}).get("crashes", [])
    crash = {"rows": failure.rows, "library_sha256": _sha256(runtime.rkllm.library), "what": failure.what}
    profile.keep_probe("regress", {"crashes": [*known, crash]})
    if "died" not in failure.what:
        return
    watched, runtime.engine = runtime.engine, runtime.llm
    try:
        session = runtime.session(policy="error")
        n_fixed = session.prompt(("",)).n_rows
        reply = session.ask(digits(max(1, failure.rows - n_fixed)), temperature=0.0, max_new_tokens=1)
        reply.text  # noqa: B018
    except MmchatError:  # it crashed, as it should
        pass
    finally:
        runtime.engine = watched


class _Over(KeyboardInterrupt):
    """The time is over.  Hypothesis passes on interrupts alone, and does not take them for failures."""


class _Search:
    def __init__(self, runtime: Runtime, deadline: float, say: Callable[[str], None]) -> None:
        self.trial = Trial(runtime)
        self._runtime, self._deadline, self._say = runtime, deadline, say
        self._best: Failure | None = None
        self._said = time.monotonic()

    def run(self, seed: int, database: Path) -> Failure | None:
        try:
            for talk in OPENINGS:
                if self._failed(talk) is not None:
                    break
            else:
                self._draw(seed, database)
        except _Over:
            pass
        if self._best is not None:
            self._deadline = max(self._deadline, time.monotonic() + _SHRINK_S)
            self._say(f"fails: {self._best.what}; making it smaller")
            with contextlib.suppress(_Over):
                self._narrow()
        return self._best

    def _draw(self, seed: int, database: Path) -> None:
        set_hypothesis_home_dir(database)

        @hypothesis.seed(seed)
        @settings(
            max_examples=10_000_000,  # the time ends it
            database=DirectoryBasedExampleDatabase(database / "examples"),
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            deadline=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(talk=conversations(self._runtime))
        def try_one(talk: Talk) -> None:
            failure = self._failed(talk)
            if failure is not None:
                failure.raise_()

        with contextlib.suppress(Broken):  # it is in self._best
            try_one()

    def _failed(self, talk: Talk) -> Failure | None:
        """Raises _Over."""
        now = time.monotonic()
        if now > self._deadline:
            raise _Over
        if now > self._said + _SAY_EVERY_S:
            self._said, player = now, self.trial.player
            self._say(
                f"{player.n_talks} conversations, {player.n_turns} turns, {player.watch.n_rows} rows, longest prompt "
                f"{player.watch.longest}, {max(0, self._deadline - now):.0f} s left"
            )
        failure = self.trial.attempt(talk)
        if failure is not None:
            if self._best is None:  # hypothesis shrinks for half of what is left, at most
                self._deadline = now + max(_SHRINK_S, self._deadline - now) / 2
            if self._best is None or failure.size < self._best.size:
                self._best = failure
        return failure

    def _narrow(self) -> None:
        """Take away what is not needed, until nothing can go.  Raises _Over."""
        while (best := self._best) is not None and len(best.talks) == 1:
            if not any(self._is_smaller(talk, best) for talk in _smaller(best.talks[0], best.rows)):
                break
        if best is not None and len(best.talks) == 1:
            for number, step in enumerate(best.talks[0].steps):
                if step.rows:
                    self._halve(number)

    def _is_smaller(self, talk: Talk, best: Failure) -> bool:
        """Whether it fails the same way; then it is the best."""
        failure = self._failed(talk)
        return failure is not None and failure.name == best.name and self._best is not best

    def _halve(self, number: int) -> None:
        """The shortest prompt of a step that fails, if all longer ones do."""
        assert self._best is not None
        talk = self._best.talks[0]
        low, high = 1, talk.steps[number].rows
        while low < high:
            middle = (low + high) // 2
            if self._failed(_with(talk, number, rows=middle)) is not None:
                high = middle
            else:
                low = middle + 1


def _smaller(talk: Talk, crash_rows: int) -> Iterator[Talk]:
    """Talks that may fail the same way, the smallest first."""
    if crash_rows:
        yield Talk((Step(rows=crash_rows, max_new_tokens=1),))
    for number in range(len(talk.steps)):
        if len(talk.steps) > 1:
            yield replace(talk, steps=talk.steps[:number] + talk.steps[number + 1 :])
    if talk.policy != "error":
        yield replace(talk, policy="error")
    for number, step in enumerate(talk.steps):
        plain = Step()
        for changes in (
            {"pictures": ()},
            *({"pictures": step.pictures[:i] + step.pictures[i + 1 :]} for i in range(len(step.pictures))),
            {"pictures": tuple(replace(picture, width=64, height=64) for picture in step.pictures)},
            {"text": plain.text, "rows": 0} if step.rows else {"text": plain.text},
            {"cancel_after": None},
            {"max_new_tokens": 1},
            {"max_new_tokens": min(step.max_new_tokens, plain.max_new_tokens)},
            {"session": 0},
            {"do": "ask"} if step.do in ASKING else {},
        ):
            changed = _with(talk, number, **changes)
            if changed.size < talk.size:
                yield changed


def _with(talk: Talk, number: int, **values: Any) -> Talk:
    steps = list(talk.steps)
    steps[number] = replace(steps[number], **values)
    return replace(talk, steps=tuple(steps))


def _outcome(trial: Trial, failure: Failure | None, seed: int | None, started: float) -> Outcome:
    player = trial.player
    return Outcome(
        failure,
        tuple(trial.flaky),
        facts(player.runtime),
        seed,
        round(time.monotonic() - started, 1),
        player.n_talks,
        player.n_turns,
        player.watch.n_requests,
        player.watch.longest,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
