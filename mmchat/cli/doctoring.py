"""mmchat doctor: a table of findings, or JSON; exit code 1 where one is a problem."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import asdict

import typer

from mmchat.doctor import examine
from mmchat.patient import Finding

_STYLES = {"ok": "green", "advice": "yellow", "unknown": "cyan", "problem": "bold red"}
_WIDTH_OF_A_FILE = 160


def doctor(model: str | None, as_json: bool) -> None:
    findings = examine(model=model)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print(findings)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a board's name may not fit the terminal's encoding
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("status")
    table.add_column("name")
    for column in ("what", "cure"):
        table.add_column(column, ratio=1, overflow="fold")
    for one in findings:
        table.add_row(Text(one.status, _STYLES[one.status]), one.name, Text(one.what), Text(one.cure))
    a_file = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(width=_WIDTH_OF_A_FILE if a_file else None)
    console.print(table)
    counts = [f"{sum(one.status == status for one in findings)} {status}" for status in _STYLES]
    console.print(Text(", ".join(counts)))
