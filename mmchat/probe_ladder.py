"""How long a run may be: longer and longer ones, to the first length that crashes."""

from __future__ import annotations

from typing import Any

from mmchat.errors import EngineError, WorkerDied
from mmchat.probe_runs import Runs


def ladder(runs: Runs) -> dict[str, Any]:
    """Longer and longer runs to the first length that crashes twice, then between it and the one before.

    Each is written down before it begins: what is still there the next time took calibration down with it, perhaps
    the whole board, and counts as one crash.
    """
    state = {name: value for name, value in runs.profile.probes["ladder"].items() if name != "stopped"}
    for name, empty in (("worked", []), ("crashed", []), ("odd", []), ("seconds", {})):
        state.setdefault(name, empty)
    lengths = list(rungs(runs.spec.context_rows - 1))
    if speed := runs.profile.probes.get("speed", {}).get("prefill_rows_per_s"):
        runs.say(f"up to {lengths[-1]} rows, about {1 + sum(lengths) / speed / 60:.0f} minutes", 0.0)
    while "stopped" not in state:
        works, crashes = max(state["worked"], default=0), min(state["crashed"], default=None)
        todo = [n for n in lengths if n > works and (crashes is None or n < crashes)]
        if not todo and crashes is not None and crashes - works > max(1, crashes // 64):
            todo = [(works + crashes) // 2]
        if not todo:
            break
        if _is_loaded(runs, state):
            _step(runs, state, todo[0])
    if "stopped" in state:  # it has not ended: the next calibration goes on
        return state
    return {name: value for name, value in state.items() if name not in ("begun", "trying")}


def _is_loaded(runs: Runs, state: dict[str, Any]) -> bool:
    """A crash may leave the NPU without memory for another start, which says nothing of a run's length."""
    try:
        runs.worker.ready()
    except EngineError as error:
        state["stopped"] = str(error)
        return False
    return True


def _step(runs: Runs, state: dict[str, Any], length: int) -> None:
    """One run, or another one after a crash; changes the state."""
    n_crashes = 1 if state.get("trying") == length else 0
    while True:
        again = ", once more after a crash" if n_crashes else ""
        runs.say(f"{length} rows{again}", sum(state["worked"]) / sum(rungs(runs.spec.context_rows - 1)))
        if n_crashes:  # should it go down again, that was twice
            runs.profile.keep_probe("ladder", {**state, "crashed": [*state["crashed"], length]})
        else:
            runs.profile.keep_probe("ladder", {**state, "trying": length})
        try:
            told = runs.run(runs.noise(length), max_new=1)
        except KeyboardInterrupt:
            runs.profile.keep_probe("ladder", state)
            raise
        except WorkerDied:
            n_crashes += 1
            if n_crashes < 2:
                if _is_loaded(runs, state):
                    continue
                state["trying"] = length
                runs.profile.keep_probe("ladder", state)
                return
            state["crashed"].append(length)
        except EngineError:  # refused, or hung: it would again
            state["crashed"].append(length)
        else:
            state["worked"].append(length)
            state["odd"] += [length] * n_crashes
            state["seconds"][str(length)] = round(told["prefill_s"], 3)
        state.pop("trying", None)
        runs.profile.keep_probe("ladder", state)
        return


def rungs(longest: int) -> list[int]:
    """Lengths to try: multiples of 32, then of 64 and 128, then powers of two, with their neighbours; and the longest.

    All multiples of 32 of a long context would take hours.
    """
    middles = {*range(64, 257, 32), *range(256, 513, 64), *range(512, 1025, 128)}
    powers = [2048 << i for i in range(12)]
    found = {n + d for n in middles for d in (-1, 0, 1)} | {n + d for n in powers for d in (0, 1)} | {longest}
    return sorted(n for n in found if 1 <= n <= longest)
