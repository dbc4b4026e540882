"""One conversation of six turns and four pictures, for every engine."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from mmchat.runtime import Runtime

# (question, new pictures); the third turn's are two.
TURNS = (
    ("What colour is the circle?", 1),
    ("Say it again.", 0),
    ("Are they the same?", 2),
    ("What is in the last picture?", 0),
    ("And in this one?", 1),
    ("Thank you.", 0),
)
GREEDY: dict[str, Any] = {"temperature": 0.0}  # the answers end by themselves


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (112 + 30 * number, 112), "white")
    colour = ("red", "blue", "green", "black")[number % 4]
    ImageDraw.Draw(image).ellipse((20, 20, 70 + 5 * number, 90), fill=colour)
    return image


def talk(runtime: Runtime) -> tuple[list[tuple[int, ...]], int, int]:
    """The conversation: its answers' tokens, rows prefilled over all turns, and rows that were new."""
    session, n_pictures = runtime.session(), 0
    answers, n_prefilled, n_new, n_known = [], 0, 0, 0
    for question, n_images in TURNS:
        images = [picture(n_pictures + i) for i in range(n_images)]
        n_pictures += n_images
        reply = session.ask(question, images, **GREEDY)
        assert reply.text
        usage = reply.usage
        assert usage.n_reused + usage.n_prefilled == usage.n_prompt
        answers.append(session.turns[-1].ids)
        n_prefilled += usage.n_prefilled
        n_new += usage.n_prompt - n_known  # all but the prompt and the answer before; its end token is new
        n_known = usage.n_prompt + usage.n_new
    return answers, n_prefilled, n_new
