"""Rockchip's converters, driven in a Python environment of their own: found, started, and what became of them told.

They are never imported here: they pin old numpy, protobuf and torch, leave files in the current folder, and abort the
process on some models.  mmchat/convert/toolkit_driver.py runs in their environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat.errors import ToolkitError
from mmchat.outputs import replace_file

Tell = Callable[[str], None]  # a line for the user

_DRIVER = Path(__file__).with_name("toolkit_driver.py")
_COLOUR, _TIME = re.compile(r"\x1b\[[0-9;]*m"), re.compile(r" ?\[[0-9:.]+\]")
_OUTSIDE = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")  # of this Python


@dataclass(frozen=True)
class Toolkit:
    """name: the package.  module: what it is imported by.  variable: of the environment, which names its Python."""

    name: str
    module: str
    variable: str
    install: str

    def python(self, given: str | None = None, *, option: str = "--python") -> Path:
        """The interpreter that has it: given, or the variable's.

        Raises ToolkitError: neither, or no such program.
        """
        name = given or os.environ.get(self.variable)
        if not name:
            raise ToolkitError(
                f"{self.name} runs in a Python environment of its own: name its interpreter with {option} or "
                f"${self.variable}; {self.install}"
            )
        found = shutil.which(os.path.expanduser(name))
        if found is None:
            raise ToolkitError(f"{name}: no such Python; {self.install}")
        return Path(os.path.abspath(found))  # not resolved: a venv's python is a link


_STEP_S = 0.2

RKNN = Toolkit("rknn-toolkit2", "rknn.api", "MMCHAT_RKNN_PYTHON", "docs/board.md says how that is installed")
RKLLM = Toolkit("rkllm-toolkit", "rkllm.api", "MMCHAT_RKLLM_PYTHON", "docs/board.md says where it is had (x86-64 only)")


def run(toolkit: Toolkit, python: Path, job: dict[str, Any], work: Path, log: Path, tell: Tell) -> dict[str, Any]:
    """Do one job of toolkit_driver; its result.

    work: an empty folder, which is the current one of the process.  log: where everything it prints goes.

    The result has what it complained of, too, in "complaints".

    Raises ToolkitError: the package is not there, a call failed, or the process crashed.
    """
    path = (work / "job.json").absolute()  # the process has another current folder
    path.write_text(json.dumps(job))
    step, answer = "start", None
    with log.open("wb") as output, _started(python, path, work, output) as (process, events):
        for line in _lines(process, events):
            try:
                event = json.loads(line)
            except ValueError:  # the process died within a line
                continue
            if "step" in event:
                step = str(event["step"])
                tell(f"{toolkit.name}: {step}")
            else:
                answer = event
                break  # a process that it left may hold the pipe open
        code = process.wait()
    told = _COLOUR.sub("", log.read_text(errors="replace"))
    if answer is not None and "result" in answer:
        return {**answer["result"], "complaints": _complaints(told)}
    if answer is None:
        raise ToolkitError(_ended(toolkit, step, code, told, log), step, told)
    call, message = answer["failed"], answer["message"]
    if call == f"import {toolkit.module}":
        raise ToolkitError(f"{python} has no working {toolkit.name} ({message}); {toolkit.install}")
    raise ToolkitError(f"{toolkit.name}: {call} failed ({message}); {_last(told)}all it said: {log}", call, told)


def write_report(target: Path, report: dict[str, Any]) -> None:
    """How a file was made: beside it, under its name with .json.  Only for the only_writer of the folder."""
    text = json.dumps(report, indent=2) + "\n"
    replace_file(target.with_name(f"{target.name}.json"), text.encode())


@contextlib.contextmanager
def _started(python: Path, job: Path, work: Path, output: Any) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """The process, which does not outlive the block, nor this process; and its events."""
    theirs, lifeline = os.pipe()
    mine, events = os.pipe()
    environ = {name: value for name, value in os.environ.items() if name not in _OUTSIDE}
    environ.update(PYTHONNOUSERSITE="1", PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
    try:
        process = subprocess.Popen(
            [python, _DRIVER, job, str(events), str(theirs)],
            cwd=work,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(events, theirs),
            start_new_session=True,  # Ctrl-C is ours to handle, and its workers are to end with it
        )
    except OSError as error:
        os.close(mine)
        os.close(lifeline)
        raise ToolkitError(f"{python}: cannot be run ({error.strerror})") from None
    finally:
        os.close(theirs)
        os.close(events)
    try:
        with os.fdopen(mine, "rb", buffering=0) as told:
            yield process, told
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it left
        process.wait()
        os.close(lifeline)


def _lines(process: subprocess.Popen[bytes], events: Any) -> Iterator[str]:
    """Until it has ended: a process that it left may hold the pipe open for ever."""
    unfinished = b""
    while True:
        has_ended = process.poll() is not None  # first, for what it said last may still be there
        if select.select([events], [], [], 0.0 if has_ended else _STEP_S)[0]:
            data = events.read(1 << 16)
            if not data:
                return
            *lines, unfinished = (unfinished + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        elif has_ended:
            return


def _ended(toolkit: Toolkit, step: str, code: int, told: str, log: Path) -> str:
    """Why a process without an answer ended, as far as its exit code tells."""
    if code == -signal.SIGKILL:
        why = "was killed: most likely there was not enough memory (add swap, or use a larger PC)"
    elif code == -signal.SIGABRT:
        why = "aborted, as it does on graphs that it cannot compile"
    else:
        why = f"ended with {code}" if code >= 0 else f"crashed ({signal.Signals(-code).name})"
    return f"{toolkit.name} {why} at the step {step!r}; {_last(told)}all it said: {log}"


def _complaints(told: str) -> list[str]:
    """Its errors, without times; some come while all goes well."""
    lines = (_TIME.sub("", line.strip()) for line in told.splitlines())
    return list(dict.fromkeys(line for line in lines if line.startswith(("E ", "ERROR"))))


def _last(told: str) -> str:
    """Its last complaint or word, on one line."""
    lines = _complaints(told) or [line.strip() for line in told.splitlines() if line.strip()]
    return f"it said: {lines[-1][:300]}; " if lines else ""
