"""mmchat calibrate."""

from __future__ import annotations

import json
import os
from typing import Any

from mmchat.calibrate import Report
from mmchat.calibrate import calibrate as run_probes
from mmchat.cli.options import say
from mmchat.errors import ModelDirError
from mmchat.model_dir import open_model
from mmchat.runtime import find_library


def calibrate(model: str, again: bool, as_json: bool) -> None:
    spec = open_model(model)
    if spec.board is None:
        raise ModelDirError(f"{spec.folder}: has no mmchat.json, so no model for RKLLM: there is nothing to calibrate")
    family = os.environ.get("MMCHAT_RKLLM_FAMILY") or None
    report = run_probes(spec, find_library(spec), family=family, again=again, say=say)
    print(json.dumps(_to_json(report)) if as_json else _to_text(report))


def _to_json(report: Report) -> dict[str, Any]:
    return {
        "library": str(report.library),
        "profile": str(report.profile),
        **report.facts,
        "strategy": report.strategy,
        "rewinds": report.rewinds,
        "safe_rows": report.safe_rows,
        "probes": report.probes,
        "advice": list(report.advice),
    }


def _to_text(report: Report) -> str:
    facts, probes = report.facts, report.probes
    append, prefix, ladder, abort = (probes[name] for name in ("append", "prefix", "ladder", "abort"))
    end = {True: "kept", False: "not kept", None: "not known"}[append.get("end_in_kv")]
    edits = "noticed" if prefix.get("rewinds") else "not noticed, or not known"
    lines = [
        ("library", f"RKLLM {facts['version']} (ABI {facts['family']}), {report.library}"),
        ("loaded in", f"{facts['load_s']:g} s"),
        ("append", _verdict(append)),
        ("end token", f"{end} in the KV cache"),
        ("prefix", _verdict(prefix)),
        ("other picture", edits),
        ("abort", f"takes {abort.get('seconds')} s, leaves {abort.get('kv_rows')} rows"),
        ("runs", f"of up to {max(ladder.get('worked', []), default=0)} rows work{_crashes(ladder)}"),
        ("memory", f"{probes['memory'].get('mb_per_run')} MB per run"),
        ("prefill", f"{probes['speed'].get('prefill_rows_per_s')} rows/s"),
        ("decode", f"{probes['speed'].get('decode_tokens_per_s')} tokens/s"),
        ("strategy", f"{report.strategy}, written to {report.profile}"),
        *(("note", text) for text in report.advice),
    ]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


def _verdict(result: dict[str, Any]) -> str:
    if result.get("works"):
        return "works"
    return f"not used: {result.get('why') or result.get('crashed') or result.get('failed')}"


def _crashes(ladder: dict[str, Any]) -> str:
    return f"; {min(ladder['crashed'])} crash" if ladder.get("crashed") else ""
