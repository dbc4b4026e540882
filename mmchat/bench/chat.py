"""A scripted chat's wall time, and how much of it is not the model's own.

The same chat is held by the whole program (two workers, messages, the store on disk) and by the engine and the encoder
alone (mmchat.bench.bare), question by question in turns.  What the program takes longer is the host's overhead:
reading and cutting the pictures, hashing, messages, files, text.  Every chat has a system prompt of its own, so that
nothing is found in a cache, and pictures are encoded anew.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmchat
from mmchat.bench import bare
from mmchat.bench.conversations import EIGHT
from mmchat.bench.script import N_TURNS, Timed
from mmchat.bench.script import say as say_to
from mmchat.session import Session
from mmchat.worker import Worker

ROUNDS = 15
_SILENCE_S = 600.0


def run(model: str, say: Callable[[str], None], *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Raises what opening the model and asking raise."""
    taken: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, mmchat.open(model, store=Path(folder) / "ours") as runtime:
        config = {"folder": str(runtime.spec.folder), "store": str(Path(folder) / "bare"), "n_threads": None}
        alone = Worker(bare.__name__, config, name="bare")
        try:
            for number in range(rounds + 1):  # the first warms up
                say(f"chat: round {number} of {rounds}")
                runtime.store.clear()
                system, timed = f"Chat {number}.", Timed(runtime.llm)
                session = Session(runtime.spec, runtime.tokenizer, runtime.store, runtime.vision, timed, system=system)
                wall_s, sums = 0.0, dict.fromkeys(("model_s", "generate_s", "n_tokens"), 0.0)
                for turn in range(N_TURNS):
                    wall_s += say_to(session, turn)
                    (other,) = alone.call({"system": system, "turn": turn}, silence_s=_SILENCE_S)
                    sums = {name: sums[name] + other[name] for name in sums}
                taken.append({"wall_s": wall_s, "waited_s": timed.waited_s, "tokens": timed.n_tokens, **sums})
        finally:
            alone.close()
        turns = session.turns
    measured = taken[1:]

    def median(figure: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(figure(one) for one in measured)

    return {
        "chat": {
            "script": EIGHT.name,
            "turns": len(turns),
            "tokens": sum(turn.usage.n_new for turn in turns),
            "slices": sum(turn.usage.slices_encoded for turn in turns),
            "rounds": len(measured),
            "wall_s": median(lambda one: one["wall_s"]),
            "model_s": median(lambda one: one["model_s"]),
            "overhead_share": median(lambda one: one["wall_s"] / one["model_s"]) - 1,
            "model_ms_per_token": 1000 * median(lambda one: one["generate_s"] / one["n_tokens"]),
            "overhead_ms_per_token": 1000
            * median(lambda one: one["waited_s"] / one["tokens"] - one["generate_s"] / one["n_tokens"]),
        }
    }
