"""Look for a talk that fails, for so many minutes, and make it small.

First come a few talks, one per habit that breaks libraries, and longer and longer prompts, as far as the time allows;
then hypothesis, whose example database remembers what failed before.  The first failure is made small by taking things
away from it, which costs few runs, and the length of a prompt by halving; then hypothesis shrinks it in its own way,
where there is more to shrink.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
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
_SHRINK_TALKS = 20  # or as long as so many that fail take, where the time is not over before
_SAY_EVERY_S = 20.0
_MOST_CRASHES = 20  # that a profile keeps
_LONGEST_PART = 0.1  # of the time, that a single prompt may take

_COLOUR = "What colour is the background?"
HABITS = (
    Talk((Step(),)),
    Talk((Step(text="Describe the image.", max_new_tokens=16), Step(text="Say it again.", max_new_tokens=16))),
    Talk((Step(text="Describe the image.", pictures=(Sketch(2),), max_new_tokens=16), Step(text=_COLOUR))),
    Talk((Step(text=_COLOUR, pictures=(Sketch(0),)), Step("edit", text=_COLOUR, pictures=(Sketch(2),)))),
    Talk((Step(text=_COLOUR, pictures=(Sketch(0),)), Step(session=1, text=_COLOUR, pictures=(Sketch(3),)))),
    Talk((Step(text=_COLOUR, pictures=(Sketch(1, 640, 480),)), Step("again"))),
    Talk((Step(text="Describe the image.", max_new_tokens=32, cancel_after=1), Step(text="Say it again."))),
)


def lengths(cap: int) -> list[int]:
    """Rows of plain prompts, longer and longer; and what is just beyond the cap, which costs nothing."""
    return [*(1 << i for i in range(6, 20) if 1 << i < cap - 1), cap - 1, cap, cap + 1]


@dataclass(frozen=True)
class Outcome:
    """What a run of the kit has found.

    failure: the failing talk, made small; None where nothing failed.  flaky: seen once, and not again on new workers.
    facts: of model, library and strategies.  seconds: it took.  n_*: what was played; longest: rows of one prompt.
    most_rows: longer prompts were not drawn, for the time did not allow them; None: all were.
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
    most_rows: int | None = None

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
    """Play talks of a file on new workers, once.

    Lengths that are known to crash are not refused: whoever replays them wants to see it.
    """
    started, trial = time.monotonic(), Trial(runtime)
    with _unlearned(runtime):
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
    return replace(_outcome(search.trial, failure, seed, started), most_rows=search.most_rows)


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
    profile.keep_probe("regress", {"crashes": [*known, crash][-_MOST_CRASHES:]})
    if "died" not in failure.what:
        return
    watched, runtime.engine = runtime.engine, runtime.llm
    try:
        session = runtime.session(policy="error")
        n_fixed = session.prompt(("",)).n_rows
        list(session.ask(digits(max(1, failure.rows - n_fixed)), temperature=0.0, max_new_tokens=1))
    except MmchatError:  # it crashed, as it should
        pass
    finally:
        runtime.engine = watched


@contextlib.contextmanager
def _unlearned(runtime: Runtime) -> Iterator[None]:
    """Nothing is known of lengths meanwhile, and what is learned is not kept."""
    if runtime.rkllm is None:
        yield
        return
    profile = runtime.rkllm.profile
    known = profile.path, profile.safe_rows, profile.worked_rows
    with tempfile.TemporaryDirectory(prefix="mmchat-") as folder:
        profile.path, profile.safe_rows, profile.worked_rows = Path(folder) / "profile.json", None, 0
        try:
            yield
        finally:
            profile.path, profile.safe_rows, profile.worked_rows = known


class _Over(KeyboardInterrupt):
    """The time is over.  Hypothesis passes on interrupts alone, and does not take them for failures."""


class _Search:
    def __init__(self, runtime: Runtime, deadline: float, say: Callable[[str], None]) -> None:
        self.trial = Trial(runtime)
        self._runtime, self._deadline, self._say = runtime, deadline, say
        self._allowed_s = deadline - time.monotonic()
        self.most_rows: int | None = None  # that a prompt may have, for the time; None: all
        self._best: Failure | None = None
        self._cost_s = 0.0  # of a talk that fails: a library that hangs takes long
        self._said = time.monotonic()

    def run(self, seed: int, database: Path) -> Failure | None:
        try:
            if not any(self._fails(talk) for talk in HABITS) and not self._climb():
                self._draw(seed, database)
        except _Over:
            pass
        except KeyboardInterrupt:
            if self._best is None and not self.trial.flaky:
                raise
            self._say("interrupted: this is what was found so far")
        return self._best

    def _fails(self, talk: Talk) -> bool:
        """Then it is made small at once."""
        if self._failed(talk) is None:
            return False
        self._narrow()
        return True

    def _climb(self) -> bool:
        """Longer and longer prompts, as far as the time allows.  Whether one fails."""
        cap, seconds, before = self._runtime.context_rows, 0.0, 1
        for rows in lengths(cap):
            predicted = seconds * (rows / before) ** 1.5
            if rows < cap and predicted > _LONGEST_PART * self._allowed_s:
                self.most_rows = min(before, self.most_rows or before)
                continue
            started = time.monotonic()
            if self._fails(Talk((Step(rows=rows, max_new_tokens=1),))):
                return True
            if rows < cap:
                seconds, before = time.monotonic() - started, rows
        return False

    def _draw(self, seed: int, database: Path) -> None:
        set_hypothesis_home_dir(database)

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
        @hypothesis.seed(seed)  # inside of settings, or there is no database
        @given(talk=conversations(self._runtime, max_rows=self.most_rows))
        def try_one(talk: Talk) -> None:
            is_first = self._best is None
            failure = self._failed(talk)
            if failure is not None:
                if is_first:
                    self._narrow()
                failure.raise_()  # so that the database has it, and hypothesis makes it small in its own way

        with contextlib.suppress(Broken):  # it is in self._best
            try_one()

    def _failed(self, talk: Talk) -> Failure | None:
        """Raises _Over."""
        now = time.monotonic()
        if now + self._cost_s > self._deadline:
            raise _Over
        if now > self._said + _SAY_EVERY_S:
            self._said, player = now, self.trial.player
            self._say(
                f"{player.n_talks} conversations, {player.n_turns} turns, {player.watch.n_rows} rows, longest prompt "
                f"{player.watch.longest}, {max(0, self._deadline - now):.0f} s left"
            )
        failure = self.trial.attempt(talk)
        if failure is not None and self._best is None:
            self._cost_s = time.monotonic() - now
        best = self._best
        if failure is not None and (best is None or (failure.name == best.name and failure.size < best.size)):
            self._best = failure
        return failure

    def _narrow(self) -> None:
        """Take away what is not needed, until nothing can go; then hypothesis has as much time again, if need be."""
        assert self._best is not None
        self._say(f"fails: {self._best.what}; making it smaller")
        now = time.monotonic()  # a library that crashes costs a loading of the model each time
        self._deadline = max(now + _SHRINK_S, min(self._deadline, now + _SHRINK_TALKS * self._cost_s))
        with contextlib.suppress(_Over):
            self._take_away()
            if len(self._best.talks) == 1:
                for number, step in enumerate(self._best.talks[0].steps):
                    if step.rows:
                        self._halve(number)
        (steps,) = (talk.steps for talk in self._best.talks[-1:])
        is_small = len(steps) == 1 and (steps[0].rows or steps[0].text == Step().text) and not steps[0].pictures
        self._deadline = time.monotonic() + (0 if is_small else _SHRINK_S / 2)

    def _take_away(self) -> None:
        while (best := self._best) is not None and len(best.talks) == 1:
            if not any(self._is_smaller(talk, best) for talk in _smaller(best.talks[0], best.rows)):
                break

    def _is_smaller(self, talk: Talk, best: Failure) -> bool:
        """Whether it fails the same way; then it is the best."""
        return self._failed(talk) is not None and self._best is not best

    def _halve(self, number: int) -> None:
        """The shortest prompt of a step that fails, if all longer ones do."""
        assert self._best is not None
        talk = self._best.talks[0]
        low, high = 1, talk.steps[number].rows
        if len(talk.steps) == 1 and self._best.rows and self._runtime.strategy != "append":  # shorter runs worked
            low = min(self.trial.player.watch.worked + 1, high)
        while low < high:
            middle = (low + high) // 2
            failure = self._failed(_with(talk, number, rows=middle))
            if failure is not None and failure.name == self._best.name:
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
            {"turn": 1},
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
