"""Trains the demo model: from nothing, or from another demo model folder, to a folder that mmchat opens.

    python -m tools.train_demo_model OUT --minutes 90
    python -m tools.train_demo_model OUT --stages vision:24,joint:22,llm:40 --init FOLDER

Three stages, each with its own warm-up and a long decay of the learning rate (the decay is where most is gained):
vision: tower and resampler learn dense labels through throw-away heads, without a language model;
joint: everything, on dialogues of all lengths, the labels still helping a little;
llm: the language model alone, on long dialogues over the cached rows of thousands of pictures, with dense labels too.

OUT/model is the shipped folder (the running average of the weights, float16), written every few minutes and at
the end; OUT/model-float32 is the same before rounding (tools.same_answers compares them).  OUT/checkpoint.pt holds all
that `--resume` needs; a killed run is continued with the same command and `--resume`.
The clock of a stage counts saving, but not judging and not what comes before the first batch.

Of two runs with other seeds, one per CPU core, each can go on from the mean of both at every save (--beside).  On
held-out views, after 32 minutes, .88 of the shapes and .84 of the texts were right in each, and .90 and .88 in their
mean, before a minute was trained from there.  tools.average_weights makes the mean of what the two end with.

On CPUs set MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=200000000: glibc then
keeps the big buffers, and a step of the optimiser took 31 ms instead of 518 (two cores, November 2026).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from mmchat.prompt import ChatTokenizer
from mmchat.slicing import SlicePlan
from tools.demo_torch import DemoConfig, DemoModel, save_both, vision_inputs
from tools.dialogue_batches import (
    P_LIKE,
    QUERY_NUM,
    CachedData,
    JointData,
    PoolData,
    TextBatch,
    VisionBatch,
    vision_batch,
)
from tools.fact_labels import ABOUT, ASKED, HAS, IMAGE, IN_ANSWER, IN_TURN, MAX_IMAGES, NAMES, WHOLE
from tools.muon import Muon
from tools.render_scenes import Scene, Style, sample_scene
from tools.scene_views import (
    IGNORED,
    MAX_CHARACTERS,
    PATCH_CLASSES,
    ROW_CLASSES,
    View,
    sampled_views,
)

_AVERAGE_KEEPS = 0.99
_SAVE_EVERY_S = 150.0
_PRINT_EVERY_S = 20.0
_MEETING_S = 40.0
_JUDGE_EVERY_S = 300.0
_FACTS_WEIGHT = 0.1
# The pool of cached pictures is filled in quarters, so many steps apart: the first answers need not wait for all.
_POOL_STEPS = 400
# Of the scenes whose views teach the encoder: three and four shapes, and one or two with little print.
_P_CROWDED, _P_SPARSE = 0.3, 0.25


@dataclass(frozen=True)
class StagePlan:
    """How one stage learns.  peak: learning rate of the matrices (the rest takes half).  decay: last part of it.

    batch: views (vision, joint) or rows (llm)."""

    name: str
    minutes: float
    peak: float
    batch: int
    warm: float
    decay: float
    clip: float


_DEFAULTS = {
    "vision": StagePlan("vision", 0.3, 3e-3, 64, 0.04, 0.6, 5.0),
    "joint": StagePlan("joint", 0.27, 1.5e-3, 48, 0.02, 0.95, 1.0),
    "llm": StagePlan("llm", 0.43, 2e-3, 3072, 0.02, 0.95, 1.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.init_vision or options.init_heads) and not options.init:
        parser.error("--init-vision and --init-heads come on top of --init")
    torch.manual_seed(options.seed)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    plans = _plans(options)
    for number, plan in enumerate(plans):
        if number >= trainer.stage:
            trainer.stage = number
            trainer.run_stage(plan)
            trainer.stage, trainer.stage_s = number + 1, 0.0
            trainer.save()
    print(f"done: {trainer.out / 'model'}", flush=True)
    return 0


class Trainer:
    """The model, its working copy, its running average, and where in the plan the run is.

    The working copy is in bfloat16 where that is fast; else it is the model itself.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device)
        self.stage, self.stage_s = 0, 0.0
        checkpoint = self._checkpoint() if options.resume else None
        if checkpoint is not None:
            self.tokenizer_json = str(checkpoint["tokenizer"])
        else:
            self.tokenizer_json = _tokenizer_json(options)
        tokenizer_file = self.out / "tokenizer.json"
        tokenizer_file.write_text(self.tokenizer_json, encoding="utf-8")
        self.tokenizer = ChatTokenizer(tokenizer_file)
        self.config = DemoConfig.of(self.tokenizer.n_ids)
        self.model = DemoModel(self.config)
        self.heads = LabelHeads(self.config)
        self.fact_heads = FactHeads(self.config)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.heads.load_state_dict(checkpoint["heads"])
            self.fact_heads.load_state_dict(checkpoint["fact_heads"])
            self.stage, self.stage_s = int(checkpoint["stage"]), float(checkpoint["stage_s"])
        elif options.init:
            load_weights(self.model, Path(options.init), self.tokenizer)
            if options.init_vision:
                other = DemoModel(self.config)
                load_weights(other, Path(options.init_vision), self.tokenizer)
                seen = {name: value for name, value in other.state_dict().items() if not name.startswith("llm.")}
                self.model.load_state_dict(seen, strict=False)
            if options.init_heads:
                self.heads.load_state_dict(torch.load(options.init_heads, weights_only=True))
                facts_file = Path(options.init_heads).with_name("fact_heads.pt")
                if facts_file.exists():
                    self.fact_heads.load_state_dict(torch.load(facts_file, weights_only=True))
        self.model.to(self.device)
        self.heads.to(self.device)
        self.fact_heads.to(self.device)
        self.dtype = torch.bfloat16 if options.bfloat16 else torch.float32
        self.work = copy.deepcopy(self.model).bfloat16() if options.bfloat16 else self.model
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if checkpoint is not None:
            self.average = {name: value.to(self.device) for name, value in checkpoint["average"].items()}
        if options.compile:
            setattr(self.work, "encode", torch.compile(self.work.encode, dynamic=True))  # noqa: B010 (mypy)
            text = self.work.llm.model
            setattr(text, "run_deep", torch.compile(text.run_deep, dynamic=True))  # noqa: B010
        both = zip(self.model.parameters(), self.work.parameters(), strict=True)
        self._pairs = [(master, working) for master, working in both if master is not working]
        self._optimisers: list[torch.optim.Optimizer] = []
        self._saved_at = time.monotonic()
        self._resumed_optimisers = checkpoint["optimisers"] if checkpoint is not None else None

    def run_stage(self, plan: StagePlan) -> None:
        """Train until the stage's minutes are used up."""
        self._make_optimisers(plan)
        total_s = plan.minutes * 60
        losses = {"vision": self._vision_losses, "joint": self._joint_losses, "llm": self._llm_losses}[plan.name](plan)
        log: deque[dict[str, float]] = deque(maxlen=60)
        step, samples, printed_at, began = 0, 0, time.monotonic(), time.monotonic()
        start_s = self.stage_s
        begin_s = judged_at = time.monotonic()
        while self.stage_s < total_s:
            part = self.stage_s / total_s
            rate = min(1.0, part / plan.warm + 0.02) * min(1.0, max(0.01, (1 - part) / plan.decay))
            if self.stage_s - start_s < 15:  # gently after a restart, too
                rate *= 0.1 + 0.06 * (self.stage_s - start_s)
            loss, figures, n = next(losses)
            if step == 0:
                # What was prepared before the first batch is not training.
                begin_s = printed_at = judged_at = time.monotonic()
            self._update(loss, plan.peak * rate, plan.clip)
            step, samples = step + 1, samples + n
            log.append(figures)
            now = time.monotonic()
            self.stage_s = start_s + now - begin_s
            if now - printed_at > _PRINT_EVERY_S:
                shown = "  ".join(f"{key} {_mean(log, key):.3f}" for key in figures)
                print(
                    f"{plan.name} {self.stage_s / 60:.1f}/{plan.minutes:.1f} min  step {step}  {shown}  "
                    f"{samples / (now - begin_s):.1f}/s  rate {plan.peak * rate:.1e}",
                    flush=True,
                )
                printed_at = now
            if now - self._saved_at > _SAVE_EVERY_S:
                self.save()
                self.meet()
            if plan.name != "vision" and now - judged_at > _JUDGE_EVERY_S:
                self.judge()
                judged_at = time.monotonic()
                start_s -= judged_at - now  # the clock counts training only
        self.save()
        if plan.name != "vision":
            self.judge()
        print(f"{plan.name}: {step} steps, {samples} samples, {time.monotonic() - began:.0f} s", flush=True)

    def save(self) -> None:
        """The checkpoint, the heads and the model folder."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "fact_heads": self.fact_heads.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "tokenizer": self.tokenizer_json,
            "stage": self.stage,
            "stage_s": self.stage_s,
        }
        unfinished = self.out / "checkpoint.part"
        torch.save(state, unfinished)
        unfinished.replace(self.out / "checkpoint.pt")
        torch.save(self.heads.state_dict(), self.out / "heads.pt")
        torch.save(self.fact_heads.state_dict(), self.out / "fact_heads.pt")
        save_both(self.model, self.out, self.tokenizer_json, self.tokenizer.special, self.average)
        self._saved_at = time.monotonic()

    @torch.no_grad()
    def meet(self) -> bool:
        """Go on from the mean of these weights and those that the run beside saves now, if it is about as far."""
        path = Path(self.options.beside) / "checkpoint.pt"
        if not self.options.beside or not path.exists():
            return False
        deadline = time.monotonic() + _MEETING_S
        while True:
            other = torch.load(path, weights_only=True, map_location=self.device)
            behind_s = self.stage_s - other["stage_s"]
            if other["stage"] != self.stage or abs(behind_s) > 2 * _SAVE_EVERY_S:
                return False
            if behind_s < _SAVE_EVERY_S / 2:  # else it is about to save: what it was before would be a step back
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(1.0)
        for name, own in (
            ("model", self.model.state_dict()),
            ("heads", self.heads.state_dict()),
            ("fact_heads", self.fact_heads.state_dict()),
            ("average", self.average),
        ):
            torch._foreach_lerp_(list(own.values()), [other[name][key] for key in own], 0.5)
        self._refresh_work()
        self._saved_at = time.monotonic()  # so that both save next at the same time
        return True

    def _refresh_work(self) -> None:
        """The working copy, where there is one, is what the model has become."""
        if self._pairs:
            torch._foreach_copy_([working for _, working in self._pairs], [master for master, _ in self._pairs])

    def _checkpoint(self) -> dict[str, Any] | None:
        path = self.out / "checkpoint.pt"
        loaded: dict[str, Any] | None = (
            torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
        )
        return loaded

    def _make_optimisers(self, plan: StagePlan) -> None:
        named = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if plan.name == "joint" or name.startswith("llm.") == (plan.name == "llm")
        ]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "query" not in name]
        known = set(map(id, matrices))
        rest = [p for _, p in named if id(p) not in known]
        rest += [*self.heads.parameters(), *self.fact_heads.parameters()]
        self._optimisers = [
            Muon(matrices, lr=plan.peak, weight_decay=0.02, dtype=self.dtype),
            torch.optim.AdamW(rest, lr=plan.peak / 2, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        if self._resumed_optimisers and self.stage_s > 0:
            for optimiser, state in zip(self._optimisers, self._resumed_optimisers, strict=True):
                optimiser.load_state_dict(state)
        self._resumed_optimisers = None
        self._learning = matrices + rest

    def _update(self, loss: Tensor, rate: float, clip: float) -> None:
        for optimiser, part in zip(self._optimisers, (1.0, 0.5), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * part
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for master, working in self._pairs:
            if working.grad is not None:
                master.grad = working.grad.float()
                working.grad = None
        nn.utils.clip_grad_norm_(self._learning, clip)
        for optimiser in self._optimisers:
            optimiser.step()
        with torch.no_grad():
            self._refresh_work()
            values = list(self.model.state_dict().values())
            torch._foreach_lerp_(list(self.average.values()), values, 1 - _AVERAGE_KEEPS)

    def encode(self, patches: Tensor, grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Patch features and LLM rows of a batch of views, by the working copy."""
        positions, sincos, mask = vision_inputs(self.config, grids, patches.shape[1])
        moved = (t.to(self.device) for t in (patches.to(self.dtype), positions, sincos.to(self.dtype), mask))
        features, rows = self.work.encode(*moved)
        return features, rows

    def _vision_losses(self, plan: StagePlan) -> Iterator[tuple[Tensor, dict[str, float], int]]:
        seed = self.options.seed * 1000 + int(self.stage_s)
        for batch in _loader(_VisionData(plan.batch, seed)):
            features, rows = self.encode(batch.patches, batch.grids)
            loss, figures = self.heads(features, rows, batch)
            yield loss, figures, len(batch.grids)

    def _joint_losses(self, plan: StagePlan) -> Iterator[tuple[Tensor, dict[str, float], int]]:
        seed = self.options.seed * 1000 + int(self.stage_s)
        labelled = _loader(_VisionData(self.options.labelled_views, seed)) if self.options.labelled_views else None
        for batch in _loader(JointData(str(self.out / "tokenizer.json"), plan.batch, seed)):
            assert batch.vision is not None
            features, rows = self.encode(batch.vision.patches, batch.vision.grids)
            aux, seen = self.heads(features, rows, batch.vision)
            if labelled is not None:
                more = next(labelled)
                aux_more, seen = self.heads(*self.encode(more.patches, more.grids), more)
                aux = aux + aux_more
            said, figures = self._talk_loss(batch, rows.flatten(0, 1))
            kept = {"seen": seen["seen"], "read": seen["read"]}
            n_answers = sum(len(dialogue.turns) for dialogue in batch.dialogues)
            yield said + self.options.labels_weight * aux, {**figures, **kept}, n_answers

    def _llm_losses(self, plan: StagePlan) -> Iterator[tuple[Tensor, dict[str, float], int]]:
        seed = self.options.seed * 1000 + int(self.stage_s)
        pool: list[tuple[Scene, SlicePlan]] = []
        rows: list[Tensor] = []
        batches: Iterator[TextBatch] = iter(())
        tokenizer_file = str(self.out / "tokenizer.json")
        filling = _loader(PoolData(seed))
        kept = Path(self.options.pool_file) if self.options.pool_file else None
        reads = kept is not None and kept.exists()
        for step in itertools.count():
            if step % _POOL_STEPS == 0 and reads:
                pool, rows = torch.load(kept, weights_only=False)  # scenes are pickled: files of one's own only
                batches = _loader(CachedData(tokenizer_file, list(pool), plan.batch, seed + step))
                print(f"pool: {len(pool)} pictures", flush=True)
                reads = not self.options.resume  # by a run that was killed it may be half full
            elif step % _POOL_STEPS == 0 and len(pool) < self.options.pool:
                self._fill_pool(pool, rows, filling, min(len(pool) + self.options.pool // 4, self.options.pool))
                batches = _loader(CachedData(tokenizer_file, list(pool), plan.batch, seed + step))
                if kept is not None:
                    unfinished = kept.with_name(f"{kept.name}.part")
                    torch.save((pool, rows), unfinished)
                    unfinished.replace(kept)
            batch = next(batches)
            shown = [rows[k] if k >= 0 else rows[~k][:QUERY_NUM] for pictures in batch.pictures for k in pictures]
            cached = torch.cat(shown).to(self.device, self.dtype) if shown else None
            loss, figures = self._talk_loss(batch, cached)
            yield loss, figures, sum(len(dialogue.turns) for dialogue in batch.dialogues)

    def _talk_loss(self, batch: TextBatch, image_rows: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        """image_rows: (rows, width) of all pictures in order.  right: answers with every token right."""
        ids, labels = batch.ids.to(self.device), batch.labels.to(self.device)
        embedded = self.work.embed(ids, ids == self.tokenizer.special["<unk>"], image_rows)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        said = (following != IGNORED).nonzero()[:, 0]
        cos, sin = self.work.rope(0, ids.shape[1], embedded)
        half, late, hidden = self.work.llm.model.run_deep(embedded, cos, sin, said)
        logits = self.work.logits(hidden).float()
        wanted = following[said]
        loss = F.cross_entropy(logits, wanted)
        verdicts = _answers_right(logits.argmax(-1) == wanted, wanted, self.tokenizer.special["<|im_end|>"])
        figures = {"loss": float(loss.detach()), "right": sum(verdicts) / max(1, len(verdicts))}
        if batch.facts is None:
            return loss, figures
        known, seen = self.fact_heads(half.flatten(0, 1), late.flatten(0, 1), batch.facts.to(self.device).flatten(0, 1))
        return loss + _FACTS_WEIGHT * known, {**figures, **seen}

    @torch.no_grad()
    def _fill_pool(
        self,
        pool: list[tuple[Scene, SlicePlan]],
        rows: list[Tensor],
        filling: Iterator[tuple[list[tuple[Scene, SlicePlan]], VisionBatch]],
        n_scenes: int,
    ) -> None:
        """Grow the pool to n_scenes pictures; rows gets the LLM rows of each: (inputs * query_num, width) float16."""
        began = time.monotonic()
        while len(pool) < n_scenes:
            cut, vision = next(filling)
            _, encoded = self.encode(vision.patches, vision.grids)
            per_scene = torch.split(encoded.half().cpu(), [plan.n_inputs for _, plan in cut])
            rows += [scene_rows.flatten(0, 1).clone() for scene_rows in per_scene]
            pool += cut
        print(f"pool: {len(pool)} pictures, {time.monotonic() - began:.0f} s", flush=True)

    @torch.no_grad()
    def judge(self) -> None:
        """Held-out answers right, by task, with the averaged weights and the gold history (teacher forcing)."""
        began = time.monotonic()
        judge = DemoModel(self.config).to(self.device)
        judge.load_state_dict(self.average)
        right: dict[str, list[int]] = defaultdict(list)
        data = JointData(str(self.out / "tokenizer.json"), 64, 0, held_out=True)
        for batch in itertools.islice(data, self.options.judge_batches):
            assert batch.vision is not None
            inputs = vision_inputs(self.config, batch.vision.grids, batch.vision.patches.shape[1])
            _, rows = judge.encode(batch.vision.patches.float().to(self.device), *(t.to(self.device) for t in inputs))
            ids, labels = batch.ids.to(self.device), batch.labels.to(self.device)
            embedded = judge.embed(ids, ids == self.tokenizer.special["<unk>"], rows.flatten(0, 1))
            hidden = judge.llm.model.run(embedded, *judge.rope(0, ids.shape[1], embedded))
            said = labels[:, 1:] != IGNORED
            wanted = labels[:, 1:][said]
            hits = judge.logits(hidden[:, :-1][said]).argmax(-1) == wanted
            verdicts = _answers_right(hits, wanted, self.tokenizer.special["<|im_end|>"])
            turns = [turn for dialogue in batch.dialogues for turn in dialogue.turns]
            for turn, verdict in zip(turns, verdicts, strict=True):
                right[turn.task].append(verdict)
                right["ALL"].append(verdict)
        torch.set_num_threads(self.options.threads)
        shown = "  ".join(f"{task} {sum(v) / len(v):.2f}/{len(v)}" for task, v in sorted(right.items()))
        print(f"held out ({time.monotonic() - began:.0f} s): {shown}", flush=True)


class LabelHeads(nn.Module):
    """Linear heads on patches and rows; they are thrown away after training."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.patch = nn.Linear(config.vision_hidden_size, sum(PATCH_CLASSES))
        self.row = nn.Linear(config.hidden_size, sum(ROW_CLASSES))

    def forward(self, features: Tensor, rows: Tensor, batch: VisionBatch) -> tuple[Tensor, dict[str, float]]:
        patch_labels = batch.patch_labels.to(features.device).flatten(0, 1)
        used = patch_labels[:, -1] != IGNORED - 1  # padding
        patch_labels = patch_labels[used]
        patch_logits = self.patch(features.float().flatten(0, 1)[used]).split(PATCH_CLASSES, -1)
        row_labels = batch.row_labels.to(rows.device).flatten(0, 1)
        row_logits = self.row(rows.float().flatten(0, 1)).split(ROW_CLASSES, -1)

        loss = _class_loss(patch_logits[0], patch_labels[:, 0]) + _class_loss(patch_logits[1], patch_labels[:, 1])
        for slot, weight in zip(range(3), (1.0, 0.7, 0.3), strict=True):
            loss = loss + weight * _rare_loss(patch_logits[2 + slot], patch_labels[:, 2 + slot], 0.04)
        for column, weight in zip(range(4), (1.0, 1.0, 1.0, 0.5), strict=True):
            loss = loss + weight * _class_loss(row_logits[column], row_labels[:, column])
        for slot, weight in zip(range(MAX_CHARACTERS), (1.0, 0.9, 0.8, 0.5, 0.4, 0.3), strict=True):
            common = 0.1 if slot == 0 else 0.4
            loss = loss + weight * _rare_loss(row_logits[4 + slot], row_labels[:, 4 + slot], common)
        return loss, _figures(loss, row_logits, row_labels)


class FactHeads(nn.Module):
    """Linear heads on what the language model holds at a row; they are thrown away after training."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.middle = nn.Linear(config.hidden_size, 2 * MAX_IMAGES + 1 + 2 * len(NAMES))
        self.late = nn.Linear(config.hidden_size, 2 + ASKED - HAS)

    def forward(self, half: Tensor, late: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """half, late: (rows, width), halfway and before the last layer.  labels: (rows, N_FACT_LABELS)."""
        labels = labels.long()
        image, about, whole, names = self.middle(half.float()).split((MAX_IMAGES, MAX_IMAGES, 1, 2 * len(NAMES)), -1)
        named = (labels[:, IN_TURN] != IGNORED).nonzero()[:, 0]
        again, has = self.late(late[named].float()).split((2, ASKED - HAS), -1)
        wanted = labels[named]
        loss = _class_loss(image, labels[:, IMAGE]) + _class_loss(about, labels[:, ABOUT])
        loss = loss + 0.5 * _flag_loss(whole[:, 0], labels[:, WHOLE]) + 6 * _flag_loss(names, labels[:, ASKED:])
        loss = loss + 3 * _flag_loss(again, wanted[:, IN_TURN:HAS]) + 4 * _flag_loss(has, wanted[:, HAS:ASKED])
        with torch.no_grad():
            in_answer = wanted[:, IN_ANSWER]
            figures = {
                "image": _share_right(image.argmax(-1), labels[:, IMAGE]),
                "about": _share_right(about.argmax(-1), labels[:, ABOUT]),
                "names": _share_right((names > 0).long(), torch.where(labels[:, ASKED:] == 1, 1, IGNORED)),
                "again": _share_right((again[:, 1] > 0).long(), torch.where(in_answer == 1, 1, IGNORED)),
                "new": _share_right((again[:, 1] > 0).long(), torch.where(in_answer == 0, 0, IGNORED)),
                "has": _share_right((has > 0).long(), torch.where(wanted[:, HAS:ASKED] == 1, 1, IGNORED)),
                "not": _share_right((has > 0).long(), torch.where(wanted[:, HAS:ASKED] == 0, 0, IGNORED)),
            }
        return loss, figures


class _VisionData(IterableDataset[VisionBatch]):
    def __init__(self, batch: int, seed: int) -> None:
        self._batch, self._seed = batch, seed

    def __iter__(self) -> Iterator[VisionBatch]:
        torch.set_num_threads(1)
        rng = Random(f"training views {self._seed}")
        usual = Style(p_text=0.85, p_sliced=0.6, spelling=True, p_more_text=0.7)
        many = replace(usual, p_text=0.6, p_more_text=0.3, p_like=P_LIKE)
        crowded = [replace(many, n_shapes=n) for n in (3, 4, 4)]  # learned last
        sparse = [Style(n_shapes=n, p_text=0.3) for n in (1, 1, 2)]  # else lone large shapes are forgotten
        while True:
            views: list[View] = []
            while len(views) < self._batch:
                (kind,) = rng.choices((crowded, sparse, [usual]), (_P_CROWDED, _P_SPARSE, 1 - _P_CROWDED - _P_SPARSE))
                style = rng.choice(kind)
                views += sampled_views(rng, sample_scene(rng, style, held_out=False))
            yield vision_batch(views)


def load_weights(model: DemoModel, source: Path, tokenizer: ChatTokenizer) -> None:
    """Weights of another demo model; where the vocabularies differ, rows are matched by what the tokens spell.

    source: a model folder, or a checkpoint.pt with tokenizer.json beside it.
    """
    from safetensors.torch import load_file

    if source.is_dir():
        loaded = load_file(source / "model.safetensors")
        old = ChatTokenizer(source / "tokenizer.json")
    else:
        loaded = torch.load(source, weights_only=True, map_location="cpu")["model"]
        old = ChatTokenizer(source.parent / "tokenizer.json")
    state = {key: value.float() for key, value in loaded.items()}
    name = "llm.model.embed_tokens.weight"
    table = state[name]
    mapped = model.state_dict()[name].clone()
    for number in range(tokenizer.n_ids):
        spelled = tokenizer.token_bytes(number).decode("utf-8", errors="replace")
        ids = [old.special[spelled]] if spelled in old.special else old.encode(spelled)
        if ids and "\ufffd" not in spelled:
            mapped[number] = table[ids].mean(0)
    state[name] = mapped
    model.load_state_dict(state)


def _tokenizer_json(options: argparse.Namespace) -> str:
    if options.keep_tokenizer:
        source = Path(options.init)
        return ((source if source.is_dir() else source.parent) / "tokenizer.json").read_text(encoding="utf-8")
    from tools.scene_talk import train_tokenizer

    return train_tokenizer(options.seed)


def _flag_loss(logits: Tensor, labels: Tensor) -> Tensor:
    known = labels != IGNORED
    total = F.binary_cross_entropy_with_logits(logits[known], labels[known].float(), reduction="sum")
    return total / known.sum().clamp(min=1)


def _share_right(found: Tensor, labels: Tensor) -> float:
    known = labels != IGNORED
    return float((found == labels)[known].float().mean()) if bool(known.any()) else 1.0


def _class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _rare_loss(logits: Tensor, labels: Tensor, common: float) -> Tensor:
    """Cross entropy where class 0 ("nothing here") is frequent and weighs only `common`."""
    each = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    weight = torch.where(labels > 0, 1.0, common) * (labels != IGNORED)
    return (each * weight).sum() / (weight.sum() + 3)


@torch.no_grad()
def _figures(loss: Tensor, logits: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """seen: rows with shape, colour and place right.  read: texts with all characters right."""
    seen = torch.stack([logits[i].argmax(-1) == labels[:, i] for i in range(3)]).all(0)[labels[:, 1] >= 0]
    right = torch.stack([logits[4 + i].argmax(-1) == labels[:, 4 + i] for i in range(MAX_CHARACTERS)]).all(0)
    read = right[labels[:, 4] > 0]
    background = (logits[3].argmax(-1) == labels[:, 3])[labels[:, 3] >= 0]
    return {
        "loss": float(loss.detach()),
        "seen": float(seen.float().mean()),
        "ground": float(background.float().mean()),
        "read": float(read.float().mean()),
    }


def _answers_right(hits: Tensor, wanted: Tensor, end: int) -> list[int]:
    """1 for every answer whose tokens, up to and with the end token, are all hits."""
    verdicts, good = [], 1
    for hit, token in zip(hits.tolist(), wanted.tolist(), strict=True):
        good &= int(hit)
        if token == end:
            verdicts.append(good)
            good = 1
    return verdicts


def _mean(log: deque[dict[str, float]], key: str) -> float:
    values = [figures[key] for figures in log if key in figures and figures[key] == figures[key]]
    return sum(values) / max(1, len(values))


def _loader(data: IterableDataset[Any]) -> Iterator[Any]:
    return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8))


def _plans(options: argparse.Namespace) -> list[StagePlan]:
    if not options.stages:
        return [replace(plan, minutes=plan.minutes * options.minutes) for plan in _DEFAULTS.values()]
    plans = []
    for item in options.stages.split(","):
        name, minutes, *peak = item.split(":")
        plan = replace(_DEFAULTS[name], minutes=float(minutes))
        plans.append(replace(plan, peak=float(peak[0])) if peak else plan)
    return plans


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("out", help="folder for the model and the checkpoint")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, split over the stages")
    parser.add_argument("--stages", default="", help="name:minutes[:peak learning rate],... instead of --minutes")
    parser.add_argument("--init", default="", help="demo model folder to start from")
    parser.add_argument("--init-vision", default="", help="another one, for tower and resampler")
    parser.add_argument("--init-heads", default="", help="heads.pt of the run that made it, fact_heads.pt beside it")
    parser.add_argument(
        "--beside",
        default="",
        help="OUT of another run, with the same stages and another seed; both go on from their mean",
    )
    parser.add_argument("--keep-tokenizer", action="store_true", help="use the tokenizer of --init")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt where there is one")
    parser.add_argument("--pool", type=int, default=8000, help="pictures whose rows are cached for the last stage")
    parser.add_argument(
        "--pool-file",
        default="",
        help="where the cached pictures are kept; read, again now and then, where it exists (same vision weights!)",
    )
    parser.add_argument(
        "--labels-weight", type=float, default=0.3, help="of the dense labels in joint; late, 0.05 lets answers count"
    )
    parser.add_argument(
        "--labelled-views", type=int, default=0, help="views per step of joint that only the dense labels teach"
    )
    parser.add_argument("--judge-batches", type=int, default=12, help="held-out batches per progress check")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        default=torch.cuda.is_available() or bool(torch.cpu._is_amx_tile_supported()),
        help="compute in bfloat16 (default where the hardware multiplies it)",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
