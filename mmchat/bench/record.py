"""What the figures were made with and on, and how they are shown: JSON for programs, Markdown for people."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mmchat
from mmchat.bench import board, rehearsal, work
from mmchat.bench.conversations import OVERFLOW
from mmchat.context import Policy
from mmchat.forecast import PUBLISHED_RK3588

_PACKAGES = ("numpy", "pillow", "openvino")


@dataclass(frozen=True)
class Table:
    """rows of texts below a head; note: what has to be known to read it."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def to_markdown(self) -> str:
        lines = [f"## {self.title}", "", self.note, ""]
        lines += ["| " + " | ".join(row) + " |" for row in (self.head, ("---",) * len(self.head), *self.rows)]
        return "\n".join(lines) + "\n"


def context() -> dict[str, Any]:
    """Date, version, commit and machine; load: what ran beside, as the kernel's average over the last minute."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mmchat": mmchat.__version__,
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "load_before": round(os.getloadavg()[0], 2),
        },
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """Everything in a result, as tables."""
    made = []
    if "conversations" in found:
        made += [_work(found["conversations"]), _curve(found["overflow_curve"])]
        if "rehearsals" in found:  # records before 2026-11-22 have none
            made.append(_rehearsals(found["rehearsals"]))
        made.append(_board(found["conversations"]))
    if "chat" in found:
        made.append(_chat(found["chat"]))
    if "host" in found:
        made += _host(found["host"])
    if "peers" in found:
        made.append(_peers(found["peers"]))
    return made


def to_markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items() if number)
    busy = machine["load_before"] > 0.5 * (machine["cores"] or 1)
    lines = [
        f"`mmchat bench`, {found['date'][:10]}, mmchat {found['mmchat']}"
        + (f", commit {found['commit']}" if found["commit"] else "")
        + f". {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:g} GB, {machine['system']}; "
        + f"Python {machine['python']}, {packages}.",
        f"**The machine was busy** with other work (load {machine['load_before']:g} before the run): "
        "read the counts and the ratios, not the seconds."
        if busy
        else f"The machine was idle (load {machine['load_before']:g} before the run).",
    ]
    return "\n\n".join([*lines, *(table.to_markdown() for table in tables(found))])


def save(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write work.json and work.md, host..., chat..., each with its context; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {name: found[name] for name in ("date", "mmchat", "commit", "machine")}
    written = []
    for section, key in (("work", "conversations"), ("host", "host"), ("chat", "chat"), ("peers", "peers")):
        if key not in found:
            continue
        part = {**about, key: found[key]}
        if key == "conversations":
            part |= {name: found[name] for name in ("overflow_curve", "rehearsals") if name in found}
        for suffix, text in (
            (".json", json.dumps(part, indent=1) + "\n"),
            (".md", f"# {section}\n\n{to_markdown(part)}"),
        ):
            path = folder / f"{section}{suffix}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def _work(conversations: list[dict[str, Any]]) -> Table:
    rows = [
        (
            one["name"],
            f"{one['engine']}, {one['strategy']}" + ("" if one["counted"] == "run" else " *"),
            f"{one['slices_encoded']} / {one['slices_distinct']}",
            f"{one['slices_ratio']:.2f}",
            f"{one['rows_prefilled']} / {one['rows_new']}",
            f"{one['rows_ratio']:.2f}",
        )
        for one in conversations
    ]
    note = (
        "Counts, exact: slices encoded per distinct slice, rows prefilled per new row. * not run: counted from the "
        "same requests by the rules of that strategy, for a library that keeps to them (`mmchat calibrate` finds out)."
    )
    return Table("Work", note, ("conversation", "engine", "slices", "ratio", "rows", "ratio"), rows)


_TRIMMED = ("keep", "least left", "trims", "rows", "ratio")


def _trimmed(one: dict[str, Any]) -> tuple[str, ...]:
    """A row below _TRIMMED."""
    remarks = {1.0: " (the minimum is trimmed)", Policy().keep: " (the default)"}
    return (
        f"{one['keep']:g}{remarks.get(one['keep'], '')}",
        "-" if one["kept_least"] is None else f"{one['kept_least']:.2f}",
        str(one["trims"]),
        f"{one['rows_prefilled']} / {one['rows_new']}",
        f"{one['rows_ratio']:.2f}",
    )


def _rehearsals(rehearsals: list[dict[str, Any]]) -> Table:
    note = (
        f"The same for {rehearsal.CONTEXT_ROWS} rows of context, as boards have, counted by the planner from sizes "
        f"alone (`mmchat.bench.rehearsal`): nothing ran. Answers of up to {rehearsal.MAX_NEW_TOKENS} tokens."
    )
    rows = [(one["name"], *_trimmed(one)) for one in rehearsals]
    return Table("Overflow of a board's context", note, ("conversation", *_TRIMMED), rows)


def _curve(curve: list[dict[str, Any]]) -> Table:
    rows = [_trimmed(one) for one in curve]
    note = (
        f'"{OVERFLOW.name}", {OVERFLOW.context_rows} rows of context, OpenVINO: rows prefilled per new row over the '
        "share of the cap that a trim is asked to leave (`Policy.keep`), and the least that one left."
    )
    return Table("Overflow", note, _TRIMMED, rows)


def _board(conversations: list[dict[str, Any]]) -> Table:
    rows = [
        (
            one["name"],
            f"{one['engine']}, {one['strategy']}",
            *(f"{seconds:.0f}" for seconds in (one["predicted_rk3588_s"], *one["peers"].values())),
        )
        for one in conversations
    ]
    figures = PUBLISHED_RK3588
    note = (
        f"**Predicted, not measured**: the counts times figures published for an RK3588 ({figures['encode']:g} s "
        f"per slice, {1 / figures['prefill']:.1f} rows/s, {1 / figures['generate']:.2f} tokens/s), an image row of the "
        f"demo model counted as those {board.ROWS_PER_SLICE} per slice that MiniCPM-V-2.6 has. The peers' ways do the "
        "same conversation with the same slices: "
        f'"{work.REENCODE}" at every turn; "{work.ONE_IMAGE}" for each picture that a question is about, and so '
        "without an answer that compares them."
    )
    return Table(
        "Board time", note, ("conversation", "engine", "mmchat s", f"{work.REENCODE} s", f"{work.ONE_IMAGE} s"), rows
    )


def _chat(chat: dict[str, Any]) -> Table:
    rows = [
        ("wall time", f"{chat['wall_s']:.3f} s"),
        ("the model's own time", f"{chat['model_s']:.3f} s"),
        ("host overhead", f"{100 * chat['overhead_share']:.1f} % of the model's own time"),
        ("in that, reading and cutting pictures", f"{100 * chat['pictures_share']:.1f} % of the model's own time"),
        ("per token, the model", f"{chat['model_ms_per_token']:.2f} ms"),
        ("per token, host overhead", f"{chat['overhead_ms_per_token']:.3f} ms"),
    ]
    note = (
        f'"{chat["script"]}" on the model that was opened, {chat["turns"]} turns, {chat["slices"]} slices, '
        f"{chat['tokens']} tokens: the whole program and, question by question in turns, engine and encoder alone in "
        f"one process (the model's own time). Each question's median of {chat['rounds']}."
    )
    return Table("Chat", note, ("what", "figure"), rows)


def _peers(peers: dict[str, Any]) -> Table:
    rows = [
        ("mmchat", f"{peers['mmchat_s']:.3f} s"),
        (peers["peer"], f"{peers['peer_s']:.3f} s"),
        ("ratio", f"{peers['ratio']:.2f}"),
        ("answers that are the same, from the first on", f"{peers['same_answers']} of {peers['turns']}"),
    ]
    note = (
        f"Wall time of a chat of {peers['turns']} turns with {peers['pictures']} pictures, on the same OpenVINO "
        f"folder, turn by turn in turns; medians of {peers['rounds']}. mmchat's models run in processes of their own."
    )
    return Table("Peers", note, ("what", "figure"), rows)


def _host(host: dict[str, Any]) -> list[Table]:
    pictures = [
        (
            "x".join(map(str, one["size"])),
            f"{one['plain_pillow_ms_per_megapixel']:.1f}",
            f"{one['ms_per_megapixel']:.1f}",
            f"{one['ratio']:.2f}",
            f"{one['reference_pixels_ratio']:.2f}",
            "equal" if one["psnr_db"] is None else f"{one['psnr_db']:.1f} dB",
        )
        for one in host["pictures"]
    ]
    rows = [
        (
            one["dtype"],
            str(one["rows"]),
            f"{one['memcpy_gb_per_s']:.2f}",
            f"{one['gather_gb_per_s']:.2f}",
            f"{one['ratio']:.2f}",
        )
        for one in host["rows"]
    ]
    messages = [
        (one["request"], f"{one['ms']:.2f}", f"{one['bare_ms']:.2f}", f"{one['ratio']:.1f}") for one in host["messages"]
    ]
    return [
        Table(
            "Pictures",
            "Reading and cutting a JPEG for 9 slices at 448, against the same steps in plain Pillow. "
            "`reference_pixels` gives the same pixels always; the default decodes large JPEGs at a fraction of their "
            "size, and the last column says how near that is.",
            ("JPEG", "plain ms/MP", "ours ms/MP", "ratio", "ratio, reference_pixels", "pixels"),
            pictures,
        ),
        Table(
            "Rows",
            "Gathering rows of 3584 from a memory-mapped table, against a copy of as many float32 rows.",
            ("table", "rows", "memcpy GB/s", "gather GB/s", "ratio"),
            rows,
        ),
        Table(
            "Messages",
            "A request to a worker and its events, against as many bytes over a bare socket to a bare process.",
            ("request", "ms", "bare ms", "ratio"),
            messages,
        ),
        Table(
            "Start",
            "Processes from nothing to their end; workers included where a token is made.",
            ("what", "s"),
            [(one["what"], f"{one['s']:.2f}") for one in host["start"]],
        ),
        Table(
            "Memory",
            "Largest resident size over the scripted chat.",
            ("process", "MB"),
            [(one["process"], f"{one['peak_mb']:.0f}") for one in host["memory"]],
        ),
    ]


def _commit() -> str | None:
    """Of the checkout that this package is in, "+" where it has changes; None where it is none."""
    here = Path(mmchat.__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") != str(here.parent):
            return None
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
