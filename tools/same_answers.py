"""How often two demo models, or one model on other numbers of threads, give the same greedy answer to the letter.

    python -m tools.same_answers OUT/model OUT/model-float32 --answers 300     # stored in float16 against float32
    python -m tools.same_answers demo demo --threads 1,2

The questions are the held-out dialogues of tools.eval_demo_model; each model has its own answers in the history.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import mmchat
from tools.eval_demo_model import talk, wilson


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    threads = [int(part) for part in options.threads.split(",")]
    said: list[list[str]] = []
    for model, n_threads in zip((options.a, options.b), (threads[0], threads[-1]), strict=True):
        with tempfile.TemporaryDirectory() as store, mmchat.open(model, store=store, n_threads=n_threads) as rt:
            said.append([answer.got for answer in talk(rt, options.answers, options.seed)])
    same = sum(one == other for one, other in zip(*said, strict=True))
    n = len(said[0])
    low, high = wilson(same, n)
    print(f"same: {same} of {n} answers ({same / n:.1%}, 95 % interval {low:.1%} to {high:.1%})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the greedy answers of two demo models.")
    parser.add_argument("a", help="model folder, or demo")
    parser.add_argument("b", help="model folder, or demo")
    parser.add_argument("--threads", default="2", help="CPU threads of both, or of each: 1,2")
    parser.add_argument("--answers", type=int, default=300)
    parser.add_argument("--seed", type=int, default=2)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
