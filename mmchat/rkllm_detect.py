"""Which ABI family a librkllmrt.so has, found without initialising it.

No function tells the version, and a wrong guess corrupts memory, so three witnesses are heard: the version text in
the file, the exported symbols, and where the default parameters lie in what rkllm_createDefaultParam returns.  They
must agree.  Sources: rkllm.h of the release tags 1.1.0 to 1.3.0 and the manual's defaults; that the real libraries
carry such a text, and have those defaults, is not verified: a witness that has nothing to say is left out.

The file is read here, never loaded: the default parameters are asked for in a child process (`probe`).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mmchat.errors import EngineError
from mmchat.rkllm_abi import FAMILIES, FAMILY_OF_VERSION

LIBRARY = "librkllmrt.so"
LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib/aarch64-linux-gnu", "/usr/local/lib")  # behind the model's own
_VERSION_TEXTS = (
    re.compile(rb"RKLLM SDK \(version:\s*v?(\d+\.\d+\.\d+\w*)"),
    re.compile(rb"rkllm-runtime version:\s*v?(\d+\.\d+\.\d+\w*)"),
)
_PROBE_TIMEOUT_S = 30.0
_PROBE_BYTES = 1024  # more than any family's RKLLMParam
_PROGRAM = (
    "import sys; path = sys.argv[1]; sys.path[:] = sys.argv[2:]; "
    "from mmchat.rkllm_detect import print_probe; print_probe(path)"
)
_MARK = "rkllm-probe:"  # the library may print lines of its own
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}
_NAMES_OF_MACHINES = {3: "i386", 40: "arm", **{number: name for name, number in _ELF_MACHINES.items()}}


@dataclass(frozen=True)
class Probe:
    """What the default parameters tell.  families: those whose layout fits; empty where nothing can be concluded.

    is_silent: the library did not return from being asked.
    """

    families: tuple[str, ...]
    text: str
    is_silent: bool = False


@dataclass(frozen=True)
class Detection:
    """family: key of FAMILIES.  version: the file's own text, or None.  evidence: one line per finding."""

    family: str
    version: str | None
    evidence: tuple[str, ...]


def detect(path: str | Path, *, family: str | None = None, probed: Probe | None = None) -> Detection:
    """Find the family of the library at path.

    family: the user's word (a family or a version), which decides where the findings disagree, or know less; not
    against missing symbols, nor against all of them.
    probed: the result of `probe`; None runs it in a child process, and once more where that is silent.

    Raises EngineError: no such file, not a library for this machine, not RKLLM's, it cannot be loaded, it is silent
    twice (whoever loaded it would wait for ever), the findings disagree (with each other, or all with the user), or
    its version is unknown or cannot be told.
    """
    path = Path(path)
    named = _named(family)
    symbols, versions = _read(path)
    by_symbols = _families_of_symbols(path, symbols)
    if named and (missing := FAMILIES[named].symbols - symbols):
        raise EngineError(
            f"{path}: cannot be RKLLM {named}, for it lacks {', '.join(sorted(missing))}; "
            f"its symbols fit {_either(by_symbols)}"
        )
    if probed is None and (probed := probe_in_child(path)).is_silent and (probed := probe_in_child(path)).is_silent:
        raise EngineError(f"{path}: hangs: asked twice for its default parameters, {probed.text}; try another version")
    version = versions[0] if len(versions) == 1 else None
    known = [FAMILY_OF_VERSION[text] for text in versions if text in FAMILY_OF_VERSION]
    evidence = [
        f"version text: {', '.join(versions) or 'none found'}",
        f"exported symbols: fit {_either(by_symbols)}",
        f"default parameters: {probed.text}",
    ]
    witnesses = [set(by_symbols), *({name} for name in known), *([set(probed.families)] if probed.families else [])]
    agreed = set.intersection(*witnesses)
    if named:
        if agreed and not agreed & _alike(named) and len(known) == len(versions):
            raise EngineError(
                f"{path}: RKLLM {named} was named (MMCHAT_RKLLM_FAMILY), but all that was found agrees on "
                f"{_either(agreed)} ({'; '.join(evidence)}); name that one, or none"
            )
        if not agreed or named not in agreed or len(known) < len(versions):
            evidence.append(f"warning: RKLLM {named} was named, and these findings do not all fit it")
        return Detection(named, version, (*evidence, f"family {named}: named by the user"))
    advice = "name the family to use it all the same"
    findings = "; ".join(evidence)
    if len(known) < len(versions):
        strange = next(text for text in versions if text not in FAMILY_OF_VERSION)
        first, last = next(iter(FAMILY_OF_VERSION)), list(FAMILY_OF_VERSION)[-1]
        raise EngineError(
            f"{path}: says it is RKLLM {strange}, which is not known here ({first} to {last} are); its symbols and "
            f"default parameters fit {_either(agreed) if agreed else 'no family'}; {advice} ({', '.join(FAMILIES)})"
        )
    if not agreed:
        raise EngineError(f"{path}: the findings disagree ({findings}); {advice} ({', '.join(FAMILIES)})")
    if agreed == _alike("1.2.0"):
        agreed = {"1.2.1b1"}  # whose larger RKLLMInput can be read as either
    if len(agreed) > 1:
        raise EngineError(f"{path}: RKLLM {_either(agreed)}, which cannot be told apart ({findings}); {advice}")
    (found,) = agreed
    return Detection(found, version, (*evidence, f"family {found}: all that was found agrees"))


def version_of(path: str | Path) -> str:
    """The version that the file says it is; "" where it tells none, or several.

    Raises EngineError: no such file, or not an RKLLM library for this machine.
    """
    symbols, versions = _read(Path(path))
    _families_of_symbols(Path(path), symbols)
    return versions[0] if len(versions) == 1 else ""


def _named(family: str | None) -> str | None:
    if family is None or family in FAMILIES:
        return family
    if family in FAMILY_OF_VERSION:
        return FAMILY_OF_VERSION[family]
    raise EngineError(f"RKLLM family {family!r} is not known; known are {', '.join(FAMILIES)}")


def _alike(family: str) -> set[str]:
    """The families that are the same for embedding input, but for the size of RKLLMInput."""
    alike = {"1.2.0", "1.2.1b1"}
    return alike if family in alike else {family}


def _either(families: Iterable[str]) -> str:
    return " or ".join(name for name in FAMILIES if name in set(families))


def _families_of_symbols(path: Path, symbols: frozenset[str]) -> list[str]:
    """The newest families that the library has every function of."""
    fitting = [name for name, family in FAMILIES.items() if family.symbols <= symbols]
    if not fitting:
        missing = sorted(FAMILIES["1.1"].symbols - symbols)
        what = "is no RKLLM runtime" if "rkllm_init" in missing else "is an RKLLM runtime older than 1.1.0"
        raise EngineError(f"{path}: {what}: it does not export {', '.join(missing)}")
    most = max(len(FAMILIES[name].symbols) for name in fitting)
    return [name for name in fitting if len(FAMILIES[name].symbols) == most]


def _read(path: Path) -> tuple[frozenset[str], list[str]]:
    """The symbols that the file exports, and the versions that it says it is."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 64:
                raise EngineError(f"{path}: not a shared library ({os.fstat(file.fileno()).st_size} bytes)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                symbols = exported_symbols(data, path)
                found = [match.group(1).decode() for text in _VERSION_TEXTS for match in text.finditer(data)]
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror or error})") from None
    return symbols, list(dict.fromkeys(found))


def exported_symbols(data: mmap.mmap | bytes, path: Path) -> frozenset[str]:
    """Names that a 64-bit ELF library defines for others.

    Raises EngineError: not such a library, made for another machine, or truncated.
    """
    size = len(data)
    if data[:4] != b"\x7fELF":
        hint = ": a Git LFS pointer, not the file itself" if data[:8] == b"version " else ""
        raise EngineError(f"{path}: not a shared library{hint}")
    kind, machine = struct.unpack_from("<HH", data, 16)
    here = _ELF_MACHINES.get(platform.machine())
    if data[4] != 2 or data[5] != 1 or machine != here:
        name = _NAMES_OF_MACHINES.get(machine, f"ELF machine {machine}") + (" in 32 bits" if data[4] == 1 else "")
        raise EngineError(
            f"{path}: made for {name}, but this Python runs on {platform.machine()}; take the library for "
            f"{platform.machine()} (for a Rockchip board: runtime/Linux/librkllm_api/aarch64)"
        )
    if kind != 3:
        raise EngineError(f"{path}: not a shared library (ELF type {kind})")
    try:
        return _dynamic_symbols(data, size)
    except (struct.error, IndexError, ValueError, OverflowError):
        raise EngineError(f"{path}: truncated or damaged ({size} bytes); copy it again") from None


def _dynamic_symbols(data: mmap.mmap | bytes, size: int) -> frozenset[str]:
    """Raises ValueError or struct.error where a table lies outside the file."""
    program_at, section_at = struct.unpack_from("<QQ", data, 32)
    program_size, n_programs, section_size, n_sections = struct.unpack_from("<HHHH", data, 54)
    for i in range(n_programs):
        segment, _, offset, _, _, n_bytes = struct.unpack_from("<IIQQQQ", data, program_at + i * program_size)
        if segment == 1 and offset + n_bytes > size:
            raise ValueError("a segment ends behind the file")
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_at + i * section_size) for i in range(n_sections)]
    if not any(section[1] == 11 for section in sections):  # SHT_DYNSYM
        raise ValueError("no symbol table")
    names = set()
    for _, kind, _, _, offset, n_bytes, link, _, _, entry in sections:
        if kind != 11:
            continue
        text = sections[link][4]
        if offset + n_bytes > size or entry < 24 or text + sections[link][5] > size:
            raise ValueError("the symbol table ends behind the file")
        for at in range(offset, offset + n_bytes, entry):
            name, _, _, home, _, _ = struct.unpack_from("<IBBHQQ", data, at)
            if home and name:  # defined here
                names.add(bytes(data[text + name : data.find(b"\0", text + name)]).decode("ascii", "replace"))
    return frozenset(names)


def probe_in_child(path: Path, *, timeout_s: float | None = None) -> Probe:
    """Run `probe` in a child process; that it crashes or hangs is a finding, not an error.

    Raises EngineError where the dynamic linker refuses the library.
    """
    timeout_s = _PROBE_TIMEOUT_S if timeout_s is None else timeout_s
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROGRAM, os.path.abspath(path), *sys.path],  # a bare name would be searched for
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Probe((), f"no answer within {timeout_s:g} s", is_silent=True)
    answer = next((line for line in child.stdout.decode(errors="replace").splitlines() if line.startswith(_MARK)), None)
    if answer is None:
        code = child.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Probe((), f"asking for them failed ({how})")
    values = json.loads(answer[len(_MARK) :])
    if "error" in values:
        raise EngineError(f"{path}: cannot be loaded ({values['error']})")
    return Probe(tuple(values["families"]), values["text"])


def print_probe(path: str) -> None:
    """The child's side of `probe_in_child`."""
    try:
        answer = json.dumps(asdict(probe(path)))
    except OSError as error:
        answer = json.dumps({"error": " ".join(str(error).split())})
    print(f"\n{_MARK}{answer}", flush=True)
    os._exit(0)  # not through the library's destructors


def probe(path: str | Path) -> Probe:
    """Load the library and look where its default parameters lie.  Only for a process that may crash.

    The manual's defaults are top_p 0.9 and enabled_cpus_num 4.  1.2.0 put n_keep before top_p, and 1.3.0 moved
    extend_param to the front; other differences between families do not show here.

    Raises OSError where the dynamic linker refuses it.
    """

    class Room(ctypes.Structure):
        _fields_ = [("bytes", ctypes.c_uint8 * _PROBE_BYTES)]

    # Only what every layout writes is looked at: ctypes does not clear the room behind it.
    raw = bytes(ctypes.CFUNCTYPE(Room)(("rkllm_createDefaultParam", ctypes.CDLL(str(path))))())
    params = {name: family.RKLLMParam.from_buffer_copy(raw) for name, family in FAMILIES.items()}
    with_top_p = [name for name, param in params.items() if abs(param.top_p - 0.9) < 1e-6]
    full = [name for name in with_top_p if getattr(params[name].extend_param, "enabled_cpus_num", 4) == 4]
    fitting = full or with_top_p
    if not fitting:
        return Probe((), "not where any known family has them")
    text = f"fit {_either(fitting)}"
    return Probe(tuple(fitting), text if full else f"{text} (by top_p alone)")
