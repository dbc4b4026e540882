"""Evaluates a demo model folder through the runtime itself: mmchat.open, sessions, greedy answers.

    python -m tools.eval_demo_model FOLDER --answers 2000 --json figures.json

Held-out scenes only (tools.render_scenes).  An answer is right when it is the expected sentence, to the letter.
Parts: talk (dialogues of all lengths, the model's own answers in the history), gold (the first of them again, with
the expected answers in the history), print (small print with and without slicing: right when the text is in the
answer), rephrased (questions of tests/data/rephrasings.json), plain (pictures as people draw them for a test), order
(the same question about the same picture, before it and after it).
Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from PIL.Image import Image

import mmchat
from tools.render_scenes import COLORS, SHAPES, WORDS, Scene, Style, draw, plain_scene, sample_scene, view_plan
from tools.scene_talk import CANNOT, NUMBERS, Dialogue, Question, about_many, about_one, make_dialogue, word

REPHRASINGS = Path(__file__).parent.parent / "tests" / "data" / "rephrasings.json"


@dataclass(frozen=True)
class Answer:
    """One answer and what is known about its question.

    history: whose answers stand before it, "own" or "gold".  max_slice_nums: 0 is the model's own.
    """

    part: str
    task: str
    right: bool
    question: str
    wanted: str
    got: str
    n_images: int = 1
    distance: int = 0
    n_rows: int = 0
    history: str = "own"
    max_slice_nums: int = 0
    stopped: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    parts: dict[str, Callable[[mmchat.Runtime], Iterator[Answer]]] = {
        "talk": lambda rt: talk(rt, options.answers, options.seed),
        "gold": lambda rt: talk(rt, options.answers // 4, options.seed, gold=True),
        "print": lambda rt: small_print(rt, options.answers // 10, options.seed),
        "rephrased": lambda rt: rephrased(rt, options.per_rephrasing, options.seed),
        "plain": plain,
        "order": lambda rt: either_way(rt, options.answers // 10, options.seed),
    }
    answers: list[Answer] = []
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as store,
        mmchat.open(options.model, store=store, n_threads=options.threads) as rt,
    ):
        for name in options.parts.split(","):
            part = list(parts[name](rt))
            answers += part
            print(f"{name}: {_share(part)}  ({time.monotonic() - began:.0f} s)", flush=True)
    figures = tabulate(answers)
    for title, table in figures.items():
        print(f"\n{title}")
        for row, (right, n, low, high) in table.items():
            print(f"  {row:<24} {right / n:6.1%}  {right:>4} of {n:<4}  [{low:.1%}, {high:.1%}]")
    if options.json:
        wrong = [asdict(answer) for answer in answers if not answer.right]
        Path(options.json).write_text(
            json.dumps({"figures": figures, "wrong": wrong}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


def talk(
    rt: mmchat.Runtime, n_answers: int, seed: int, *, gold: bool = False, max_rows: int = 1024
) -> Iterator[Answer]:
    """Dialogues of one to eight pictures; a dialogue ends where the next question would not fit max_rows."""
    rng = Random(f"evaluation {seed}")
    n_done = 0
    while n_done < n_answers:
        n_images = rng.choices((1, 2, 3, 4, 5, 6, 7, 8), (0.3, 0.3, 0.16, 0.08, 0.05, 0.05, 0.03, 0.03))[0]
        scenes: list[Scene] = []
        for _ in range(n_images):
            same = scenes[-1].background if scenes and rng.random() < 0.3 else None
            style = Style(background=same, max_shapes=4 if n_images < 3 else 3, p_sliced=0.6 if n_images < 4 else 0.3)
            scenes.append(sample_scene(rng, style, held_out=True))
        plans = [view_plan(scene.size) for scene in scenes]
        dialogue = make_dialogue(rng, scenes, plans, rng.randint(4, 14))
        for answer in _converse(rt, dialogue, gold, max_rows):
            yield answer
            n_done += 1


def small_print(rt: mmchat.Runtime, n_pictures: int, seed: int) -> Iterator[Answer]:
    """The same question about the same picture with the model's own number of slices and with none."""
    rng = Random(f"print {seed}")
    for number in range(n_pictures):
        text = rng.choice(WORDS) if number % 2 else str(rng.randint(0, 999))
        scene = sample_scene(rng, Style(sliced=True, text=text, print_size="small", max_shapes=2), held_out=True)
        kind = "number" if text.isdigit() else "word"
        for max_slice_nums in (0, 1):
            chat = rt.session(max_slice_nums=max_slice_nums or None)
            got = chat.ask(f"What {kind} is written?", images=[draw(scene)]).text
            spoken = got.replace(".", " ").split()
            task = f"{kind} {'without' if max_slice_nums else 'with'} slices"
            yield Answer("print", task, text in spoken, "", text, got, max_slice_nums=max_slice_nums)


def either_way(rt: mmchat.Runtime, n_questions: int, seed: int) -> Iterator[Answer]:
    """A picture, then a question about it; and the question, then the picture."""
    rng = Random(f"order {seed}")
    for _ in range(n_questions):
        scene = sample_scene(rng, held_out=True)
        question = about_one(rng, scene, view_plan(scene.size))
        text, picture = word(rng, question.worded(rng), "", " the image"), draw(scene)
        orders: dict[str, list[str | Image]] = {
            "picture first": [picture, text],
            "question first": [f"{text} ", picture],
        }
        for order, parts in orders.items():
            got = rt.session().ask(parts).text
            yield Answer("order", order, got == question.answer, text, question.answer, got)


def rephrased(rt: mmchat.Runtime, per_rephrasing: int, seed: int) -> Iterator[Answer]:
    """Questions in words that training never used, each about some pictures for which it has its usual meaning."""
    rng = Random(f"rephrased {seed}")
    for entry in json.loads(REPHRASINGS.read_text(encoding="utf-8")):
        for _ in range(per_rephrasing):
            scenes, question = _scenes_for(rng, entry["task"])
            text = question.fill(entry["text"]) if question else entry["text"]
            wanted = question.answer if question else CANNOT
            chat = rt.session()
            got = chat.ask(text, images=[draw(scene) for scene in scenes]).text
            yield Answer("rephrased", entry["task"], got == wanted, text, wanted, got, len(scenes))


def plain(rt: mmchat.Runtime) -> Iterator[Answer]:
    """One large shape in the middle, pure colours, common sizes; four questions each."""
    rng = Random("plain")
    sizes = ((200, 200), (224, 224), (300, 200), (400, 300), (640, 480), (256, 256), (512, 512), (100, 100))
    for kind in SHAPES:
        for size in sizes:
            color, background = rng.sample(sorted(COLORS), 2)
            if {color, background} in ({"red", "orange"}, {"yellow", "orange"}):
                background = "white"
            picture = draw(plain_scene(size, background, [(color, kind, "center")], radius=rng.choice((0.2, 0.3, 0.4))))
            for task, text, wanted in (
                ("color", f"What color is the {kind}?", f"The {kind} is {color}."),
                ("background", "What is the background color?", f"The background is {background}."),
                ("shape", "What shape do you see?", kind),
                ("count", "How many shapes are there?", "There is one shape."),
            ):
                got = _ask(rt, text, picture)
                right = wanted in got if task == "shape" else got == wanted
                yield Answer("plain", task, right, f"{size} {text}", wanted, got)


def tabulate(answers: Sequence[Answer]) -> dict[str, dict[str, tuple[int, int, float, float]]]:
    """title -> row -> (right, all, lower and upper end of the interval)."""
    keys: dict[str, Callable[[Answer], str | None]] = {
        "talk by task": lambda a: a.task if a.part == "talk" else None,
        "talk by images in the dialogue": lambda a: str(a.n_images) if a.part == "talk" else None,
        "talk by turns since the image": lambda a: _distance(a) if a.part == "talk" else None,
        "simple attributes by turns since": lambda a: _distance(a) if a.part == "talk" and a.task in _SIMPLE else None,
        "talk by rows before the answer": lambda a: _rows(a.n_rows) if a.part == "talk" else None,
        "history": lambda a: a.history if a.part == "gold" else None,
        "small print": lambda a: a.task if a.part == "print" else None,
        "rephrased by task": lambda a: a.task if a.part == "rephrased" else None,
        "order": lambda a: a.task if a.part == "order" else None,
        "plain pictures": lambda a: a.task if a.part == "plain" else None,
        "parts": lambda a: a.part,
    }
    figures: dict[str, dict[str, tuple[int, int, float, float]]] = {}
    for title, key in keys.items():
        groups: dict[str, list[bool]] = defaultdict(list)
        for answer in answers:
            row = key(answer)
            if row is not None:
                groups[row].append(answer.right)
                if title == "talk by task":
                    groups["all tasks"].append(answer.right)
        if groups:
            figures[title] = {row: (sum(v), len(v), *wilson(sum(v), len(v))) for row, v in sorted(groups.items())}
    return figures


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = 1.96
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


_SIMPLE = ("background", "color", "shape")


def _converse(rt: mmchat.Runtime, dialogue: Dialogue, gold: bool, max_rows: int) -> Iterator[Answer]:
    chat = rt.session()
    for turn in dialogue.turns:
        new = sum(dialogue.plans[k].n_inputs for k in turn.new)
        used = chat.prompt([]).n_rows if chat.turns else 30
        if used + new * 18 + 90 > max_rows:
            return
        reply = chat.ask(turn.question, images=[draw(dialogue.scenes[k]) for k in turn.new])
        got = reply.text
        if gold:  # what was said is replaced by what should have been
            ids = tuple(rt.tokenizer.encode(turn.answer))
            chat._turns = (*chat._turns[:-1], replace(chat._turns[-1], text=turn.answer, ids=ids))
        yield Answer(
            "gold" if gold else "talk",
            turn.task,
            got == turn.answer,
            turn.question,
            turn.answer,
            got,
            len(chat.images),
            turn.distance if turn.about else 0,
            reply.usage.n_prompt,
            "gold" if gold else "own",
            stopped=reply.stop_reason == "stop",
        )


def _scenes_for(rng: Random, task: str) -> tuple[list[Scene], Question | None]:
    """Pictures about which a question of the task has its usual form."""
    many = task in ("which", "same_background", "more", "n_images")
    while True:
        n = 2 if many else 1
        scenes = [sample_scene(rng, Style(text="" if task == "no_text" else None), held_out=True) for _ in range(n)]
        if task == "same_background" and rng.random() < 0.4:
            scenes[1] = sample_scene(rng, Style(background=scenes[0].background), held_out=True)
        plans = [view_plan(scene.size) for scene in scenes]
        if task == "cannot":
            return scenes, None
        if task == "n_images":
            return scenes, Question(task, (), f"There are {NUMBERS[n]} images.")
        wanted = "text" if task in ("number", "word") else task
        try:
            question = about_many(rng, scenes, plans, wanted) if many else about_one(rng, scenes[0], plans[0], wanted)
        except ValueError:
            continue
        if question.usual and question.task == task:
            return scenes, question


def _ask(rt: mmchat.Runtime, text: str, picture: Image) -> str:
    return rt.session().ask(text, images=[picture]).text


def _distance(answer: Answer) -> str:
    return str(answer.distance) if answer.distance < 3 else "3 and more"


def _rows(n: int) -> str:
    return f"{n // 256 * 256:>4} to {n // 256 * 256 + 255}"


def _share(answers: Sequence[Answer]) -> str:
    right = sum(answer.right for answer in answers)
    stopped = sum(answer.stopped for answer in answers)
    return f"{right} of {len(answers)} right ({right / max(1, len(answers)):.1%}), {stopped} ended by themselves"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate a demo model folder through the runtime.")
    parser.add_argument("model", nargs="?", default="demo", help="model folder, or demo")
    parser.add_argument("--answers", type=int, default=2000, help="answers of the part talk; the others follow")
    parser.add_argument("--per-rephrasing", type=int, default=3)
    parser.add_argument("--parts", default="talk,gold,print,rephrased,plain,order")
    parser.add_argument("--json", default="", help="file for the figures and all wrong answers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
