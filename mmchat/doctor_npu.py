"""What stands between a Rockchip board and a chat: driver, device nodes, frequencies, libraries.

Sources: RKLLM 1.3.0's manual (driver 0.9.8, kernels 5.10.209 and 6.1.84), the community's MiniCPM-V-2.6 port (driver
0.9.6), bigtreetech/CB2 issue 140 (device nodes and their groups).  Libraries are read, never loaded.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmchat.errors import EngineError
from mmchat.model_dir import ModelSpec
from mmchat.patient import Finding, Patient, numbers
from mmchat.rkllm_abi import FAMILY_OF_VERSION
from mmchat.rkllm_detect import LIBRARY, LIBRARY_FOLDERS, Probe, detect, exported_symbols, version_of
from mmchat.rknn_file import read_rknn

_DRIVER_NEEDED, _DRIVER_ADVISED = (0, 9, 6), (0, 9, 8)
_DRIVER_VERSIONS = ("/sys/kernel/debug/rknpu/version", "/proc/rknpu/version", "/sys/module/rknpu/version")
_DRIVER_FOLDERS = ("/sys/bus/platform/drivers/RKNPU", "/sys/bus/platform/drivers/rknpu")
_LITE2_FROM = (2, 3)
_LITE2_LOADS = "/usr/lib/librknnrt.so"  # seen with its release 2.5.0, emulated
_RKNN_SOURCE = "rknpu2/runtime/Linux/librknn_api/aarch64 of github.com/airockchip/rknn-toolkit2"
_NOT_ASKED = Probe((), "not asked")


def examine_npu(patient: Patient, model: Path | None = None) -> list[Finding]:
    """Every finding about the NPU, in the order in which a person would cure them.

    model: a folder (not below root), whose own library goes before the system's.
    """
    device = [_driver(patient), _devices(patient), _npu_speed(patient), _cpu_speed(patient)]
    return [*device, _librkllmrt(patient, model), _librknnrt(patient), _lite2(patient)]


def _driver(patient: Patient) -> Finding:
    name = "npu driver"
    for path in _DRIVER_VERSIONS:
        if found := re.search(r"[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}", patient.text(path)):
            what = f"rknpu {found.group()} ({path})"
            if numbers(found.group()) < _DRIVER_NEEDED:
                cure = "flash or upgrade to an image whose kernel (5.10.209, 6.1.84 or later) has rknpu 0.9.8"
                return Finding(name, "problem", f"{what}; 0.9.6 is needed", cure)
            if numbers(found.group()) < _DRIVER_ADVISED:
                cure = "upgrade to a kernel with rknpu 0.9.8 when you can: older ones run out of NPU memory early"
                return Finding(name, "advice", f"{what}; 0.9.8 is advised", cure)
            return Finding(name, "ok", what)
    drivers = "/sys/bus/platform/drivers"
    if (
        patient.exists(drivers)
        and not any(map(patient.exists, ("/sys/module/rknpu", *_DRIVER_FOLDERS)))
        and not patient.names("/dev/rknpu")
    ):
        other = "; the mainline driver rocket is there, which cannot run these libraries"
        what = f"the kernel has no rknpu driver{other if patient.exists(f'{drivers}/rocket') else ''}"
        return Finding(name, "problem", what, "boot the board maker's kernel (vendor 5.10 or 6.1), which has rknpu")
    cure = f"look with: sudo cat {_DRIVER_VERSIONS[0]} (0.9.6 is needed, 0.9.8 advised)"
    return Finding(name, "unknown", "its version is not readable for this user", cure)


def _devices(patient: Patient) -> Finding:
    name = "npu device"
    nodes = _npu_nodes(patient)
    if not nodes:
        cure = "load the driver (sudo modprobe rknpu; sudo dmesg | grep -i rknpu); into a container, pass /dev/dri"
        return Finding(name, "problem", "no /dev/dri/renderD* and no /dev/rknpu", cure)
    shut = [node for node in nodes if not patient.process.may_use(patient.path(node))]
    if not shut:
        return Finding(name, "ok", ", ".join(nodes))
    groups = ",".join(sorted({_group(patient, node) for node in shut} - {""})) or "render,video"
    cure = f"sudo usermod -aG {groups} $USER, then log in again"
    what = f"{', '.join(shut)} cannot be opened for reading and writing by this user"
    return Finding(name, "problem" if len(shut) == len(nodes) else "advice", what, cure)


def _npu_nodes(patient: Patient) -> list[str]:
    """The NPU's device nodes; where no driver says which they are, all render nodes."""
    kinds = ("card", "renderD")
    named = set()
    for kind in kinds:
        for driver in _DRIVER_FOLDERS:
            named |= {f"/dev/dri/{os.path.basename(path)}" for path in patient.names(f"{driver}/*/drm/{kind}*")}
        for path in patient.names(f"/sys/class/drm/{kind}*/device/uevent"):
            if "rknpu" in patient.text(path).lower():
                named.add(f"/dev/dri/{path.split('/')[4]}")
    nodes = [node for node in sorted(named) if patient.exists(node)] or patient.names("/dev/dri/renderD*")
    return nodes + patient.names("/dev/rknpu")


def _group(patient: Patient, node: str) -> str:
    """The group that may use a node; "" where that is nobody's, root's, or has no name."""
    try:
        number = patient.path(node).stat().st_gid
    except OSError:
        return ""
    for line in patient.text("/etc/group").splitlines():
        name, *rest = line.split(":")
        if number and rest[1:2] == [str(number)] and re.fullmatch(r"[\w.-]{1,32}", name):
            return name
    return ""


def _npu_speed(patient: Patient) -> Finding:
    folders = patient.names("/sys/class/devfreq/*npu*")
    if not folders:
        cure = "look with: sudo cat /sys/kernel/debug/rknpu/freq"
        return Finding("npu speed", "unknown", "no NPU under /sys/class/devfreq", cure)
    clocks = []
    for folder in folders:
        most = patient.number(f"{folder}/max_freq")
        steps = re.findall(r"\b[0-9]{1,18}\b", patient.text(f"{folder}/available_frequencies"))
        now, top = patient.number(f"{folder}/cur_freq"), max([most, *map(int, steps)])
        files = f"{folder}/governor", f"{folder}/max_freq"
        clocks.append(_Clock(*files, patient.word(files[0]), now / 1e6, most / 1e6, top / 1e6))
    return _speed("npu speed", clocks)


def _cpu_speed(patient: Patient) -> Finding:
    folders = patient.names("/sys/devices/system/cpu/cpufreq/policy*")
    if not folders:
        cure = "look whether the kernel has a cpufreq driver"
        return Finding("cpu speed", "unknown", "no policy under /sys/devices/system/cpu/cpufreq", cure)
    clocks = []
    for folder in folders:
        now, most = patient.number(f"{folder}/scaling_cur_freq"), patient.number(f"{folder}/scaling_max_freq")
        top = max(most, patient.number(f"{folder}/cpuinfo_max_freq"))
        files = f"{folder}/scaling_governor", f"{folder}/scaling_max_freq"
        clocks.append(_Clock(*files, patient.word(files[0]), now / 1e3, most / 1e3, top / 1e3))
    return _speed("cpu speed", clocks)


@dataclass(frozen=True)
class _Clock:
    """Two files to write, what the first holds, and MHz: now, at most as it is set, and at most for the chip."""

    governor_file: str
    limit_file: str
    governor: str
    now_mhz: float
    limit_mhz: float
    top_mhz: float

    @property
    def is_limited(self) -> bool:
        return 0 < self.limit_mhz < self.top_mhz

    @property
    def is_fixed(self) -> bool:
        """At the highest frequency that it is allowed."""
        at_top = self.governor == "userspace" and self.now_mhz >= (self.limit_mhz or self.top_mhz) > 0
        return self.governor == "performance" or at_top

    def __str__(self) -> str:
        now, top = (f"{mhz:.0f}" if mhz else "?" for mhz in (self.now_mhz, self.top_mhz))
        limit = f", limited to {self.limit_mhz:.0f}" if self.is_limited else ""
        name = self.governor_file.split("/")[-2]
        return f"{name}: {self.governor or 'no governor'}, {now} of {top} MHz{limit}"


def _speed(name: str, clocks: list[_Clock]) -> Finding:
    """Published speeds are measured with fixed, highest frequencies."""
    loose = [clock.governor_file for clock in clocks if not clock.is_fixed]
    limited = [clock for clock in clocks if clock.is_limited]
    cures = [f"echo performance | sudo tee {' '.join(loose)}"] if loose else []
    if limited:
        cures.append(f"raise {' '.join(clock.limit_file for clock in limited)}")
    cure = f"for full speed, until the next boot: {'; '.join(cures)}" if cures else ""
    return Finding(name, "advice" if cures else "ok", "; ".join(map(str, clocks)), cure)


def _librkllmrt(patient: Patient, model: Path | None) -> Finding:
    name, file = "librkllmrt", LIBRARY
    source = "rkllm-runtime/Linux/librkllm_api/aarch64 of github.com/airockchip/rknn-llm"
    named = patient.environ.get("MMCHAT_RKLLM_LIB")
    own = None if named or model is None or not os.path.isfile(model / file) else model / file
    found = [os.path.abspath(os.path.expanduser(named))] if named else [str(own)] if own else _libraries(patient, file)
    path = own or (patient.path(found[0]) if found else None)
    if path is None or not os.path.isfile(path):
        what = f"MMCHAT_RKLLM_LIB names {named}, which is no file" if named else f"no {file} in {_folders()}"
        return Finding(name, "problem", what, f"copy {file} from {source} to /usr/lib, or name it in MMCHAT_RKLLM_LIB")
    family = patient.environ.get("MMCHAT_RKLLM_FAMILY") or None
    try:
        version = version_of(path)  # first: what is wrong with the file itself
        if family or version in FAMILY_OF_VERSION:
            detect(path, family=family, probed=_NOT_ASKED)
    except EngineError as error:
        cure = f"copy {file} again, from {source}"
        return Finding(name, "problem", str(error), f"{cure}, or unset MMCHAT_RKLLM_FAMILY" if family else cure)
    what = f"RKLLM {version or 'of unknown version'} ({found[0]})"
    if family and (not version or version not in FAMILY_OF_VERSION):
        cure = f"where it crashes, take {file} of a version that is known, from {source}"
        return Finding(name, "advice", f"{what}, used as {family}, which MMCHAT_RKLLM_FAMILY names", cure)
    if not version:
        cure = f"mmchat asks the library when it loads it; where it then refuses it, take {file} from {source}"
        return Finding(name, "unknown", f"{what}: the file does not tell", cure)
    if version not in FAMILY_OF_VERSION:
        first, last = next(iter(FAMILY_OF_VERSION)), list(FAMILY_OF_VERSION)[-1]
        cure = (
            f"use a version from {first} to {last}, of {source}, or upgrade mmchat, or name the one that it is like in "
            "MMCHAT_RKLLM_FAMILY"
        )
        return Finding(name, "problem", f"{what} is not known here", cure)
    if len(found) > 1:
        what = f"{what}; also {_others(patient, found, version_of)}"
        return Finding(name, "advice", what, "keep one of them, or name the right one in MMCHAT_RKLLM_LIB")
    return Finding(name, "ok", what)


def _librknnrt(patient: Patient) -> Finding:
    name, file, source = "librknnrt", "librknnrt.so", _RKNN_SOURCE
    found = _libraries(patient, file)
    if not found:
        return Finding(name, "problem", f"no {file} in {_folders()}", f"copy {file} from {source} to /usr/lib")
    path = patient.path(found[0])
    try:
        version = _rknn_version(path)
    except EngineError as error:
        return Finding(name, "problem", str(error), f"copy {file} again, from {source}")
    what = f"RKNN {version or 'of unknown version'} ({found[0]})"
    if found[0] != _LITE2_LOADS:
        cure = f"sudo ln -s {found[0]} {_LITE2_LOADS}"
        return Finding(name, "problem", f"{what}, but rknn-toolkit-lite2 looks for {_LITE2_LOADS} alone", cure)
    lite2 = patient.process.packages.get("rknn-toolkit-lite2", "")
    if len(found) > 1:
        what = f"{what}; also {_others(patient, found, _rknn_version)}"
        return Finding(name, "advice", what, "keep one of them")
    if not version:
        return Finding(name, "unknown", f"{what}: the file does not tell", f"take a released {file} from {source}")
    if numbers(lite2) and numbers(lite2)[:2] != numbers(version)[:2]:
        cure = f"install the same release of both: pip install rknn-toolkit-lite2=={version}, or another {file}"
        return Finding(name, "advice", f"{what}, but rknn-toolkit-lite2 is {lite2}", cure)
    return Finding(name, "ok", what)


def examine_encoder(patient: Patient, spec: ModelSpec) -> Finding:
    """Whether the model's encoder is for this chip and this librknnrt."""
    name = "encoder"
    assert spec.board is not None
    path, mode = spec.board.vision_path, spec.board.vision_mode
    if not spec.board.rknn:
        return Finding(name, "ok", f"{path.name}: {mode}, on the CPU")
    file = read_rknn(path)
    what = f"{path.name}: {mode}"
    if not file.chips:
        cure = "convert it with rknn-toolkit2, or ask where it is from, for which chip it is"
        return Finding(name, "unknown", f"{what}: the file does not tell its chip", cure)
    chips, toolkit = " and ".join(map(str.upper, file.chips)), file.toolkit or "of unknown version"
    what = f"{what}, for {chips}, by rknn-toolkit2 {toolkit}"
    if patient.soc.lower() not in file.chips:
        cure = f"convert it again with target_platform={patient.soc.lower()!r}, or copy the one for this chip"
        return Finding(name, "problem", f"{what}; this is {patient.soc}", cure)
    version = ""
    with contextlib.suppress(EngineError, IndexError):
        version = _rknn_version(patient.path(_libraries(patient, "librknnrt.so")[0]))
    if numbers(version) and numbers(file.toolkit)[:2] > numbers(version)[:2]:
        cure = f"take librknnrt.so {file.toolkit}, from {_RKNN_SOURCE}, or convert with rknn-toolkit2 {version}"
        return Finding(name, "advice", f"{what}, newer than librknnrt {version}", cure)
    return Finding(name, "ok", what)


def _rknn_version(path: Path) -> str:
    """As the file tells; "" where it does not.  Raises EngineError: not an RKNN library for this machine."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if len(data) < 64:
                raise EngineError(f"{path}: not a shared library ({len(data)} bytes)")
            if "rknn_init" not in exported_symbols(data, path):
                raise EngineError(f"{path}: is no RKNN runtime: it does not export rknn_init")
            match = re.search(rb"librknnrt version: ([0-9]{1,4}(?:\.[0-9]{1,4}){1,3})", data)
            return match.group(1).decode() if match else ""
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise EngineError(f"{path}: cannot be read ({error})") from None


def _libraries(patient: Patient, file: str) -> list[str]:
    """Where the library lies; one that several names lead to counts once."""
    found: dict[str, str] = {}
    for folder in LIBRARY_FOLDERS:
        path = patient.path(f"{folder}/{file}")
        if os.path.isfile(path):
            found.setdefault(os.path.realpath(path), f"{folder}/{file}")
    return list(found.values())


def _folders() -> str:
    return ", ".join(LIBRARY_FOLDERS)


def _others(patient: Patient, found: list[str], version_of: Callable[[Path], str]) -> str:
    """All but the first, with their versions."""
    told = []
    for file in found[1:]:
        try:
            told.append(f"{version_of(patient.path(file)) or 'of unknown version'} ({file})")
        except EngineError:
            told.append(f"one that is no such library ({file})")
    return ", ".join(told)


def _lite2(patient: Patient) -> Finding:
    name = "rknn-toolkit-lite2"
    version = patient.process.packages.get(name)
    cure = f"pip install --upgrade {name}"
    if version is None:
        return Finding(name, "problem", "not installed: pictures cannot be encoded on the NPU", cure)
    if version != "?" and numbers(version) < _LITE2_FROM:
        return Finding(name, "problem", f"{version}; 2.3 is needed", cure)
    return Finding(name, "ok", version if version != "?" else "installed, version unknown")
