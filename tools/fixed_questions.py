"""Two hundred small conversations about rendered pictures, which the shipped demo model answers right.

They are the end-to-end regression of the pipeline: tests put them to every engine.  A conversation is made from its
seed alone; tests/data/fixed_questions.json keeps only the seeds.  After new weights:

    python -m tools.fixed_questions demo       # keeps the first 200 seeds all of whose answers are right
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import mmchat
from tools.render_scenes import Style, draw, sample_scene, view_plan
from tools.scene_talk import Dialogue, make_dialogue

FILE = Path(__file__).parent.parent / "tests" / "data" / "fixed_questions.json"
N = 200


def conversation(seed: int) -> Dialogue:
    """One to three pictures (more often one), held out of training, and as many questions or one more."""
    rng = Random(f"fixed {seed}")
    n_images = rng.choices((1, 2, 3), (0.6, 0.28, 0.12))[0]
    style = Style(p_sliced=0.4 if n_images == 1 else 0.2, max_shapes=4 if n_images == 1 else 3)
    scenes = [sample_scene(rng, style, held_out=True) for _ in range(n_images)]
    plans = [view_plan(scene.size) for scene in scenes]
    return make_dialogue(rng, scenes, plans, n_images + rng.randint(0, 1), extras=False)


def answers(rt: mmchat.Runtime, dialogue: Dialogue) -> Iterator[tuple[str, str, str]]:
    """(question, wanted, got) of every turn of one conversation."""
    chat = rt.session()
    for turn in dialogue.turns:
        got = chat.ask(turn.question, images=[draw(dialogue.scenes[k]) for k in turn.new]).text
        yield turn.question, turn.answer, got


def fixed_seeds() -> list[int]:
    """The seeds of the conversations that tests lean on."""
    seeds: list[int] = json.loads(FILE.read_text(encoding="utf-8"))
    return seeds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Choose the fixed questions anew.")
    parser.add_argument("model", nargs="?", default="demo", help="model folder, or demo")
    options = parser.parse_args(arguments)
    kept: list[int] = []
    tasks: Counter[str] = Counter()
    seed = 0
    with tempfile.TemporaryDirectory() as store, mmchat.open(options.model, store=store) as rt:
        while len(kept) < N:
            dialogue = conversation(seed)
            if all(wanted == got for _, wanted, got in answers(rt, dialogue)):
                kept.append(seed)
                tasks.update(turn.task for turn in dialogue.turns)
            seed += 1
    FILE.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    print(f"{len(kept)} of {seed} conversations right throughout; questions by task: {dict(tasks.most_common())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
