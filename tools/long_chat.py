"""One conversation of hundreds of turns and tens of pictures in a context that holds few of them.

    python -m tools.long_chat --turns 300 --pictures 60 --context 1024 --json figures.json

Scenes nobody has seen (tools.render_scenes), questions with known answers (tools.scene_talk), pictures named by their
handles.  Printed: whether the cap was ever passed; what was degraded, and whether the replies said all of it; rows
prefilled per new row; memory of the program and its workers over the last third of the turns against the third before;
and right answers, to the letter, about pictures that were still sent, against the same question in a fresh chat with
that picture in the same form.  The fresh chats come afterwards, so that they cost the long one nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mmchat
from tools.render_scenes import Scene, Style, draw, sample_scene, view_plan
from tools.scene_talk import about_one, word

Memory = dict[str, int]  # resident bytes, by process


@dataclass(frozen=True)
class Shown:
    """A picture of the script: what is on it, and its file."""

    scene: Scene
    file: Path


@dataclass(frozen=True)
class Asked:
    """One turn.  about: place of the picture in the conversation, from 0.

    form: how that was sent; "degraded" where it lost what it was asked about with this very question.

    text: with the picture's handle in it, where it is an earlier one.
    """

    text: str
    about: int
    task: str
    wanted: str
    got: str
    form: str
    is_new: bool
    usage: mmchat.Usage
    n_changes: int
    is_over: bool
    is_untold: bool
    memory: Memory

    @property
    def right(self) -> bool:
        return self.got == self.wanted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a demo model folder")
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024, metavar="ROWS")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--policy", help="steps of the ladder, as mmchat chat takes them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        mmchat.open(
            options.model, store=Path(folder) / "store", context_rows=options.context, n_threads=options.threads
        ) as rt,
    ):
        began = time.monotonic()
        pictures, asked = converse(
            rt, Path(folder), options.turns, options.pictures, options.max_new_tokens, options.policy, options.seed
        )
        print(f"{len(asked)} turns, {len(pictures)} pictures ({time.monotonic() - began:.0f} s)", flush=True)
        figures = tabulate(asked, options.context)
        print("\n".join(describe(figures)), flush=True)
        fresh = [ask_afresh(rt, pictures, turn, max_new_tokens=options.max_new_tokens) for turn in asked]
    figures["answers"] = compare(asked, fresh)
    for form, found in figures["answers"].items():
        print(
            f"{form:<9} {found['right']:6.1%} right of {found['n']}, in a fresh chat {found['fresh']:6.1%} "
            f"(difference {found['difference']:+.1%}, 95 % within {found['within']:.1%})"
        )
    print(f"{time.monotonic() - began:.0f} s in all")
    if options.json:
        wrong = [
            {"asked": turn.text, "wanted": turn.wanted, "got": turn.got, "form": turn.form, "fresh": other}
            for turn, other in zip(asked, fresh, strict=True)
            if not turn.right
        ]
        text = json.dumps({"figures": figures, "wrong": wrong}, indent=1)
        Path(options.json).write_text(f"{text}\n", encoding="utf-8")
    return 0


def converse(
    rt: mmchat.Runtime, folder: Path, n_turns: int, n_pictures: int, max_new_tokens: int, policy: str | None, seed: int
) -> tuple[list[Shown], list[Asked]]:
    """The long conversation.  Every new picture comes with a question; the others are about one that is still sent.

    The pictures are drawn beforehand, into folder: what that takes is not the conversation's memory.
    """
    rng = Random(f"long chat {seed}")
    arrivals = {0, *rng.sample(range(1, n_turns), n_pictures - 1)}
    drawn = [_invent(rng, folder / f"{number}.png") for number in range(n_pictures)]
    chat = rt.session(policy=policy)
    pictures: list[Shown] = []
    asked: list[Asked] = []
    for number in range(n_turns):
        is_new = number in arrivals
        if is_new:
            pictures.append(drawn[len(pictures)])
            about = len(pictures) - 1
        else:
            about = rng.choice([int(name.removeprefix("img")) - 1 for name in chat.numbers] or [len(pictures) - 1])
        handle = f"img{about + 1}"
        form = "whole" if is_new else chat.marks.forms.get(handle, "whole")
        scene = pictures[about].scene
        question = about_one(rng, scene, view_plan(scene.size, 1 if form == "overview" else 9))
        name = "" if is_new else f"@{handle}"
        text = word(rng, question.worded(rng), name, f" {name or 'the image'}")
        before = chat.marks
        reply = chat.ask(text, [pictures[about].file] if is_new else [], temperature=0.0, max_new_tokens=max_new_tokens)
        got, usage = reply.text, reply.usage
        sent = {image.id: image.form for image in reply.plan.images}
        told = {change.what for change in reply.degraded}
        after = chat.marks
        changed = {name for name, kind in after.forms.items() if before.forms.get(name) != kind}
        changed |= {f"turn {turn}" for turn in after.dropped - before.dropped}
        asked.append(
            Asked(
                text,
                about,
                question.task,
                question.answer,
                got,
                sent[handle] if sent[handle] == form else "degraded",
                is_new,
                usage,
                len(reply.degraded),
                is_over=usage.n_prompt + max(usage.n_new, max_new_tokens) > rt.context_rows,
                is_untold=not changed <= told,
                memory=_memory(rt),
            )
        )
    return pictures, asked


def _invent(rng: Random, file: Path) -> Shown:
    scene = sample_scene(rng, Style(p_sliced=0.5, max_shapes=3), held_out=True)
    draw(scene).save(file, "PNG")
    return Shown(scene, file)


def ask_afresh(rt: mmchat.Runtime, pictures: Sequence[Shown], turn: Asked, *, max_new_tokens: int) -> str:
    """The same question about the same picture, in the same form, as the first of a conversation."""
    chat = rt.session(max_slice_nums=1 if turn.form == "overview" else None)
    text = turn.text.replace(f"@img{turn.about + 1}", "@img1")
    return chat.ask(text, [pictures[turn.about].file], temperature=0.0, max_new_tokens=max_new_tokens).text


def tabulate(asked: Sequence[Asked], context_rows: int) -> dict[str, Any]:
    last, before = _thirds(asked)
    # New rows: those of a turn's prompt that the one before had not, and which it did not generate.
    new = [asked[0].usage.n_prompt]
    for turn, other in zip(asked[1:], asked, strict=False):
        known = other.usage.n_prompt + other.usage.n_new
        new.append(turn.usage.n_prompt - known if not turn.n_changes else 0)
    untrimmed = [n for n, turn in zip(new, asked, strict=True) if not turn.n_changes]
    return {
        "turns": len(asked),
        "context_rows": context_rows,
        "over_the_cap": sum(turn.is_over for turn in asked),
        "most_rows": max(turn.usage.n_prompt + turn.usage.n_new for turn in asked),
        "trims": sum(turn.n_changes > 0 for turn in asked),
        "changes": sum(turn.n_changes for turn in asked),
        "untold": sum(turn.is_untold for turn in asked),
        "restarts": sum(turn.usage.restarts for turn in asked),
        "rows_prefilled": sum(turn.usage.n_prefilled for turn in asked),
        "rows_prefilled_without_trims": sum(turn.usage.n_prefilled for turn in asked if not turn.n_changes),
        "rows_new_without_trims": sum(untrimmed),
        "slices_encoded": sum(turn.usage.slices_encoded for turn in asked),
        "seconds_per_turn": statistics.mean(turn.usage.total_s for turn in asked),
        "memory_mb": {
            name: {
                "before": _mb(before, name),
                "last": _mb(last, name),
                "growth": _mb(last, name) / _mb(before, name) - 1,
            }
            for name in asked[-1].memory
        },
    }


def _thirds(asked: Sequence[Asked]) -> tuple[Sequence[Asked], Sequence[Asked]]:
    n = max(1, len(asked) // 3)
    return asked[-n:], asked[-2 * n : -n] or asked[-n:]


def _mb(turns: Sequence[Asked], process: str) -> float:
    return statistics.mean(turn.memory.get(process, turn.memory["program"]) for turn in turns) / 1e6


def describe(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"over the cap of {figures['context_rows']}: {figures['over_the_cap']} turns; most rows {figures['most_rows']}",
        f"degraded {figures['changes']} things in {figures['trims']} trims; turns that did not say so: "
        f"{figures['untold']}; restarts {figures['restarts']}",
        f"rows prefilled {figures['rows_prefilled']}; without trims {figures['rows_prefilled_without_trims']} for "
        f"{figures['rows_new_without_trims']} new ones; slices encoded {figures['slices_encoded']}; "
        f"{figures['seconds_per_turn']:.2f} s per turn",
    ]
    for name, found in figures["memory_mb"].items():
        lines.append(
            f"memory of {name}: {found['before']:.1f} MB, then {found['last']:.1f} MB ({found['growth']:+.2%}) "
            "in the last third of the turns"
        )
    return lines


def compare(asked: Sequence[Asked], fresh: Sequence[str]) -> dict[str, dict[str, float]]:
    """By form, and together: the share of right answers here and in fresh chats, on the same questions."""
    found: dict[str, dict[str, float]] = {}
    for form in ("whole", "overview", "in context"):
        pairs = [
            (turn.right, other == turn.wanted)
            for turn, other in zip(asked, fresh, strict=True)
            if turn.form == form or (form == "in context" and turn.form in ("whole", "overview"))
        ]
        if not pairs:
            continue
        n = len(pairs)
        differences = [int(here) - int(there) for here, there in pairs]
        spread = statistics.pstdev(differences) if n > 1 else 1.0
        found[form] = {
            "n": n,
            "right": sum(here for here, _ in pairs) / n,
            "fresh": sum(there for _, there in pairs) / n,
            "difference": sum(differences) / n,
            "within": 1.96 * spread / math.sqrt(n),
        }
    return found


def _memory(rt: mmchat.Runtime) -> Memory:
    """What each process holds in memory now."""
    pids = {"program": "self", "LLM worker": rt.llm.worker.pid, "vision worker": rt.vision.worker.pid}
    found = {}
    for name, pid in pids.items():
        if pid is not None:
            status = Path(f"/proc/{pid}/status").read_text()
            found[name] = 1024 * int(status.split("VmRSS:")[1].split()[0])
    found["all together"] = sum(found.values())
    return found


if __name__ == "__main__":
    raise SystemExit(main())
