"""The encoder's speed, and whether a conversation's pictures are found again by their numbers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmchat.engine import Tokens, Vision
from mmchat.errors import ContextFull
from mmchat.probe_runs import EQUAL_TOKENS, TRIALS, Rows, Runs
from mmchat.prompt import Message, Picture, Text, render
from mmchat.slicing import slice_image
from mmchat.store import Store, slice_key

_COLOURS = {  # of pictures: names that every model knows
    "red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 150, 50), "yellow": (240, 220, 40),
    "white": (250, 250, 250),
}  # fmt: skip
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Sight:
    """The encoder, and the store that it writes to.  The store should be empty, or nothing would be measured."""

    vision: Vision
    store: Store


def encoder(runs: Runs, sight: Sight) -> dict[str, Any]:
    """Seconds per slice, after a first one, which has the loading in it."""
    side = runs.spec.slices.scale_resolution
    seconds = []
    for seed in range(TRIALS):
        runs.say(f"slice {seed + 1} of {TRIALS}", seed / TRIALS)
        pixels = np.random.default_rng([seed, time.time_ns()]).integers(0, 256, (side, side, 3), np.uint8)
        key = slice_key(pixels, runs.spec.encoder_digest)
        done = sight.vision.encode([(key, pixels)], lambda done, total: None, lambda: False)
        seconds.append(done.seconds)
    return {"s_per_slice": round(sum(seconds[1:]) / (TRIALS - 1), 3)}


def pictures(runs: Runs, sight: Sight, findings: dict[str, Any]) -> dict[str, Any]:
    """Pictures of one colour each, asked for by number, while the conversation grows, after a rewind and a trim.

    findings: the strategy that was chosen; its answers are compared with those after an emptied cache.
    """
    told = list(_steps(runs, sight, findings))
    result: dict[str, Any] = {"bound": True, "asked": len(told), "named": 0, "compared": 0}
    for number, (rows, answer, colour) in enumerate(told):
        runs.say("the same after an emptied cache", 0.5 + number / len(told) / 2)
        text = b"".join(map(runs.tokenizer.token_bytes, answer["ids"])).decode(errors="replace")
        result["named"] += colour in text.lower()
        with contextlib.suppress(ContextFull):  # too long for a single run
            alone = runs.answer(rows, {"strategy": "resend", "safe_rows": findings["safe_rows"]})
            result["compared"] += 1
            if alone["ids"][:EQUAL_TOKENS] != answer["ids"][:EQUAL_TOKENS]:
                result["bound"] = False
    grown = [answer for _, answer, _ in told[: len(_ORDINALS)]]
    n_known = [0, *(answer["n_prompt"] + len(answer["ids"]) for answer in grown)]
    result["n_prefilled"] = sum(answer["n_prefilled"] for answer in grown)
    result["n_new"] = sum(answer["n_prompt"] - known for answer, known in zip(grown, n_known, strict=False))
    return {**result, "strategy": grown[-1]["strategy"]}


def _steps(runs: Runs, sight: Sight, findings: dict[str, Any]) -> Iterator[tuple[Rows, dict[str, Any], str]]:
    """Rows of the prompt, what the engine answered, and the colour that it should name."""
    turns: list[tuple[Message, Message]] = []

    def ask(number: int, colour: str, *new: str) -> tuple[Rows, dict[str, Any], str]:
        question = f"What colour is the background in the {_ORDINALS[number]} image?"
        message = Message("user", (*(_picture(runs, sight, colour) for colour in new), Text(question)))
        messages = [message for turn in turns for message in turn]
        prompt = render(
            [*messages, message],
            runs.tokenizer,
            query_num=runs.spec.vision.query_num,
            use_image_id=runs.spec.use_image_id,
        )
        rows: Rows = []
        for piece in prompt.pieces:
            rows += piece.ids if isinstance(piece, Tokens) else [(piece.key, piece.n_rows)]
        runs.say(f"the {_ORDINALS[number]} picture", 0.0)
        answer = runs.answer(rows, findings)
        turns.append((message, Message("assistant", ids=tuple(answer["ids"]))))
        return rows, answer, colour

    yield ask(0, "red", "red", "blue")
    yield ask(1, "blue", "green")
    yield ask(3, "yellow", "yellow")
    yield ask(2, "green")
    del turns[2:]  # rewind, and another picture where one was
    yield ask(3, "white", "white")
    yield ask(2, "green")
    del turns[0]  # trim
    yield ask(1, "white")
    yield ask(0, "green")


def _picture(runs: Runs, sight: Sight, colour: str) -> Picture:
    """Encoded, as one slice."""
    from PIL import Image

    side = runs.spec.slices.scale_resolution
    plan = runs.spec.slices.plan((side, side), 1)
    slices = slice_image(Image.new("RGB", (side, side), _COLOURS[colour]), plan)
    keys = tuple(slice_key(pixels, runs.spec.encoder_digest) for pixels in slices)
    sight.vision.encode(list(zip(keys, slices, strict=True)), lambda done, total: None, lambda: False)
    return Picture(plan, keys)
