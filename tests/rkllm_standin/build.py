"""Compile the stand-in library and write its model, once; later calls find them in a folder of temporary files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mmchat.model_dir import DEMO, open_model
from mmchat.rkllm_abi import FAMILIES
from tools import write_rkllm_standin_model
from tools.write_rkllm_headers import header_name

SOURCE = Path(__file__).with_name("standin.c")
INCLUDE = Path(__file__).with_name("include")
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_LIBRARIES = ("-Wl,--no-undefined", "-lm", "-lpthread")

_UNUSED_S = 3 * 86400.0  # then what was made of older sources is removed

# What the KV cache does with embedding input, as far as it is documented or was reported.
_KV_RULE = {
    "1.1": "none", "1.2.0": "broken-append", "1.2.1b1": "broken-append", "1.2.1-1.2.3": "prefix", "1.3.0": "prefix"
}  # fmt: skip
_KV_RULE_OF_VERSION = {"1.2.1": "broken-append", "1.2.2": "broken-append"}


def compiler() -> str | None:
    """The C compiler: $CC, else cc; None where there is none."""
    return shutil.which(os.environ.get("CC") or "cc")


def build(family: str, version: str | None = None) -> Path:
    """The library of a family, as its newest release or as the version given.

    Raises subprocess.CalledProcessError where it does not compile.
    """
    version = version or FAMILIES[family].versions[-1]
    rule = _KV_RULE_OF_VERSION.get(version, _KV_RULE[family])
    header = INCLUDE / header_name(family)
    defines = {
        "FAMILY_HEADER": f'"{header}"',
        "ABI": str(1 + list(FAMILIES).index(family)),
        "VERSION": f'"{version}"',
        "KV_RULE": f'"{rule}"',
    }
    command = [compiler() or "cc", *_FLAGS, *(f"-D{name}={value}" for name, value in defines.items())]
    return compile_library([*command, str(SOURCE), *_LIBRARIES], [SOURCE, header], "librkllmrt.so")


def compile_library(command: list[str], sources: list[Path], name: str) -> Path:
    """Run the command, with `-o` the result, unless it was run before on the same sources."""
    texts = [source.read_bytes() for source in sources]
    return _once(
        "\0".join(command).encode() + b"".join(texts),
        name,
        lambda made: subprocess.run([*command, "-o", str(made)], check=True),
    )


def demo_model() -> Path:
    """The demo model as the stand-in's file."""
    parts = [Path(write_rkllm_standin_model.__file__), *sorted(open_model(DEMO).folder.iterdir())]
    stamp = "".join(f"{part.name} {hashlib.sha256(part.read_bytes()).hexdigest()}\n" for part in parts)
    return _once(stamp.encode(), "demo.rkllm", lambda made: write_rkllm_standin_model.write_model(DEMO, made))


def _once(key: bytes, name: str, make: Callable[[Path], object]) -> Path:
    """The file that make(path) writes; made unless it was under the same key before."""
    folder = Path(tempfile.gettempdir()) / f"mmchat-standin-{os.getuid()}" / hashlib.sha256(key).hexdigest()[:24]
    if (folder / name).exists():
        os.utime(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another run removes it, too
                if other.stat().st_mtime < time.time() - _UNUSED_S:
                    shutil.rmtree(other, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            make(Path(work) / name)
            (Path(work) / name).replace(folder / name)
    return folder / name


def library(family: str, version: str | None = None) -> Path:
    """build(), for tests: where there is no C compiler the test is skipped, but fails in CI."""
    if compiler() is None:
        import pytest

        if os.environ.get("CI") == "true":
            pytest.fail("no C compiler (cc), and CI=true demands one")
        pytest.skip("no C compiler (cc) to build the stand-in library with")
    return build(family, version)
