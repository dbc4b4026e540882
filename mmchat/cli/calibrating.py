"""mmchat calibrate."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from types import TracebackType
from typing import Any

from mmchat.calibrate import Report, Step, with_lacking
from mmchat.calibrate import calibrate as run_probes
from mmchat.cli.options import say
from mmchat.errors import ModelDirError
from mmchat.model_dir import open_model
from mmchat.probe_pictures import Sight
from mmchat.runtime import find_library, open_vision
from mmchat.store import DEFAULT_CAP_BYTES, Store


def calibrate(model: str, again: bool, as_json: bool) -> None:
    spec = open_model(model)
    if spec.board is None:
        raise ModelDirError(f"{spec.folder}: has no model for RKLLM (*.rkllm): there is nothing to calibrate")
    library, family = find_library(spec), os.environ.get("MMCHAT_RKLLM_FAMILY") or None
    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminal that closes is no crash: the same as Ctrl-C
        if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
            signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mmchat-") as folder:
        store = Store(folder, DEFAULT_CAP_BYTES)
        vision = open_vision(spec, store)
        with _Progress() as progress:
            try:
                report = run_probes(
                    spec, library, family=family, again=again, say=progress.show, sight=Sight(vision, store)
                )
            finally:
                vision.worker.close()
    print(json.dumps(_to_json(report)) if as_json else _to_text(report))


class _Progress:
    """A bar where stderr is a terminal, else a line per step."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: Step) -> None:
        if self._bar is None:
            say(str(step))
        else:
            done = max(0, step.number - 1) + step.part
            self._bar.update(self._task, total=step.of, completed=done, description=str(step))


def _to_json(report: Report) -> dict[str, Any]:
    return {
        "library": str(report.library),
        "profile": str(report.profile.path),
        **report.facts,
        **{name: value for name, value in asdict(report.profile).items() if name not in ("path", "key", "probes")},
        "probes": report.probes,
        "advice": list(report.advice),
    }


def _to_text(report: Report) -> str:
    facts, probes = report.facts, with_lacking(report.probes)
    append, prefix, ladder, abort = (probes[name] for name in ("append", "prefix", "ladder", "abort"))
    end = {True: "kept", False: "not kept", None: "not known"}[append.get("end_in_kv")]
    edits = "noticed" if prefix.get("rewinds") else "not noticed, or not known"  # by prefix reuse
    growth = probes["memory"].get("mb_per_run")
    prefill, decode, no = report.profile.prefill_rows_per_s, probes["speed"].get("decode_tokens_per_s"), "not measured"
    lines = [
        ("library", f"RKLLM {facts['version']} (ABI {facts['family']}), {report.library}"),
        ("loaded in", f"{facts['load_s']:g} s"),
        ("append", _verdict(append)),
        ("end token", f"{end} in the KV cache"),
        ("prefix", _verdict(prefix)),
        ("other picture", edits),
        ("abort", _abort(abort)),
        ("runs", f"of up to {max(ladder.get('worked', []), default=0)} rows work{_crashes(ladder)}" if ladder else no),
        ("memory", no if growth is None else f"{growth} MB per run"),
        ("prefill", no if prefill is None else f"{prefill} rows/s"),
        ("decode", no if decode is None else f"{decode} tokens/s"),
        ("encoder", _encoder(probes["encoder"])),
        ("pictures", _pictures(probes["pictures"])),
        ("strategy", f"{report.profile.strategy}, written to {report.profile.path}"),
        *(("note", text) for text in report.advice),
    ]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


def _verdict(result: dict[str, Any]) -> str:
    if result.get("works"):
        return "works"
    return f"not used: {result.get('why') or result.get('crashed') or result.get('failed') or 'not known'}"


def _abort(result: dict[str, Any]) -> str:
    if "seconds" not in result:
        return "not known"
    kept = "unknown" if result["kv_rows"] is None else f"{result['kv_rows']} rows cached of {result['sent_rows']} sent"
    before = "" if result["prefill_seconds"] is None else f" ({result['prefill_seconds']} s before the first token)"
    good = "the next answer is right" if result["usable"] else "the next answer is wrong"
    return f"takes {result['seconds']} s{before}; {kept}; {good}"


def _encoder(result: dict[str, Any]) -> str:
    return f"{result['s_per_slice']} s per slice" if "s_per_slice" in result else "not measured"


def _pictures(result: dict[str, Any]) -> str:
    if "bound" not in result:
        return "not asked for"
    ratio = result["n_prefilled"] / max(result["n_new"], 1)
    bound = "each is where it belongs" if result["bound"] else "mixed up"
    named = f"{result['named']} of {result['asked']} answers name the right colour"
    return f"{bound}; {named}; rows prefilled to new rows {ratio:.2f}"


def _crashes(ladder: dict[str, Any]) -> str:
    return f"; {min(ladder['crashed'])} crash" if ladder.get("crashed") else ""
