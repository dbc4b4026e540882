"""What probes are made of: runs in a child that may crash, and the rows that they are fed.

Image rows are made up (rows of the table, changed a little), so that no encoder is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mmchat.engine import SILENCE_S, SLOWEST_ROWS_PER_S
from mmchat.errors import EngineError
from mmchat.model_dir import ModelSpec
from mmchat.profile import Profile
from mmchat.prompt import ChatTokenizer, Message, Text, render
from mmchat.worker import Worker

Rows = list[Any]  # token ids, ("image", seed, number of rows), and for an engine (store key, number of rows)
Say = Callable[[str, float], None]  # what is being done, and which part of the probe is done, 0 to 1

TRIALS = 4
ANSWER_TOKENS = 40
EQUAL_TOKENS = 8  # answers are compared so far: later ones differ where sums are taken in another order
_QUESTIONS = (
    "What colour is the background?",
    "Describe the image.",
    "What shapes are there?",
    "What is in the center?",
)
_IMAGE_ROWS = 24


class Runs:
    """Asks the child (mmchat.probe_child) for runs.

    Raises, from any of its methods: WorkerError (the child crashed or hung), EngineError (the run failed), and what
    an engine raises.
    """

    def __init__(self, spec: ModelSpec, worker: Worker, profile: Profile, say: Say) -> None:
        self.spec, self.worker, self.profile, self.say = spec, worker, profile, say
        self.tokenizer = ChatTokenizer(spec.tokenizer_path)

    def run(self, rows: Rows, *, max_new: int = ANSWER_TOKENS, **options: Any) -> dict[str, Any]:
        """One rkllm_run; options and result: see mmchat.probe_child."""
        return self._call({"rows": rows, "max_new": max_new, **options})

    def answer(self, rows: Rows, findings: dict[str, Any]) -> dict[str, Any]:
        """One answer of the engine that has these findings."""
        return self._call({"rows": rows, "max_new": 2 * EQUAL_TOKENS, "findings": findings})

    def beginning(self, rows: Rows) -> list[int]:
        """Of the answer that an emptied cache gives."""
        ids: list[int] = self.run(rows, max_new=self.short)["ids"][:EQUAL_TOKENS]
        return ids

    @property
    def short(self) -> int:
        """Tokens of answers that are only compared: few, where the abort that this may take does no harm."""
        return EQUAL_TOKENS if self.profile.probes.get("abort", {}).get("usable") else ANSWER_TOKENS

    @property
    def unaborted(self) -> int:
        """Tokens of answers whose counters are looked at, which an aborted run does not have: few, where the library
        ends a run by itself.
        """
        return EQUAL_TOKENS if self.worker.ready()["ends_runs"] else ANSWER_TOKENS

    def turn(self, seed: int, answer: list[int] | None = None, *, image: int | None = None) -> Rows:
        """A question about a made-up picture; with its answer, a second question follows."""
        messages = [Message("user", (Text(_QUESTIONS[seed % 4]),))]
        if answer is not None:
            messages += [
                Message("assistant", ids=tuple(answer)),
                Message("user", (Text("What colour is the background?"),)),
            ]
        ids = render(messages, self.tokenizer, query_num=1, use_image_id=False).ids
        at = ids.index(self.tokenizer.special["<|im_start|>"], 1) + 2  # behind the system prompt and the user's tag
        return [*ids[:at], ("image", seed if image is None else image, _IMAGE_ROWS), *ids[at:]]

    def noise(self, n_rows: int) -> Rows:
        return random.Random(n_rows).choices(range(256), k=n_rows)

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        n_rows = sum(row[-1] if isinstance(row, (list, tuple)) else 1 for row in request["rows"])
        for event in self.worker.call(request, silence_s=max(SILENCE_S, n_rows / SLOWEST_ROWS_PER_S)):
            return event
        raise EngineError("the run told nothing")
