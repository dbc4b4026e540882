"""What stands between this machine and a chat: each finding with the value found and its cure.

Nothing is written, loaded, started or asked of the NPU: that it computes, and computes right, is not known here.

Sources: the community's MiniCPM-V-2.6 port (9.7 GB in use with 8.75 GB of files), RKLLM 1.2.0's benchmark (memory on
RK3576), the names of openvino's wheels on PyPI (glibc).
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from mmchat import half_made
from mmchat.board_files import board_files
from mmchat.checkpoint import Checkpoint, read_header
from mmchat.doctor_npu import examine_encoder, examine_npu
from mmchat.errors import ModelDirError, StoreError
from mmchat.model_dir import BOARD_FILE, ModelSpec, model_folder, open_model
from mmchat.patient import NPU_SOCS, Finding, Patient, Process, gigabytes, numbers
from mmchat.store import default_cap, default_folders

_PYTHON_FROM, _PYTHON_BELOW = (3, 10), (3, 13)
_OPENVINO_FROM = (2025, 2)
_GLIBC_FROM = {"aarch64": (2, 35), "x86_64": (2, 28)}  # openvino's wheels: manylinux_2_35, manylinux_2_28
# In use while MiniCPM-V-2.6 answers: w8a8 on RK3588, w4a16 on RK3576.
_IN_USE_BYTES = {"RK3588": 9_700_000_000, "RK3576": 6_530_000_000}
_BYTES_PER_FILE_BYTE = 1.11  # 9.7 GB in use with files of 8.75 GB
_DISK_NEEDED_BYTES = 100 << 20
_FILES_ADVISED, _FILES_NEEDED = 1024, 256
_LFS_POINTER = b"version https://git-lfs"
_MAX_LINE = 1000
_KINDS = {"board": "a board folder (*.rkllm)", "openvino": "an OpenVINO folder", "checkpoint": "a checkpoint", "": ""}


def examine(
    root: Path = Path("/"),
    model: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    process: Process | None = None,
) -> list[Finding]:
    """Every finding, in the order in which a person would cure them.  Raises nothing, whatever the files hold.

    root: a machine's files; system paths are read, and shown, below it.  model: "demo" or a folder (not below root).
    environ: the chat's environment (MMCHAT_RKLLM_LIB, MMCHAT_STORE, ...).
    """
    patient = Patient(root, environ, process or Process())
    findings = [_machine_finding(patient), _python(patient), _glibc_finding(patient), _openvino(patient)]
    if patient.soc in NPU_SOCS:
        findings += examine_npu(patient, None if model is None else model_folder(model))
    elif model is not None and _layout(model_folder(model))[0] == "board":
        what = "no Rockchip NPU here, and this folder's LLM runs on nothing else"
        findings.append(Finding("npu", "advice", what, f"copy the folder to a board with {' or '.join(NPU_SOCS)}"))
    else:
        findings.append(Finding("npu", "ok", "no Rockchip NPU here: the OpenVINO engine is used"))
    findings += [_memory(patient, model), *_store(patient), _open_files(patient)]
    if model is not None:
        findings += _model(patient, model)
    return [replace(one, what=_line(one.what) or "nothing told", cure=_line(one.cure)) for one in findings]


def _machine_finding(patient: Patient) -> Finding:
    machine = patient.process.machine
    what = ", ".join(part for part in (machine, patient.board, patient.soc) if part)
    if machine not in _GLIBC_FROM:
        return Finding("machine", "problem", what, "use a 64-bit system, aarch64 or x86_64: no engine runs on this one")
    if patient.soc and patient.soc not in NPU_SOCS:
        cure = f"use a board with {' or '.join(NPU_SOCS)}; here the CPU engine works, slowly"
        return Finding("machine", "advice", f"{what}: its NPU cannot run MiniCPM-V-2.6", cure)
    return Finding("machine", "ok", what)


def _python(patient: Patient) -> Finding:
    version = patient.process.python
    if _PYTHON_FROM <= numbers(version) < _PYTHON_BELOW:
        return Finding("python", "ok", version)
    return Finding("python", "problem", version, "use Python 3.10, 3.11 or 3.12 (a venv of its own is best)")


def _glibc_finding(patient: Patient) -> Finding:
    version, needed = patient.process.glibc, _GLIBC_FROM.get(patient.process.machine, (2, 35))
    if not version:
        cure = "use a distribution with glibc, such as Debian or Ubuntu: the engines have no wheels for another libc"
        return Finding("glibc", "unknown", "this Python's libc is not glibc, or does not tell its version", cure)
    if numbers(version) >= needed or "openvino" in patient.process.packages:
        return Finding("glibc", "ok", version)
    least = ".".join(map(str, needed))
    cure = f"for the CPU engine use a system with glibc {least}: Ubuntu 22.04, Debian 12 or later"
    return Finding("glibc", patient.cpu_engine, f"{version}, but openvino's wheels need {least}", cure)


def _openvino(patient: Patient) -> Finding:
    version = patient.process.packages.get("openvino")
    cure = "pip install openvino"
    if version is None:
        return Finding("openvino", patient.cpu_engine, "not installed: there is no CPU engine", cure)
    if version != "?" and numbers(version) < _OPENVINO_FROM:
        return Finding("openvino", patient.cpu_engine, f"{version}; 2025.2 is needed", f"{cure} --upgrade")
    return Finding("openvino", "ok", version if version != "?" else "installed, version unknown")


def _memory(patient: Patient, model: str | Path | None) -> Finding:
    match = re.search(r"^MemAvailable:\s*([0-9]{1,15}) kB", patient.text("/proc/meminfo"), re.MULTILINE)
    if not match:
        return Finding("memory", "unknown", "no MemAvailable in /proc/meminfo", "look with: free -h")
    free = int(match.group(1)) * 1024
    cure = "close other programs, use a board or PC with more memory, or a smaller model"
    least, needed = _model_bytes(model_folder(model)) if model is not None else (0, 0)
    if not needed:
        typical = _IN_USE_BYTES.get(patient.soc, 0)
        if free < typical:
            what = f"{gigabytes(free)} available; MiniCPM-V-2.6 takes about {gigabytes(typical)} on {patient.soc}"
            return Finding("memory", "advice", what, cure)
        return Finding("memory", "ok", f"{gigabytes(free)} available")
    what = f"{gigabytes(free)} available; the model takes {gigabytes(needed)} and more"
    if free < least:
        return Finding("memory", "problem", what, cure)
    return Finding("memory", "advice", what, cure) if free < needed else Finding("memory", "ok", what)


def _store(patient: Patient) -> Iterator[Finding]:
    """The store's folder, and room for it."""
    folders = [Path(os.path.abspath(folder)) for folder in default_folders(patient.environ)]
    usable = [folder for folder in folders if _is_usable(patient, folder)]
    cure = "give a folder that this user can write: export MMCHAT_STORE=DIR"
    if not usable:
        yield Finding("store", "problem", f"{folders[0]}: embeddings cannot be kept there", cure)
        return
    if usable[0] != folders[0]:
        yield Finding("store", "advice", f"{folders[0]} cannot be written; {usable[0]} is used instead", cure)
    else:
        yield Finding("store", "ok", str(usable[0]))
    try:
        free = patient.process.free_bytes(_nearest(patient.path(usable[0])))
    except OSError as error:
        yield Finding("disk", "unknown", f"{usable[0]}: {error.strerror or error}", f"look with: df -h {usable[0]}")
        return
    try:
        cap = default_cap(patient.environ)
    except StoreError as error:
        yield Finding("disk", "problem", str(error), "export MMCHAT_STORE_CAP=2G, or unset it")
        return
    what = f"{gigabytes(free)} free for the store in {usable[0]}"
    cure = "remove files there, or move the store to a larger disk: export MMCHAT_STORE=DIR"
    if free < _DISK_NEEDED_BYTES:
        yield Finding("disk", "problem", what, cure)
    elif free < cap:
        yield Finding("disk", "advice", f"{what}, which may grow to {gigabytes(cap)}", cure)
    else:
        yield Finding("disk", "ok", what)


def _is_usable(patient: Patient, folder: Path) -> bool:
    """Whether it is there and can be written, or can be made."""
    there = _nearest(patient.path(folder))
    return os.path.isdir(there) and patient.process.may_use(there)


def _nearest(path: Path) -> Path:
    """The path, or the first of its parents that is there."""
    return next((one for one in (path, *path.parents) if os.path.lexists(one)), path)


def _open_files(patient: Patient) -> Finding:
    name = "open files"
    match = re.search(r"^Max open files\s+([0-9]{1,18}|unlimited)", patient.text("/proc/self/limits"), re.MULTILINE)
    if not match:
        return Finding(name, "unknown", "no limit in /proc/self/limits", "look with: ulimit -n")
    limit = match.group(1)
    if limit == "unlimited" or int(limit) >= _FILES_ADVISED:
        return Finding(name, "ok", limit)
    cure = f"ulimit -n {_FILES_ADVISED}, or raise nofile in /etc/security/limits.conf"
    return Finding(name, "problem" if int(limit) < _FILES_NEEDED else "advice", f"{limit} may be open at once", cure)


def _model(patient: Patient, model: str | Path) -> list[Finding]:
    """The folder and, where it is a board's and this is one, its encoder."""
    folder = model_folder(model)
    kind, files = _layout(folder)
    cure = {
        "checkpoint": "download the file again that is missing or damaged, and compare its size with the published one",
        "board": "put that right; the README's section On a board tells what belongs there",
        "": 'give the folder of a published MiniCPM-V-2.6 checkpoint, or "demo"',
    }.get(kind, "copy here what is missing, or make the folder anew: mmchat convert openvino CHECKPOINT DIR")
    for file in files:
        if _is_lfs_pointer(file):
            what = f"{file}: a Git LFS pointer, not the file itself"
            return [Finding("model", "problem", what, "fetch the files themselves: git lfs pull")]
    half = half_made.look(folder)
    if half is not None:
        return [Finding("model", "problem", half.what, half.cure)]
    try:
        spec = open_model(model)
        if kind == "checkpoint":
            _check_checkpoint(spec)
        encoder = [examine_encoder(patient, spec)] if spec.board and patient.soc in NPU_SOCS else []
    except ModelDirError as error:
        if pull := half_made.interrupted_pull(folder):
            return [Finding("model", "problem", f"{pull.what}; {error}", pull.cure)]
        what = f"it looks like {_KINDS[kind]}; {error}" if kind not in ("", "checkpoint") else str(error)
        return [Finding("model", "problem", what, cure)]
    except (OSError, ValueError) as error:
        return [Finding("model", "problem", f"{folder}: cannot be read ({error})", f"look with: ls -l {folder}")]
    files = _loaded(spec) or files
    size = sum(map(_size, files))
    what = f"{folder}: {_KINDS[kind] or 'a model'}, complete, {gigabytes(size)} in {len(files)} file(s)"
    if kind == "board" and not os.path.isfile(folder / BOARD_FILE):
        what += f"; without {BOARD_FILE}, as the community's: its encoder takes one square, to which slices are scaled"
    shape = f"{spec.llm.n_layers} layers of {spec.llm.hidden_size}, context {spec.llm.context_rows}"
    return [Finding("model", "ok", f"{what}; {shape}"), *encoder]


def _loaded(spec: ModelSpec) -> list[Path]:
    """Of a board's folder, which may hold other models beside, what is loaded into memory; [] for another folder."""
    return [spec.board.llm_path, spec.board.vision_path] if spec.board else []


def _layout(folder: Path) -> tuple[str, list[Path]]:
    """What a folder looks like, a key of _KINDS, and the files that may be loaded from it."""
    for kind, patterns in (
        ("board", ("*.rkllm", "*.rknn", BOARD_FILE)),
        ("openvino", ("openvino_*.bin",)),
        ("checkpoint", ("*.safetensors",)),
    ):
        try:
            found = [folder / name for pattern in patterns for name in sorted(glob.glob(pattern, root_dir=folder))]
        except (OSError, ValueError):
            continue
        if found and not (kind == "board" and BOARD_FILE not in (path.name for path in found) and _is_whole(folder)):
            return kind, [path for path in found if os.path.isfile(path)]
    return "checkpoint" if os.path.isfile(folder / "config.json") else "", []


def _is_whole(folder: Path) -> bool:
    """Whether it is a checkpoint, though a board's file lies beside it."""
    try:
        tensors = (name for path in sorted(folder.glob("*.safetensors")) for name in read_header(path))
        return board_files(folder) is None and any(name.startswith("vpm.") for name in tensors)
    except (ModelDirError, OSError):
        return False


def _check_checkpoint(spec: ModelSpec) -> None:
    """Raises ModelDirError: a layer without tensors, a table of another size, or a tokenizer that is no JSON."""
    checkpoint = Checkpoint(spec.folder)
    layers = {match.group(1) for name in checkpoint if (match := re.match(r"(.+\.layers\.[0-9]+)\.", name))}
    needed = [f"llm.model.layers.{layer}" for layer in range(spec.llm.n_layers)]
    needed += [f"vpm.encoder.layers.{layer}" for layer in range(spec.vision.n_layers)]
    if missing := [prefix for prefix in needed if prefix not in layers]:
        raise ModelDirError(f"{spec.folder}: {len(missing)} of {len(needed)} layers lack tensors, as {missing[0]} does")
    if not any(name.startswith("resampler.") for name in checkpoint):
        raise ModelDirError(f"{spec.folder}: no tensors resampler.*")
    table = checkpoint.file("llm.model.embed_tokens.weight").tensors["llm.model.embed_tokens.weight"]
    if table.shape != (spec.llm.vocab_size, spec.llm.hidden_size):
        expected = f"{spec.llm.vocab_size} x {spec.llm.hidden_size}"
        raise ModelDirError(f"{spec.folder}: token rows are {table.shape}, but config.json says {expected}")
    try:
        json.loads(spec.tokenizer_path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelDirError(f"{spec.tokenizer_path}: not JSON ({error})") from None


def _model_bytes(folder: Path) -> tuple[int, int]:
    """(a lower bound, an estimate) of the memory that a model takes.

    The CPU engine holds a checkpoint's tensors in float32, whatever type they have on disk.
    """
    kind, files = _layout(folder)
    if kind == "board":
        with contextlib.suppress(ModelDirError, OSError, ValueError):
            files = _loaded(open_model(folder)) or files
    size = sum(map(_size, files))
    if kind == "checkpoint":
        try:
            checkpoint = Checkpoint(folder)
            size = 4 * sum(prod(checkpoint.info(name).shape) for name in checkpoint)
        except (ModelDirError, OSError, ValueError):
            pass  # the model's own finding says why
    return size, int(size * _BYTES_PER_FILE_BYTE)


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _line(text: str) -> str:
    """One printable line of a length that a table can show."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 3]}..."
