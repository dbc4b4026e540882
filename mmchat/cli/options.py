"""Options that commands share, and how errors become lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.engine import Sampling
from mmchat.errors import MmchatError, OptionError, PromptError, SessionError

if TYPE_CHECKING:
    from mmchat.context import Policy
    from mmchat.runtime import Runtime

debug = False  # set by --debug

Model = Annotated[str, typer.Option("--model", "-m", metavar="DIR", help='A model folder, or "demo".')]
Engine = Annotated[str, typer.Option(help="auto, openvino or rkllm.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt. [default: the model's]")]
MaxSlices = Annotated[
    int | None, typer.Option(min=1, help="Cells per picture at most; 1 never cuts. [default: the model's, 9]")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 always takes the most likely token.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the smallest set with this probability.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from the k most likely tokens; 0 is all.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Divides the score of tokens already generated; 1 is none.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.")]
StoreFolder = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="Image embeddings. [default: ~/.cache/mmchat/embeddings]")
]
Context = Annotated[int | None, typer.Option(min=1, help="Rows of context, where less than the model's.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: the engine's choice]")]
ReferencePixels = Annotated[
    bool, typer.Option("--reference-pixels", help="Read pictures exactly as the published processor does.")
]
PolicySteps = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="STEPS",
        help='What goes where the context is full: some of "overview,line,turns" in any order, or "error". '
        "[default: all three]",
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Print a table of times after each answer.")]
ToolkitPython = Annotated[
    str | None, typer.Option("--python", metavar="PATH", help="The interpreter of the toolkit's environment.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@dataclass(frozen=True)
class Opening:
    """What mmchat.open takes."""

    model: str
    engine: str
    store: str | None
    context: int | None
    threads: int | None

    def open(self, *, store_cap_bytes: int | None = None) -> Runtime:
        """Raises what mmchat.open raises."""
        import mmchat

        return mmchat.open(
            self.model,
            engine=self.engine,
            store=self.store,
            store_cap_bytes=store_cap_bytes,
            context_rows=self.context,
            n_threads=self.threads,
        )


@dataclass(frozen=True)
class Talk:
    """How to converse and what to show."""

    system: str | None
    max_slices: int | None
    reference_pixels: bool
    stats: bool
    as_json: bool
    policy: str | None = None


def policy(steps: str | None) -> Policy:
    """Raises UsageError."""
    from mmchat.context import Policy

    try:
        return Policy.of(steps)
    except SessionError as error:
        raise UsageError(f"--{error}") from None


@dataclass(frozen=True)
class Keeping:
    """Files of a chat: one to go on with, a new one to save to, how pictures are kept, and whether embeddings are.

    pictures: None is as in the file that is gone on with, else original.
    """

    resume: str | None = None
    save: str | None = None
    pictures: str | None = None
    embeddings: bool = False


def sampling(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """The values that were given; the model has defaults for the others.  Raises UsageError for a bad one."""
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
    }
    given = {name: value for name, value in given.items() if value is not None and value != []}
    try:
        Sampling.from_dict(given)
    except PromptError as error:
        name, rest = str(error).split(" ", 1)
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from None
    return given


class UsageError(Exception):
    """The command was called wrongly: exit code 2."""


def printable(text: object) -> str:
    """Text that any terminal takes: file names may hold what is no Unicode."""
    return str(text).encode(errors="backslashreplace").decode()


def describe(error: BaseException) -> str:
    """An error in words; the system's own, which only have numbers, with what they were about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing the result'}: {error.strerror}"
    return str(error)


def say(error: BaseException | str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"mmchat: {' '.join(printable(error).split())}\n")


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """What users can do something about becomes one line and an exit code; --debug shows where it came from."""
    try:
        yield
    except (UsageError, OptionError) as error:
        say(error)
        raise typer.Exit(2) from None
    except (MmchatError, OSError) as error:
        if isinstance(error, BrokenPipeError) or debug:
            raise
        say(describe(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
