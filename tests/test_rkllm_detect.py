"""Finding the ABI family of a library file: text, symbols, default parameters; and refusing where they disagree."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from mmchat import rkllm_detect
from mmchat.errors import EngineError
from mmchat.rkllm_abi import FAMILIES, FAMILY_OF_VERSION
from mmchat.rkllm_detect import Probe, detect, exported_symbols, probe_in_child
from tests.rkllm_standin.build import compiler, library


def saying(folder: Path, family: str, version: bytes) -> Path:
    """A copy of the family's library whose texts name another version of the same length, or none."""
    data = library(family).read_bytes()
    own = FAMILIES[family].versions[-1].encode()
    assert len(version) == len(own)
    changed = data.replace(b"(version: " + own, b"(version: " + version)
    changed = changed.replace(b"runtime version: " + own, b"runtime version: " + version)
    assert changed != data
    copy = folder / "librkllmrt.so"
    copy.write_bytes(changed)
    return copy


@pytest.mark.parametrize("version", FAMILY_OF_VERSION)
def test_every_release_is_found(version: str) -> None:
    family = FAMILY_OF_VERSION[version]
    found = detect(library(family, version))
    assert (found.family, found.version) == (family, version)
    assert found.evidence[0] == f"version text: {version}"
    assert family in found.evidence[1]
    assert family in found.evidence[2]
    assert len(found.evidence) == 4


def test_the_library_is_not_loaded_here() -> None:
    path = library("1.3.0", "1.3.0")
    copy = path.with_name("librkllmrt-unloaded.so")
    shutil.copyfile(path, copy)
    detect(copy)
    assert copy.name not in Path("/proc/self/maps").read_text()


def test_a_path_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dynamic linker searches its own folders for a name without a slash."""
    path = library("1.2.0")
    monkeypatch.chdir(path.parent)
    assert detect(path.name).evidence[2] == "default parameters: fit 1.2.0 or 1.2.1b1 or 1.2.1-1.2.3"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_version_text(family: str, tmp_path: Path) -> None:
    path = saying(tmp_path, family, re.sub(rb"\d", b"x", FAMILIES[family].versions[-1].encode()))
    found = detect(path)
    # 1.2.0 and 1.2.1b1 differ in the size of RKLLMInput alone: the larger one is safe with both.
    assert found.family == ("1.2.1b1" if family == "1.2.0" else family)
    assert found.version is None
    assert found.evidence[0] == "version text: none found"


def test_without_text_and_probe_two_families_cannot_be_told_apart(tmp_path: Path) -> None:
    path = saying(tmp_path, "1.3.0", b"x.x.x")
    with pytest.raises(EngineError, match=r"RKLLM 1\.2\.1-1\.2\.3 or 1\.3\.0, which cannot be told apart"):
        detect(path, probed=Probe((), "no answer"))
    assert detect(path, probed=Probe((), "no answer"), family="1.3.0").family == "1.3.0"


@pytest.mark.parametrize(("family", "says"), [("1.3.0", b"1.2.3"), ("1.2.1-1.2.3", b"1.3.0"), ("1.1", b"1.2.0")])
def test_disagreement_is_refused(family: str, says: bytes, tmp_path: Path) -> None:
    path = saying(tmp_path, family, says)
    with pytest.raises(EngineError, match="findings disagree") as caught:
        detect(path)
    text = str(caught.value)
    assert "\n" not in text
    assert f"version text: {says.decode()}" in text
    assert "name the family to use it all the same" in text
    assert detect(path, family=family).family == family


def test_two_version_texts_that_disagree(tmp_path: Path) -> None:
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(library("1.3.0").read_bytes() + b"RKLLM SDK (version: 1.2.3 (old text)")
    with pytest.raises(EngineError, match=r"version text: 1\.3\.0, 1\.2\.3"):
        detect(path)


@pytest.mark.parametrize("version", [b"1.3.1", b"1.4.0", b"2.0.0"])
def test_an_unknown_version_is_refused(version: bytes, tmp_path: Path) -> None:
    path = saying(tmp_path, "1.3.0", version)
    with pytest.raises(EngineError) as caught:
        detect(path)
    assert str(caught.value) == (
        f"{path}: says it is RKLLM {version.decode()}, which is not known here (1.1.0 to 1.3.0 are); its symbols and "
        "default parameters fit 1.3.0; name the family to use it all the same "
        "(1.1, 1.2.0, 1.2.1b1, 1.2.1-1.2.3, 1.3.0)"
    )
    found = detect(path, family="1.3.0")
    assert (found.family, found.version) == ("1.3.0", version.decode())
    assert any(line.startswith("warning") for line in found.evidence)


def test_an_unknown_beta_is_not_taken_for_its_release(tmp_path: Path) -> None:
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(library("1.2.1b1").read_bytes().replace(b"1.2.1b1", b"1.2.2b1"))
    with pytest.raises(EngineError, match=r"says it is RKLLM 1\.2\.2b1, which is not known"):
        detect(path)


@pytest.mark.parametrize(
    ("library_of", "named"),
    [("1.2.0", "1.1"), ("1.2.1-1.2.3", "1.3.0"), ("1.3.0", "1.2.3"), ("1.3.0", "1.2.0"), ("1.2.1-1.2.3", "1.2.1b1")],
)
def test_a_family_that_all_findings_speak_against_is_refused(library_of: str, named: str) -> None:
    with pytest.raises(EngineError) as caught:
        detect(library(library_of), family=named)
    text = str(caught.value)
    assert f"all that was found agrees on {library_of} (version text: " in text
    assert text.endswith("name that one, or none")


def test_a_family_that_the_symbols_forbid_is_refused() -> None:
    with pytest.raises(EngineError, match=r"cannot be RKLLM 1\.3\.0, for it lacks rkllm_get_kv_cache_size"):
        detect(library("1.2.0"), family="1.3.0")


def test_two_families_that_are_alike_may_be_named_for_each_other() -> None:
    assert not any(line.startswith("warning") for line in detect(library("1.2.0"), family="1.2.0").evidence)
    found = detect(library("1.2.0"), family="1.2.1b1")
    assert found.family == "1.2.1b1"
    assert any(line.startswith("warning: RKLLM 1.2.1b1 was named") for line in found.evidence)


def test_a_version_names_its_family() -> None:
    assert detect(library("1.2.1-1.2.3"), family="1.2.2").family == "1.2.1-1.2.3"
    with pytest.raises(EngineError, match=r"family '1\.9' is not known; known are 1\.1, 1\.2\.0"):
        detect(library("1.1"), family="1.9")


@pytest.mark.parametrize(
    ("how", "finding"),
    [("crash", "killed by SIGSEGV"), ("zero", "not where any known family has them"), ("hang", "no answer within 1 s")],
)
def test_a_probe_that_fails_is_a_finding(how: str, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_PROBE", how)
    path = library("1.3.0")
    probed = probe_in_child(path, timeout_s=1 if how == "hang" else 30)
    assert probed.families == ()
    assert finding in probed.text
    found = detect(path, probed=probed)
    assert found.family == "1.3.0"
    assert finding in found.evidence[2]


def test_a_library_that_hangs_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it may have been the machine."""
    monkeypatch.setenv("RKLLM_STANDIN_PROBE", "hang")
    monkeypatch.setattr(rkllm_detect, "_PROBE_TIMEOUT_S", 1.0)
    path = library("1.3.0")
    with pytest.raises(EngineError, match=r"hangs: asked twice for its default parameters, no answer within 1 s"):
        detect(path)
    answers = iter([probe_in_child(path), Probe(("1.3.0",), "fit 1.3.0")])
    monkeypatch.setattr(rkllm_detect, "probe_in_child", lambda path: next(answers))
    assert detect(path).family == "1.3.0"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_probe_tells(family: str) -> None:
    fits = {"1.1": ["1.1"], "1.3.0": ["1.3.0"]}
    assert list(probe_in_child(library(family)).families) == fits.get(family, ["1.2.0", "1.2.1b1", "1.2.1-1.2.3"])


def test_a_library_that_the_linker_refuses(tmp_path: Path) -> None:
    if compiler() is None:
        library("1.1")  # skips
    (tmp_path / "a.c").write_text("void a(void) {}")
    (tmp_path / "b.c").write_text("void a(void); void b(void) { a(); }")
    for command in (["a.c", "-o", "liba.so"], ["b.c", "-o", "libb.so", "-L.", "-la"]):
        subprocess.run([compiler() or "cc", "-shared", "-fPIC", *command], check=True, cwd=tmp_path)
    (tmp_path / "liba.so").unlink()
    with pytest.raises(EngineError, match=r"libb\.so: cannot be loaded \(liba\.so: cannot open shared object file"):
        probe_in_child(tmp_path / "libb.so")


# ------------------------------------------------------------------------------------------------- files that are none


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read \\(No such file or directory\\)"):
        detect(tmp_path / "librkllmrt.so")
    with pytest.raises(EngineError, match="cannot be read \\(Is a directory\\)"):
        detect(tmp_path)
    small, text, pointer = (tmp_path / name for name in ("small", "text", "pointer"))
    small.write_bytes(b"")
    text.write_text("not a library\n" * 100)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n" + "oid sha256:0\n" * 10)
    for path, problem in ((small, "0 bytes"), (text, "not a shared library$"), (pointer, "Git LFS pointer")):
        with pytest.raises(EngineError, match=problem):
            detect(path)


def test_another_library_and_an_older_runtime(tmp_path: Path) -> None:
    if compiler() is None:
        library("1.1")  # skips
    source, made = tmp_path / "old.c", tmp_path / "old.so"
    for functions, problem in ((["other"], "is no RKLLM runtime"), (["rkllm_init"], "older than 1.1.0")):
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
        subprocess.run([compiler() or "cc", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
        with pytest.raises(EngineError, match=f"{problem}: it does not export rkllm_abort, rkllm_createDefault"):
            detect(made)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = library("1.2.1-1.2.3").read_bytes()
    path = tmp_path / "librkllmrt.so"
    for n_bytes in [*range(0, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:n_bytes])
        with pytest.raises(EngineError, match=r"not a shared library|truncated or damaged") as caught:
            detect(path, probed=Probe((), "not asked"))
        assert "\n" not in str(caught.value)


def test_damaged_headers_raise_nothing_else(tmp_path: Path) -> None:
    data = library("1.1").read_bytes()
    for at in range(16, 64):
        for byte in (0x00, 0x7F, 0xFF):
            damaged = data[:at] + bytes([byte]) + data[at + 1 :]
            with contextlib.suppress(EngineError):
                exported_symbols(damaged, tmp_path)


@pytest.mark.parametrize(("at", "value", "name"), [(4, b"\x01", " in 32 bits"), (18, struct.pack("<H", 40), "arm")])
def test_a_library_for_another_machine(at: int, value: bytes, name: str, tmp_path: Path) -> None:
    data = library("1.3.0").read_bytes()
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(EngineError, match=f"made for .*{name}.*runs on {platform.machine()}"):
        detect(path)


def test_an_unreadable_file(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(b"x" * 100)
    path.chmod(0)
    with pytest.raises(EngineError, match="cannot be read \\(Permission denied\\)"):
        detect(path)
