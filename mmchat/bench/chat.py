"""A scripted chat's wall time, and how much of it is not the model's own.

The same chat is held by the whole program (two workers, messages, the store on disk) and by the engine and the encoder
alone (mmchat.bench.bare), question by question in turns.  What the program takes longer is the host's overhead:
reading and cutting the pictures, hashing, messages, files, text.  Every chat has a system prompt of its own, so that
nothing is found in a cache, and pictures are encoded anew.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    taken: list[list[_Turn]] = []
    with tempfile.TemporaryDirectory() as folder, mmchat.open(model, store=Path(folder) / "ours") as runtime:
        config = {"folder": str(runtime.spec.folder), "store": str(Path(folder) / "bare"), "n_threads": None}
        alone = Worker(bare.__name__, config, name="bare")
        try:
            for number in range(rounds + 1):  # the first warms up
                say(f"chat: round {number} of {rounds}")
                runtime.store.clear()
                system = f"Chat {number}."
                timed = Timed(runtime.llm)
                session = Session(runtime.spec, runtime.tokenizer, runtime.store, runtime.vision, timed, system=system)
                taken.append([_ask(session, timed, alone, turn) for turn in range(N_TURNS)])
        finally:
            alone.close()
        turns = session.turns
    wall_s, model_s, pictures_s, waited_s, generate_s = (
        _medians(taken[1:], place) for place in range(len(_Turn._fields))
    )
    n_tokens = sum(turn.usage.n_new for turn in turns)
    return {
        "chat": {
            "script": EIGHT.name,
            "turns": len(turns),
            "tokens": n_tokens,
            "slices": sum(turn.usage.slices_encoded for turn in turns),
            "rounds": rounds,
            "wall_s": sum(wall_s),
            "model_s": sum(model_s),
            "overhead_share": sum(wall_s) / sum(model_s) - 1,
            "pictures_share": sum(pictures_s) / sum(model_s),
            "model_ms_per_token": 1000 * statistics.median(generate_s),
            "overhead_ms_per_token": 1000 * (statistics.median(waited_s) - statistics.median(generate_s)),
        }
    }


class _Turn(NamedTuple):
    """Seconds of the whole program, of the model alone, of reading and cutting the pictures alone; and seconds per
    token after an answer's first, of the whole program and of the model.
    """

    wall_s: float
    model_s: float
    pictures_s: float
    waited_s: float
    generate_s: float


def _ask(session: Session, timed: Timed, alone: Worker, turn: int) -> _Turn:
    waited_s, n_tokens = timed.waited_s, timed.n_tokens
    wall_s = say_to(session, turn)
    (bare_turn,) = alone.call({"system": session.system, "turn": turn}, silence_s=_SILENCE_S)
    return _Turn(
        wall_s,
        bare_turn["model_s"],
        bare_turn["pictures_s"],
        (timed.waited_s - waited_s) / max(1, timed.n_tokens - n_tokens),
        bare_turn["generate_s"] / max(1, bare_turn["n_tokens"]),
    )


def _medians(rounds: Sequence[Sequence[_Turn]], place: int) -> list[float]:
    """Of one of the figures, each turn's median over the rounds."""
    return [statistics.median(one[turn][place] for one in rounds) for turn in range(N_TURNS)]
