"""mmchat compare."""

from __future__ import annotations

import json
from pathlib import Path

from mmchat.cli.options import UsageError, say
from mmchat.compare import asking, report
from mmchat.compare.judge import ClipJudge
from mmchat.model_dir import model_folder, open_model

QUESTION = "Describe the image."


def compare(
    a: asking.Model,
    b: asking.Model,
    folder: str,
    questions: list[str],
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
    pictures = asking.pictures_in(Path(folder), most)
    for model in (a, b):
        open_model(model.folder)  # the second one, too, before the first has worked for an hour
    names = [Path(model.folder).name for model in (a, b)]
    if names[0] == names[1]:
        names = [model.folder if a.folder != b.folder else f"{model.folder} ({model.engine})" for model in (a, b)]
    found = asking.compare(
        a,
        b,
        pictures,
        questions or [QUESTION],
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
