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
    """Copy the token embedding table, which RKLLM needs.

    A file of its own, beside the model.
    """
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
    """Write the LLM alone, as a plain Qwen2 folder.

    For rkllm-toolkit or transformers.  Interrupted, it goes on with the file where it was.
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
    """Write the vision encoder as ONNX, exact for any picture.

    Its shape is fixed: it is for rknn-toolkit2.
    """
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
    """Write a folder for a PC's CPU (OpenVINO), int4 or larger.

    It chats in a fraction of the checkpoint's memory.  The layout is optimum-intel's.  Interrupted, it goes on with the
    model where it was.
    """
    with options.errors_as_lines():
        from mmchat.convert import openvino_folder as step
        from mmchat.model_dir import open_model

        plan = step.plan(open_model(checkpoint), weights)
        path = Path(target)
        _run(plan.estimate, path, dry_run, as_json, lambda bars: step.run(plan, path, bars))


@app.command("vision-rknn")
def vision_rknn(
    onnx: Annotated[str, typer.Argument(metavar="ONNX", help="The folder that convert vision-onnx wrote.")],
    target: Annotated[str, typer.Argument(metavar="FILE", help="The encoder to write (*.rknn).")],
    chip: Annotated[str, typer.Option("--target", metavar="CHIP", help="rk3588 or rk3576.")],
    int8: Annotated[bool, typer.Option("--int8", help="Eight bits instead of float16; needs --pictures.")] = False,
    pictures: Annotated[
        str | None, typer.Option(metavar="DIR", help="Pictures to check with, and to calibrate --int8 with.")
    ] = None,
    min_cosine: Annotated[float, typer.Option(help="How alike simulator and ONNX must be.")] = 0.999,
    python: options.ToolkitPython = None,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Compile the ONNX for an NPU, with rknn-toolkit2.

    Then the toolkit's PC simulator is compared with the ONNX.

    The toolkit runs in a Python environment of its own: --python or $MMCHAT_RKNN_PYTHON names its interpreter.
    """
    with options.errors_as_lines():
        from mmchat.convert import toolkit
        from mmchat.convert import vision_rknn as step

        folder = Path(pictures) if pictures else None
        plan = step.plan(Path(onnx), chip, int8=int8, pictures=folder, min_cosine=min_cosine)
        path = Path(target)
        _drive(plan.estimate, path, dry_run, as_json, lambda: step.run(plan, path, toolkit.RKNN.python(python), say))


@app.command("llm-rkllm")
def llm_rkllm(
    checkpoint: Source,
    target: Annotated[str, typer.Argument(metavar="FILE", help="The model to write (*.rkllm).")],
    chip: Annotated[str, typer.Option("--target", metavar="CHIP", help="rk3588 or rk3576.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="rk3588: w8a8, w8a8_g128, w8a8_g256, w8a8_g512; rk3576: w4a16, w4a16_g32, w4a16_g64, w4a16_g128, "
            "w8a8. [default: the first]",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(help="Rows of context: a multiple of 32, at most 16384. [default: 4096 or the model's]"),
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="1 for precision, 0 for speed.")] = 1,
    num_npu_core: Annotated[int | None, typer.Option(help="[default: all]")] = None,
    algorithm: Annotated[str, typer.Option(help="normal; for w4a16 also grq (needs --device cuda) or gdq.")] = "normal",
    hybrid_rate: Annotated[float, typer.Option(help="Share of layers with groups, from 0 to below 1.")] = 0.0,
    calibration: Annotated[
        str | None, typer.Option(metavar="PATH", help="Pictures, or the vendor's JSON of pictures and questions.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    load_dtype: Annotated[str, typer.Option(help="float32, or bfloat16 with half the memory.")] = "float32",
    python: options.ToolkitPython = None,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Convert the LLM with rkllm-toolkit, from the checkpoint.  Written from its documents, never run with it.

    The toolkit runs in a Python environment of its own: --python or $MMCHAT_RKLLM_PYTHON names its interpreter.
    """
    with options.errors_as_lines():
        from mmchat.cli.bars import Bars
        from mmchat.convert import llm_rkllm as step
        from mmchat.convert import toolkit

        wanted = step.Options(
            chip,
            step.default_dtype(chip) if dtype is None else dtype,
            step.default_context(checkpoint) if max_context is None else max_context,
            optimization_level,
            num_npu_core,
            algorithm,
            hybrid_rate,
            device,
            load_dtype,
        )
        plan = step.plan(checkpoint, wanted, Path(calibration) if calibration else None)
        path = Path(target)

        def run() -> dict[str, Any]:
            with Bars() as bars:
                return step.run(plan, path, toolkit.RKLLM.python(python), say, bars)

        _drive(plan.estimate, path, dry_run, as_json, run)


@app.command()
def board(
    checkpoint: Source,
    target: Annotated[str, typer.Argument(metavar="DIR", help="The board's folder.")],
    chip: Annotated[str, typer.Option("--target", metavar="CHIP", help="rk3588 or rk3576.")],
    dtype: Annotated[str | None, typer.Option(metavar="TYPE", help="As in convert llm-rkllm.")] = None,
    max_context: Annotated[int | None, typer.Option(help="As in convert llm-rkllm; or that of --llm.")] = None,
    calibration: Annotated[str | None, typer.Option(metavar="PATH", help="As in convert llm-rkllm.")] = None,
    load_dtype: Annotated[str, typer.Option(help="As in convert llm-rkllm.")] = "float32",
    llm: Annotated[str | None, typer.Option(metavar="FILE", help="A *.rkllm that is there already.")] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Do without a toolkit: vision (the CPU encodes then) or llm; repeatable."),
    ] = None,
    rknn_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python of rknn-toolkit2. [default: $MMCHAT_RKNN_PYTHON]")
    ] = None,
    rkllm_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python of rkllm-toolkit. [default: $MMCHAT_RKLLM_PYTHON]")
    ] = None,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a whole board folder, by all the steps it takes.

    Token rows, encoder, LLM, small files, mmchat.json.

    Interrupted, it goes on with the step where it was; what is done is known by digest.
    """
    with options.errors_as_lines():
        from mmchat.cli.bars import Bars
        from mmchat.convert import board as step
        from mmchat.convert import llm_rkllm, toolkit
        from mmchat.outputs import check_space, free_bytes

        context = llm_rkllm.default_context(checkpoint) if max_context is None else max_context
        wanted = llm_rkllm.Options(chip, dtype or llm_rkllm.default_dtype(chip), context, load_dtype=load_dtype)
        plan = step.plan(
            checkpoint,
            wanted,
            skip=skip or (),
            llm=Path(llm) if llm else None,
            calibration=Path(calibration) if calibration else None,
            rknn_python=lambda: toolkit.RKNN.python(rknn_python, option="--rknn-python"),
            rkllm_python=lambda: toolkit.RKLLM.python(rkllm_python, option="--rkllm-python"),
        )
        path = Path(target)
        said: dict[str, Any] = {
            "target": str(path),
            "dry_run": dry_run,
            "steps": [{"name": one.name, "files": one.files, **one.estimate.to_dict()} for one in plan.steps],
            "lacks": plan.lacks,
        }
        if dry_run:
            lines = [f"{one.name} ({', '.join(one.files)}): {one.estimate.describe(path)}" for one in plan.steps]
            lines += [f"all: {plan.estimate.describe(path)}", *(f"will lack {one}" for one in plan.lacks)]
            print(json.dumps({**said, "free": free_bytes(path)}) if as_json else options.printable("\n".join(lines)))
            check_space(path, plan.estimate.writes)
            return
        with Bars() as bars:
            step.run(plan, path, say, bars)
        print(json.dumps(said) if as_json else path)


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


def _drive(estimate: Estimate, target: Path, dry_run: bool, as_json: bool, run: Callable[[], dict[str, Any]]) -> None:
    """The same for what a toolkit does in a process of its own.  run: gives a report, for stderr or --json."""
    if dry_run:
        _run(estimate, target, dry_run, as_json, lambda bars: None)
        return
    say(estimate.describe(target.parent))
    report = run()
    print(json.dumps({"target": str(target), **report}) if as_json else target)
    if not as_json:
        say(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.items()))
