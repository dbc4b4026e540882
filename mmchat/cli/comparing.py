"""mmchat compare."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmchat.cli.options import UsageError, say
from mmchat.compare import asking, report
from mmchat.compare.encoders import SIMULATOR, BareEncoder, is_encoder, open_encoder
from mmchat.compare.judge import ClipJudge
from mmchat.model_dir import model_folder, open_model

QUESTION = "Describe the image."


@dataclass(frozen=True)
class Encoders:
    """What encoders without an LLM need: the LLM that is given their rows, and rknn-toolkit2's chip and Python."""

    llm: str | None = None
    chip: str = "rk3588"
    python: str | None = None


def compare(
    a: asking.Model,
    b: asking.Model,
    folder: str,
    questions: list[str],
    encoders: Encoders,
    *,
    most: int | None,
    max_slices: int | None,
    max_new_tokens: int | None,
    judge: str | None,
    judge_weights: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    if judge not in (None, "clip"):
        raise UsageError(f"there is no judge {judge!r}; there is clip")
    if (judge is None) != (judge_weights is None):
        raise UsageError("--judge clip and --judge-weights DIR belong together")
    chatting = [model for model in (a, b) if not is_encoder(model.folder)]
    if encoders.llm and len(chatting) == 2:
        raise UsageError("--llm is for an encoder, and both models have an LLM of their own")
    llm = asking.Model(encoders.llm, n_threads=a.n_threads) if encoders.llm else next(iter(chatting), None)
    if llm is None and (judge or questions):
        raise UsageError("encoders do not answer: give --llm MODEL, or neither --question nor --judge")
    pictures = asking.pictures_in(Path(folder), most)
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)  # its error comes now, and not after an hour
    sides = [_open(model, encoders) for model in (a, b)]  # the second one, too, before the first works for an hour
    if llm:
        open_model(llm.folder)
    names = [_name(model.folder) for model in (a, b)]
    if names[0] == names[1]:
        names = [model.folder if a.folder != b.folder else f"{model.folder} ({model.engine})" for model in (a, b)]
    found = asking.compare(
        sides[0],
        sides[1],
        pictures,
        questions or [QUESTION],
        llm=llm,
        max_new_tokens=max_new_tokens or 64,
        max_slice_nums=max_slices,
        judge=ClipJudge(model_folder(judge_weights)) if judge_weights else None,
        say=say,
    )
    if output:
        for path in report.save(found, names[0], names[1], {one.name: one for one in pictures}, Path(output)):
            say(f"wrote {path}")
    if as_json:
        print(json.dumps(report.to_dict(found, *names)))
        return
    width = max(len(name) for name, _ in report.rows(found))
    for name, text in report.rows(found):
        print(f"{name.ljust(width)}  {text}")


def _open(model: asking.Model, encoders: Encoders) -> asking.Model | BareEncoder:
    if is_encoder(model.folder):
        return open_encoder(model.folder, chip=encoders.chip, python=encoders.python, n_threads=model.n_threads)
    open_model(model.folder)
    return model


def _name(folder: str) -> str:
    """The folder's, without those it lies in."""
    prefix = SIMULATOR if folder.startswith(SIMULATOR) else ""
    return prefix + Path(folder.removeprefix(prefix)).name
