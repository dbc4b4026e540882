"""mmchat convert: one command per kind of file that is made out of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import options
from mmchat.cli.options import say

if TYPE_CHECKING:
    from mmchat.convert.step import Estimate, Progress

app = typer.Typer(
    name="convert",
    help="Make model files out of a published checkpoint.  --dry-run says what it takes and changes nothing.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(metavar="CHECKPOINT", help='The checkpoint\'s folder, or "demo".')]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it takes: time, memory and disk.")]


@app.command()
def table(
    checkpoint: Source,
    target: Annotated[str, typer.Argument(metavar="FILE", help="The table to write (*.safetensors).")],
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Copy the token embedding table into a file of its own, which RKLLM needs beside its model."""
    with options.errors_as_lines():
        from mmchat.convert import table as step

        source = _folder(checkpoint)
        path = Path(target)
        _run(step.plan(source, path), path, dry_run, as_json, lambda bars: step.run(source, path, bars))


@app.command("llm-checkpoint")
def llm_checkpoint(
    checkpoint: Source,
    target: Annotated[str, typer.Argument(metavar="DIR", help="The folder to write.")],
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the LLM alone as a plain Qwen2 folder, for rkllm-toolkit or transformers.

    Interrupted, it goes on with the file where it was.
    """
    with options.errors_as_lines():
        from mmchat.convert import llm_checkpoint as step

        plan = step.plan(_folder(checkpoint))
        path = Path(target)
        _run(plan.estimate, path, dry_run, as_json, lambda bars: step.run(plan, path, bars))


@app.command("vision-onnx")
def vision_onnx(
    checkpoint: Source,
    target: Annotated[str, typer.Argument(metavar="DIR", help="The folder to write.")],
    patches: Annotated[
        int | None, typer.Option(min=1, help="Patches of every input. [default: the model's, 1056]")
    ] = None,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the vision encoder as ONNX of a fixed shape, exact for any picture, for rknn-toolkit2."""
    with options.errors_as_lines():
        from mmchat.convert import vision_onnx as step
        from mmchat.model_dir import open_model

        plan = step.plan(open_model(checkpoint), patches)
        path = Path(target)
        _run(plan.estimate, path, dry_run, as_json, lambda bars: step.run(plan, path, bars))


@app.command()
def openvino(
    checkpoint: Source,
    target: Annotated[str, typer.Argument(metavar="DIR", help="The folder to write.")],
    weights: Annotated[str, typer.Option(help="The LLM's: int4, int8, fp16 or fp32.")] = "int4",
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an OpenVINO folder, which chats on a PC's CPU in a fraction of the checkpoint's memory.

    The layout is optimum-intel's.  Interrupted, it goes on with the model where it was.
    """
    with options.errors_as_lines():
        from mmchat.convert import openvino_folder as step
        from mmchat.model_dir import open_model

        plan = step.plan(open_model(checkpoint), weights)
        path = Path(target)
        _run(plan.estimate, path, dry_run, as_json, lambda bars: step.run(plan, path, bars))


def _folder(checkpoint: str) -> Path:
    from mmchat.model_dir import model_folder

    return model_folder(checkpoint)


def _run(estimate: Estimate, target: Path, dry_run: bool, as_json: bool, run: Callable[[Progress], None]) -> None:
    """Say what it takes, do it unless it is a dry run, and print the result's path."""
    from mmchat.cli.bars import Bars
    from mmchat.outputs import check_space, free_bytes

    said: dict[str, Any] = {"target": str(target), "dry_run": dry_run, **estimate.to_dict()}
    if dry_run:
        print(json.dumps({**said, "free": free_bytes(target)}) if as_json else estimate.describe(target))
        check_space(target, estimate.writes)
        return
    say(estimate.describe(target))
    with Bars() as bars:
        run(bars)
    print(json.dumps(said) if as_json else target)
