"""The command line.  Results go to stdout, everything else to stderr.  Exit codes: 0 ok, 1 it failed, 2 wrong usage,
130 ended by Ctrl-C.

Each command is a thin front on mmchat.runtime; its module is imported when it is called, so that --help is fast.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmchat import __version__
from mmchat.cli import converting, options

app = typer.Typer(
    name="mmchat",
    help="Chat about many images over many turns with MiniCPM-V-2.6, on a Rockchip NPU or any CPU.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(converting.app)

store_app = typer.Typer(
    help="Look at the image embeddings kept on disk, check them, or remove them.", no_args_is_help=True
)
app.add_typer(store_app, name="store")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mmchat {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    options.debug = debug


@app.command()
def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[PICTURE]... QUESTION",
            help="Pictures, then the question. '-' takes a picture, or as the last word the question, from stdin. "
            "{{path}} in the question puts a picture right there (write \\{{ for braces that are text).",
        ),
    ],
    model: options.Model = "demo",
    engine: options.Engine = "auto",
    system: options.System = None,
    max_slices: options.MaxSlices = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    store: options.StoreFolder = None,
    context: options.Context = None,
    threads: options.Threads = None,
    reference_pixels: options.ReferencePixels = False,
    stats: options.Stats = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask one question, about pictures or without.

    Example: mmchat ask street.png "What does the sign say?"
    """
    from mmchat.cli import chatting

    with options.errors_as_lines():
        chatting.ask(
            words,
            options.Opening(model, engine, store, context, threads),
            options.Talk(system, max_slices, reference_pixels, stats, as_json),
            options.sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop),
        )


@app.command()
def chat(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="[PICTURE]...", help="Pictures for the first question.")
    ] = None,
    model: options.Model = "demo",
    engine: options.Engine = "auto",
    system: options.System = None,
    max_slices: options.MaxSlices = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    store: options.StoreFolder = None,
    context: options.Context = None,
    threads: options.Threads = None,
    reference_pixels: options.ReferencePixels = False,
    policy: options.PolicySteps = None,
    stats: options.Stats = False,
    as_json: options.AsJson = False,
    resume: Annotated[
        str | None, typer.Option(metavar="FILE", help="Go on with a saved conversation, and save it there.")
    ] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep the conversation in this new file, after every turn.")
    ] = None,
    save_pictures: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="How --save and /save keep pictures: original, reencoded, jpeg or none. "
            "[default: as FILE does, else original]",
        ),
    ] = None,
    save_embeddings: Annotated[
        bool, typer.Option("--save-embeddings", help="Keep the embeddings too: nothing is encoded again elsewhere.")
    ] = False,
) -> None:
    """Chat over many turns; /help lists the commands.

    Without a terminal, every line of stdin is a question or a command.
    """
    from mmchat.cli import chatting

    with options.errors_as_lines():
        chatting.chat(
            pictures or [],
            options.Opening(model, engine, store, context, threads),
            options.Talk(system, max_slices, reference_pixels, stats, as_json, policy),
            options.sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop),
            options.Keeping(resume, save, save_pictures, save_embeddings),
        )


@app.command()
def caption(
    source: Annotated[
        str,
        typer.Argument(
            help="A video file, a picture, a folder or a 'glob' of pictures, a camera (/dev/video0), or an rtsp:// or "
            "http:// address."
        ),
    ],
    question: Annotated[
        str, typer.Option("--ask", metavar="TEXT", help="Ask this about each frame. [default: describe it]")
    ] = "",
    every: Annotated[
        str | None, typer.Option(metavar="TIME", help="From frame to frame: 2s, 500ms, 1m; 0 is all. [default: 1s]")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="The same as frames per second.")] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="At most so many frames, spread over a file; the first ones of a stream.")
    ] = None,
    official: Annotated[
        bool, typer.Option("--official", help="The published recipe: 1 frame per second, at most 64, 2 slices.")
    ] = False,
    changed: Annotated[
        float,
        typer.Option(help="Ask only where this share of the picture has changed, as 0.1; else carry the caption."),
    ] = 0.0,
    window: Annotated[int, typer.Option(min=1, help="Frames per question.")] = 1,
    story: Annotated[int, typer.Option(min=0, help="The last N captions go with each question.")] = 0,
    question_first: Annotated[
        bool, typer.Option("--question-first", help="Before the picture, where it is computed only once.")
    ] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", metavar="FILE", help="A .jsonl, .srt, .vtt, .csv or .html file; repeatable."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="A page of thumbnails and captions.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed run was; needs --out FILE.jsonl.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    when: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Keep only captions with these words, as 'yes'.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--exec", metavar="COMMAND", help="Run it for each new caption, which is in $MMCHAT_CAPTION and on stdin."
        ),
    ] = None,
    model: options.Model = "demo",
    engine: options.Engine = "auto",
    system: options.System = None,
    max_slices: Annotated[
        int | None, typer.Option(min=1, help="Cells per picture at most; 1 never cuts. [default: 1; --official: 2]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a caption at most. [default: 128]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 always takes the most likely token. [default: 0]")
    ] = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    store: options.StoreFolder = None,
    context: options.Context = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Caption a video, pictures, a camera or a stream, for as long as it lasts.

    Example: mmchat caption street.mp4 --every 2s --changed 0.1 -o street.srt
    """
    from mmchat.cli import captioning

    with options.errors_as_lines():
        captioning.caption(
            source,
            captioning.plan_of(
                captioning.pace_of(every, fps, max_frames, official),
                ask=question,
                system=system,
                changed=changed,
                window=window,
                story=story,
                max_slice_nums=max_slices or (2 if official else 1),
                question_first=question_first,
                sampling=options.sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop),
            ),
            options.Opening(model, engine, store, context, threads),
            captioning.Wanted((*(out or ()), *([page] if page else ())), resume, overwrite, when, command, as_json),
        )


@app.command()
def slices(
    picture: Annotated[str, typer.Argument(help="The picture; '-' for stdin.")],
    model: options.Model = "demo",
    resolution: Annotated[
        int | None,
        typer.Option(min=14, help="Side of a square view in pixels; 448 in MiniCPM-V-2.6. [default: the model's]"),
    ] = None,
    max_slices: options.MaxSlices = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the cut over the picture.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show how a picture is cut, and what it costs in rows."""
    from mmchat.cli import showing

    with options.errors_as_lines():
        showing.slices(picture, model, resolution, max_slices, save, as_json)


@app.command()
def prompt(
    conversation: Annotated[str, typer.Argument(metavar="FILE", help="The conversation as JSON; '-' for stdin.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="A MiniCPM-V-2.6 tokenizer.json; the other numbers are its.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Take tokenizer, numbers and budget from this model.")
    ] = None,
    context: options.Context = None,
    max_new_tokens: options.MaxNewTokens = None,
    policy: options.PolicySteps = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the prompt of a conversation without running anything, and with a model, what would be sent of it.

    FILE: {"messages": [{"role", "content": [{"type": "text", "text"} or {"type": "image", "size": [w, h]}]}]} and,
    where wanted, "system_prompt", "use_image_id", "max_slice_nums".
    """
    from mmchat.cli import showing

    with options.errors_as_lines():
        showing.prompt(conversation, tokenizer, model, context, max_new_tokens, policy, as_json)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", metavar="DIR", help="A board's model folder.")],
    again: Annotated[bool, typer.Option("--again", help="Forget what was found before.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Find out what this board's RKLLM library does with a model, and write its profile; about 10 minutes.

    Interrupted, it goes on where it was.
    """
    from mmchat.cli import calibrating

    with options.errors_as_lines():
        calibrating.calibrate(model, again, as_json)


@app.command()
def regress(
    model: options.Model = "demo",
    minutes: Annotated[float, typer.Option(help="How long to look for a failure.")] = 10,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn. [default: another each time]")] = None,
    database: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What failed before, tried again. [default: ~/.local/state/mmchat/regress]"),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all that was found.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE.xml", help="Write it as JUnit XML, for CI.")] = None,
    save: Annotated[Path, typer.Option(metavar="FILE", help="Where to keep the failing conversation.")] = Path(
        "mmchat-regress.json"
    ),
    replay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Play a conversation that failed, instead of looking for one.")
    ] = None,
    engine: options.Engine = "auto",
    store: options.StoreFolder = None,
    context: options.Context = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Look for a conversation that this board, library and model fail at, and make it small.

    Prompts of all lengths, pictures, edits, cancels and several sessions, drawn by hypothesis.  The exit code is 1
    where something failed.
    """
    from mmchat.cli import regressing

    with options.errors_as_lines():
        regressing.regress(
            options.Opening(model, engine, store, context, threads),
            regressing.Wanted(minutes, seed, database, report, junit, save, replay, as_json),
        )


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help='A model folder, or "demo", to look at as well.')
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Look at this machine, and at a model folder: what is wrong, and what to do about it.

    Nothing is loaded or changed.  The exit code is 1 where something is a problem.
    """
    from mmchat.cli import doctoring

    with options.errors_as_lines():
        doctoring.doctor(model, as_json)


@app.command()
def bench(
    section: Annotated[str, typer.Argument(metavar="[work|host|chat|peers|all]", help="What to measure.")] = "all",
    model: options.Model = "demo",
    save: Annotated[
        bool, typer.Option("--save", help="Write the figures to benchmarks/ in the current folder.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure: work done per conversation (counts), this machine's part, and a scripted chat; some minutes.

    Board times are predicted from counts and published figures.  peers (not among all) holds a chat in openvino_genai
    as well, which must be installed.
    """
    from mmchat.cli import benching

    with options.errors_as_lines():
        benching.bench(section, model, as_json, save)


@app.command()
def compare(
    model_a: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_A",
            help='A model folder, "demo", or an encoder alone: a folder of convert vision-onnx, or "rknn-sim:" before '
            "it for rknn-toolkit2's PC simulator.",
        ),
    ],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B", help="What is compared with it.")],
    pictures: Annotated[str, typer.Option(metavar="DIR", help="A folder of pictures.")],
    question: Annotated[
        list[str] | None, typer.Option(help="Asked about each picture; repeatable. [default: Describe the image.]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N pictures only.")] = None,
    engine_a: options.Engine = "auto",
    engine_b: options.Engine = "auto",
    llm: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Answers with an encoder's rows. [default: the other model, if it can]"),
    ] = None,
    rknn_chip: Annotated[str, typer.Option(metavar="CHIP", help="rknn-sim's: rk3588 or rk3576.")] = "rk3588",
    rknn_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="The interpreter of rknn-toolkit2's environment.")
    ] = None,
    max_slices: options.MaxSlices = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 64,
    judge: Annotated[
        str | None, typer.Option(help="clip: score each answer by a CLIP model (needs torch and transformers).")
    ] = None,
    judge_weights: Annotated[str | None, typer.Option(metavar="DIR", help="The CLIP model's folder.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Write compare.json, .csv and .html there.")
    ] = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask two models the same about the same pictures: what becomes of embeddings, tokens and texts.

    One is in memory at a time; always the most likely token is taken.  Two encoders without an LLM are compared in
    their embeddings alone, unless --llm names one.
    """
    with options.errors_as_lines():
        from mmchat.cli import comparing
        from mmchat.compare.asking import Model

        comparing.compare(
            Model(model_a, engine_a, threads),
            Model(model_b, engine_b, threads),
            pictures,
            question or [],
            comparing.Encoders(llm, rknn_chip, rknn_python),
            most=limit,
            max_slices=max_slices,
            max_new_tokens=max_new_tokens,
            judge=judge,
            judge_weights=judge_weights,
            output=output,
            as_json=as_json,
        )


@store_app.command()
def info(folder: options.StoreFolder = None, as_json: options.AsJson = False) -> None:
    """Where the embeddings are, how many, and how much room they take."""
    from mmchat.cli import storing

    with options.errors_as_lines():
        storing.info(folder, as_json)


@store_app.command()
def verify(folder: options.StoreFolder = None, as_json: options.AsJson = False) -> None:
    """Read every embedding; damaged ones are removed, and made again when they are needed.

    The exit code is 1 where one could not be removed.
    """
    from mmchat.cli import storing

    with options.errors_as_lines():
        storing.verify(folder, as_json)


@store_app.command()
def clear(folder: options.StoreFolder = None, as_json: options.AsJson = False) -> None:
    """Remove all embeddings but those that an answer under way needs."""
    from mmchat.cli import storing

    with options.errors_as_lines():
        storing.clear(folder, as_json)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A model on the Hugging Face hub: owner/name.")],
    to: Annotated[str | None, typer.Option("--to", metavar="DIR", help="[default: the model's name, here]")] = None,
    only: Annotated[
        str, typer.Option("--only", metavar="PART", help="table, vision, llm or all; see the end of this help.")
    ] = "all",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Fetch a published checkpoint, or a part of it; interrupted, it goes on where it was.

    table: the embedding table alone.  vision: the encoder's tensors alone.  llm: the files that hold the LLM.
    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count.
    """
    from mmchat.cli import pulling

    with options.errors_as_lines():
        pulling.run(repo, to, only, revision, dry_run, as_json)


session = typer.Typer(help="Saved conversations: look at them, or export them.", no_args_is_help=True)
app.add_typer(session, name="session")


@session.command()
def show(
    file: Annotated[str, typer.Argument(help="A conversation that chat --save or /save wrote.")],
    as_json: options.AsJson = False,
) -> None:
    """Print a saved conversation; needs no model.

    What is damaged is said on stderr, and the exit code is 1 then; what is whole is printed all the same.
    """
    from mmchat.cli import sessions

    with options.errors_as_lines():
        sessions.show(file, as_json)


@session.command()
def export(
    file: Annotated[str, typer.Argument(help="A conversation that chat --save or /save wrote.")],
    to: Annotated[str, typer.Option("--to", metavar="OUT", help="OUT.html, OUT.md or OUT.json.")],
) -> None:
    """Write a saved conversation as HTML (one file), Markdown or JSON (pictures in OUT.pictures); needs no model."""
    from mmchat.cli import sessions

    with options.errors_as_lines():
        sessions.export(file, to)


def main() -> None:
    """The mmchat command."""
    _open_standard_files()
    code: int | str | None = 0
    try:
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except OSError as error:  # of stdout, else it has been told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not code and not isinstance(error, BrokenPipeError):  # else its reader left
            options.say(options.describe(error))
            if options.debug:
                raise
        code = code or 1
    raise SystemExit(code)


def _open_standard_files() -> None:
    """Whoever called us may have closed them; a file or socket of ours would then take their place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the locale cannot say it: an answer is not lost
    if sys.stdout is None:
        options.say("stdout is closed: there is nowhere to write an answer to")
        raise SystemExit(1)
