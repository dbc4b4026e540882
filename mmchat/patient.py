"""What mmchat.doctor looks at: a machine's files below a root folder, and what this process knows of itself.

Where drivers and kernels leave what they know is read off users' reports from RK3588 boards; none was at hand.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["ok", "advice", "problem", "unknown"]

NPU_SOCS = ("RK3588", "RK3576")
_MAX_TEXT_BYTES = 1 << 16


@dataclass(frozen=True)
class Finding:
    """status: ok, advice (it works, but could be better), problem, or unknown (could not be found out).

    what: one line with the value found.  cure: one line, what to do; empty where the status is ok.
    """

    name: str
    status: Status
    what: str
    cure: str = ""


def _may_use(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK | (os.X_OK if os.path.isdir(path) else 0))


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def _machine() -> str:
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())


def _glibc() -> str:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError, AttributeError):
        return ""
    return version if name == "glibc" else ""


def _packages() -> dict[str, str]:
    """Versions of the engines' packages that can be imported ("?" where it is not told), without importing them."""
    found = {}
    for module, package in (("openvino", "openvino"), ("rknnlite", "rknn-toolkit-lite2")):
        try:
            if importlib.util.find_spec(module) is None:
                continue
            found[package] = str(importlib.metadata.version(package) or "?")
        except importlib.metadata.PackageNotFoundError:
            found[package] = "?"
        except (ImportError, ValueError, OSError, KeyError):
            continue
    return found


@dataclass(frozen=True)
class Process:
    """What is known of this process rather than read from a file.  glibc: "" where it is another libc."""

    machine: str = field(default_factory=_machine)
    python: str = field(default_factory=platform.python_version)
    glibc: str = field(default_factory=_glibc)
    packages: Mapping[str, str] = field(default_factory=_packages)
    may_use: Callable[[Path], bool] = _may_use
    free_bytes: Callable[[Path], int] = _free_bytes


class Patient:
    """A machine's files below root, named as on that machine; what cannot be read is "", [] or False."""

    def __init__(self, root: Path, environ: Mapping[str, str], process: Process) -> None:
        self.root, self.environ, self.process = root, environ, process
        compatible = self.text("/proc/device-tree/compatible") or self.text("/sys/firmware/devicetree/base/compatible")
        socs = re.findall(r"rockchip,(r[kv][0-9]{4})", compatible)
        self.soc = socs[-1].upper() if socs else ""  # the list goes from the board to the chip
        self.board = self.text("/proc/device-tree/model") or self.text("/sys/firmware/devicetree/base/model")
        # What the CPU engine lacks is a problem only where there is no NPU.
        self.cpu_engine: Status = "advice" if self.soc in NPU_SOCS else "problem"

    def path(self, name: str | Path) -> Path:
        return self.root / str(name).lstrip("/")

    def text(self, name: str) -> str:
        path = self.path(name)
        try:
            if not os.path.isfile(path):  # a pipe or a device would block
                return ""
            with path.open("rb") as file:
                return file.read(_MAX_TEXT_BYTES).decode(errors="replace").strip(" \0\t\r\n")
        except (OSError, ValueError):
            return ""

    def word(self, name: str) -> str:
        """The first word of a file of one word."""
        return (self.text(name).split() or [""])[0][:40]

    def number(self, name: str) -> int:
        """A file's number; 0 where there is none."""
        word = self.word(name)
        return int(word) if re.fullmatch(r"[0-9]{1,18}", word) else 0

    def names(self, pattern: str) -> list[str]:
        """Paths that match, sorted."""
        try:
            return sorted(f"/{name}" for name in glob.glob(pattern.lstrip("/"), root_dir=self.root))
        except (OSError, ValueError):
            return []

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; () where there are none."""
    match = re.match(r"v?([0-9]{1,9}(?:\.[0-9]{1,9})*)", version)
    return tuple(map(int, match.group(1).split("."))) if match else ()


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 10**8 else f"{n_bytes / 1e6:.0f} MB"
