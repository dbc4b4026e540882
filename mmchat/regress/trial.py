"""Try talks on one runtime, and tell a failure from the state that earlier talks left behind.

Workers are kept from talk to talk, for loading a model takes long.  So a talk that fails on a worker that has played
others is played again on new workers; only what fails there too is a failure.  What does not is played once more after
the talks that came before it, for it may need them: then they are part of the failure.  What then still does not fail
is flaky: it was seen once, and is told as such.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmchat.regress.broken import Broken
from mmchat.regress.play import Player
from mmchat.regress.talk import Talk
from mmchat.runtime import Runtime

_MOST_BEFORE = 64  # talks that are tried again before the one that failed


@dataclass(frozen=True)
class Failure:
    """talks: the one that fails; more where it takes those before it.  rows: of the run that crashed, else 0."""

    kind: type[Broken]
    what: str
    talks: tuple[Talk, ...]
    rows: int

    @property
    def name(self) -> str:
        """Of the property, a key of mmchat.regress.broken.PROPERTIES."""
        return self.kind.property

    @property
    def size(self) -> tuple[int, ...]:
        return (len(self.talks), *self.talks[-1].size)

    def raise_(self) -> None:
        raise self.kind(self.what, self.rows)


class Trial:
    """flaky: failures that were seen once, and not again."""

    def __init__(self, runtime: Runtime) -> None:
        self.player = Player(runtime)
        self.flaky: list[Failure] = []
        self._known: dict[str, Failure | None] = {}
        self._before: list[Talk] = []  # what these workers have played

    def attempt(self, talk: Talk) -> Failure | None:
        """Play it; the same talk is played only once.  Raises RegressError."""
        key = talk.to_json()
        if key not in self._known:
            self._known[key] = self._attempt(talk)
        return self._known[key]

    def replay(self, talks: Sequence[Talk]) -> Failure | None:
        """Play them in a row on new workers."""
        self.renew()
        failure = self._play(talks)
        self.renew()
        return failure

    def renew(self) -> None:
        """New workers from the next request on."""
        runtime = self.player.runtime
        runtime.llm.worker.kill()
        runtime.vision.worker.kill()
        self._before = []

    def _attempt(self, talk: Talk) -> Failure | None:
        before = self._before
        first = self._play([talk])
        if first is None:
            self._before.append(talk)
            return None
        if not before:
            self.renew()
            return first
        for n in _growing(min(len(before), _MOST_BEFORE)):
            if (again := self.replay([*before[len(before) - n :], talk])) is not None:
                return again
        self.flaky.append(first)
        return None

    def _play(self, talks: Sequence[Talk]) -> Failure | None:
        for number, talk in enumerate(talks, 1):
            try:
                self.player.play(talk)
            except Broken as error:
                return Failure(type(error), str(error), tuple(talks[:number]), error.rows)
        return None


def _growing(most: int) -> list[int]:
    """0, 1, 2, 4, ... most."""
    found, n = [0], 1
    while n < most:
        found.append(n)
        n *= 2
    return [*found, most] if most else found


_trials: weakref.WeakKeyDictionary[Runtime, Trial] = weakref.WeakKeyDictionary()


def check(runtime: Runtime, talk: Talk, *, warn: Callable[[str], None] | None = None) -> None:
    """Play a talk on a runtime and check all properties; for tests.  From then on the runtime is watched.

    What failed once and not again on new workers is a warning.  warn: called with it instead.

    Raises Broken, RegressError.
    """
    trial = _trials.get(runtime) or _trials.setdefault(runtime, Trial(runtime))
    n_flaky = len(trial.flaky)
    failure = trial.attempt(talk)
    for flaky in trial.flaky[n_flaky:]:
        text = f"seen once, and not again on new workers: {flaky.what}"
        warn(text) if warn else warnings.warn(text, stacklevel=2)
    if failure is not None:
        failure.raise_()
