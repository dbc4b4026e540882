"""doctor: every finding, on boards and PCs made of files; garbage in any of them; the command on this machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.doctor import examine
from mmchat.half_made import BOARD_STATE, CONVERT_STATE, PULL_RECORD
from mmchat.patient import Finding, Process
from mmchat.rkllm_abi import FAMILIES, FAMILY_OF_VERSION
from tests.rkllm_standin.__main__ import VISION_MODES, write_board_folder
from tests.rkllm_standin.build import library

DEMO = Path(__file__).resolve().parents[1] / "mmchat" / "demo"
GIB = 1 << 30
ENVIRON = {"XDG_CACHE_HOME": "/home/user/.cache"}
RKLLM, RKNN = "/usr/lib/librkllmrt.so", "/usr/lib/librknnrt.so"
NPU = {"RK3588": "fdab0000.npu", "RK3576": "27700000.npu"}


def elf(symbols: Iterable[str], text: str, machine: int | None = None) -> bytes:
    """A 64-bit library, as far as a reader of symbols and texts can tell."""
    names = sorted(symbols)
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    entries, at = [bytes(24)], 1
    for name in names:
        entries.append(struct.pack("<IBBHQQ", at, 18, 0, 1, 4096, 16))
        at += len(name) + 1
    table, body = b"".join(entries), text.encode() + b"\0"
    table_at = 64 + len(body)
    strings_at = table_at + len(table)
    sections_at = strings_at + len(strings)
    sections = [
        bytes(64),
        struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, table_at, len(table), 2, 1, 8, 24),
        struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, strings_at, len(strings), 0, 0, 1, 0),
    ]
    machine = machine or {"x86_64": 62, "aarch64": 183}[platform.machine()]
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, sections_at, 0, 64, 56, 0, 64, 3, 0)
    return head + body + table + strings + b"".join(sections)


def rkllm(version: str, machine: int | None = None) -> bytes:
    return elf(FAMILIES[FAMILY_OF_VERSION[version]].symbols, f"RKLLM SDK (version: {version} (x@2025))", machine)


def rknn(version: str) -> bytes:
    return elf(("rknn_init", "rknn_run"), f"librknnrt version: {version} (c949ad889d@2024-11-07T11:35:33)")


class Machine:
    """A root folder and a process, all well until a test changes something."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = dict(ENVIRON)
        self.process = Process(
            machine="x86_64",
            python="3.11.7",
            glibc="2.36",
            packages={"openvino": "2026.4.1"},
            may_use=lambda path: True,
            free_bytes=lambda path: 50 * GIB,
        )
        self.write("/proc/meminfo", f"MemTotal:       {16 * GIB >> 10} kB\nMemAvailable:   {12 * GIB >> 10} kB\n")
        self.write(
            "/proc/self/limits", "Limit   Soft Limit  Hard Limit  Units\nMax open files     4096    524288   files\n"
        )
        self.write("/home/user/.profile", "")

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def write(self, name: str, content: str | bytes) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        path = self.path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def process_has(self, **changes: Any) -> None:
        self.process = replace(self.process, **changes)

    def examine(self, model: str | Path | None = None) -> dict[str, Finding]:
        findings = examine(self.root, model, self.environ, process=self.process)
        for one in findings:
            assert one.status in ("ok", "advice", "problem", "unknown")
            assert bool(one.cure) == (one.status != "ok"), one
            for line in (one.name, one.what):
                assert line, one
                assert line.isprintable(), one
            assert one.cure.isprintable(), one
        assert len({one.name for one in findings}) == len(findings)
        return {one.name: one for one in findings}

    def bad(self, model: str | Path | None = None) -> dict[str, str]:
        """Names and statuses of what is not ok."""
        return {name: one.status for name, one in self.examine(model).items() if one.status != "ok"}


def make_board(root: Path, soc: str) -> Machine:
    """A board with the vendor's kernel, as sysfs looks there."""
    board = Machine(root)
    board.process_has(machine="aarch64", packages={"openvino": "2026.4.1", "rknn-toolkit-lite2": "2.3.2"})
    name = {"RK3588": "Xunlong Orange Pi 5 Max", "RK3576": "Radxa ROCK 4D"}[soc]
    board.write("/proc/device-tree/compatible", f"maker,board\0rockchip,{soc.lower()}\0")
    board.write("/proc/device-tree/model", f"{name}\0")
    board.write("/sys/kernel/debug/rknpu/version", "RKNPU driver: v0.9.8\n")
    board.write("/sys/bus/platform/drivers/RKNPU/bind", "")
    npu = f"/sys/class/devfreq/{NPU[soc]}"
    board.write(f"{npu}/governor", "performance\n")
    board.write(f"{npu}/cur_freq", "1000000000\n")
    board.write(f"{npu}/max_freq", "1000000000\n")
    board.write(f"{npu}/available_frequencies", "300000000 700000000 1000000000\n")
    for number in (0, 4):
        policy = f"/sys/devices/system/cpu/cpufreq/policy{number}"
        board.write(f"{policy}/scaling_governor", "performance\n")
        for file in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq"):
            board.write(f"{policy}/{file}", "1800000\n")
    for node, driver in (
        ("card0", "rockchip-drm"),
        ("card1", "RKNPU"),
        ("renderD128", "panfrost"),
        ("renderD129", "RKNPU"),
    ):
        board.write(f"/sys/class/drm/{node}/device/uevent", f"DRIVER={driver}\nOF_NAME=x\n")
        board.write(f"/dev/dri/{node}", "")
    board.write(RKLLM, rkllm("1.2.3"))
    board.write(RKNN, rknn("2.3.2"))
    return board


@pytest.fixture(params=NPU)
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return make_board(tmp_path / "root", request.param)


@pytest.fixture
def rk3588(tmp_path: Path) -> Machine:
    return make_board(tmp_path / "root", "RK3588")


@pytest.fixture
def pc(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def test_a_good_board(board: Machine) -> None:
    found = board.examine("demo")
    assert board.bad("demo") == {}
    assert list(found) == [
        "machine", "python", "glibc", "openvino", "npu driver", "npu device", "npu speed", "cpu speed", "librkllmrt",
        "librknnrt", "rknn-toolkit-lite2", "memory", "store", "disk", "open files", "model",
    ]  # fmt: skip
    what = {name: one.what for name, one in found.items()}
    soc = "RK3588" if "Orange" in what["machine"] else "RK3576"
    assert what["machine"] in ("aarch64, Xunlong Orange Pi 5 Max, RK3588", "aarch64, Radxa ROCK 4D, RK3576")
    assert what["npu driver"] == "rknpu 0.9.8 (/sys/kernel/debug/rknpu/version)"
    assert what["npu device"] == "/dev/dri/card1, /dev/dri/renderD129"
    assert what["npu speed"] == f"{NPU[soc]}: performance, 1000 of 1000 MHz"
    assert what["cpu speed"] == "policy0: performance, 1800 of 1800 MHz; policy4: performance, 1800 of 1800 MHz"
    assert what["librkllmrt"] == f"RKLLM 1.2.3 ({RKLLM})"
    assert what["librknnrt"] == f"RKNN 2.3.2 ({RKNN})"
    assert what["rknn-toolkit-lite2"] == "2.3.2"
    assert what["open files"] == "4096"
    assert what["store"] == "/home/user/.cache/mmchat/embeddings"
    assert what["model"].startswith(f"{DEMO}: a checkpoint, complete, 7 MB in 1 file(s); 4 layers of 192")


def test_a_good_pc(pc: Machine) -> None:
    found = pc.examine()
    assert pc.bad() == {}
    assert list(found) == [
        "machine", "python", "glibc", "openvino", "npu", "memory", "store", "disk", "open files"
    ]  # fmt: skip
    assert found["npu"].what == "no Rockchip NPU here: the OpenVINO engine is used"
    assert found["machine"].what == "x86_64"


def test_another_machine(pc: Machine) -> None:
    pc.process_has(machine="armv7l")
    assert pc.bad()["machine"] == "problem"


def test_another_rockchip_board(board: Machine) -> None:
    board.write("/proc/device-tree/compatible", "pine64,quartz64\0rockchip,rk3566\0")
    found = board.examine()
    assert found["machine"].status == "advice"
    assert "RK3566: its NPU cannot run MiniCPM-V-2.6" in found["machine"].what
    assert found["npu"].status == "ok"
    assert "librkllmrt" not in found


def test_the_other_place_of_the_device_tree(rk3588: Machine) -> None:
    rk3588.remove("/proc/device-tree")
    rk3588.write("/sys/firmware/devicetree/base/compatible", "radxa,rock-5a\0rockchip,rk3588s\0")
    assert rk3588.examine()["machine"].what == "aarch64, RK3588"


@pytest.mark.parametrize(
    ("version", "status"),
    [("3.9.18", "problem"), ("3.10.0", "ok"), ("3.12.9", "ok"), ("3.13.0", "problem"), ("3.13.0rc1", "problem")],
)
def test_python(pc: Machine, version: str, status: str) -> None:
    pc.process_has(python=version)
    assert pc.examine()["python"].status == status


@pytest.mark.parametrize(
    ("machine", "glibc", "openvino", "status"),
    [
        ("aarch64", "2.35", False, "ok"),
        ("aarch64", "2.31", False, "advice"),
        ("aarch64", "2.31", True, "ok"),  # an older openvino, which is the next finding's affair
        ("x86_64", "2.28", False, "ok"),
        ("x86_64", "2.17", False, "problem"),
        ("x86_64", "", False, "unknown"),
    ],
)
def test_glibc(rk3588: Machine, machine: str, glibc: str, openvino: bool, status: str) -> None:
    """A problem only where the CPU engine is the only one."""
    packages = {"openvino": "2025.2.0"} if openvino else {}
    rk3588.process_has(machine=machine, glibc=glibc, packages=packages)
    if machine == "x86_64":
        rk3588.remove("/proc/device-tree")
    one = rk3588.examine()["glibc"]
    assert one.status == status
    assert glibc in one.what


@pytest.mark.parametrize(("version", "status"), [(None, "problem"), ("2024.6.0", "problem"), ("?", "ok")])
def test_openvino(tmp_path: Path, version: str | None, status: str) -> None:
    """A board can do without."""
    packages = {} if version is None else {"openvino": version}
    board, pc = make_board(tmp_path / "board", "RK3576"), Machine(tmp_path / "pc")
    for machine in (board, pc):
        machine.process_has(packages={"rknn-toolkit-lite2": "2.3.2", **packages})
    assert pc.examine()["openvino"].status == status
    assert board.examine()["openvino"].status == ("ok" if status == "ok" else "advice")


@pytest.mark.parametrize(
    ("version", "status"), [("0.8.2", "problem"), ("0.9.5", "problem"), ("0.9.6", "advice"), ("0.9.7", "advice"),
                            ("0.9.8", "ok"), ("0.10.0", "ok"), ("1.0.0", "ok")]
)  # fmt: skip
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/sys/kernel/debug/rknpu/version", "RKNPU driver: v{}\n"),
        ("/proc/rknpu/version", "RKNPU driver: v{}\n"),
        ("/sys/module/rknpu/version", "{}\n"),
    ],
)
def test_the_drivers_version(board: Machine, path: str, text: str, version: str, status: str) -> None:
    board.remove("/sys/kernel/debug")
    board.write(path, text.format(version))
    one = board.examine()["npu driver"]
    assert one.status == status
    assert one.what.startswith(f"rknpu {version} ({path})")


def test_a_driver_that_is_not_readable(board: Machine) -> None:
    """/sys/kernel/debug is root's alone."""
    board.remove("/sys/kernel/debug")
    one = board.examine()["npu driver"]
    assert one.status == "unknown"
    assert "sudo cat /sys/kernel/debug/rknpu/version" in one.cure


@pytest.mark.parametrize("rocket", [False, True])
def test_a_kernel_without_the_driver(board: Machine, rocket: bool) -> None:
    board.remove("/sys/kernel/debug")
    board.remove("/sys/bus/platform/drivers/RKNPU")
    board.write(f"/sys/bus/platform/drivers/{'rocket' if rocket else 'other'}/bind", "")
    one = board.examine()["npu driver"]
    assert one.status == "problem"
    assert ("rocket" in one.what) == rocket


def test_no_device_node(board: Machine) -> None:
    board.remove("/dev/dri")
    assert board.bad() == {"npu device": "problem"}


def test_one_device_node_of_an_older_driver(board: Machine) -> None:
    board.remove("/dev/dri")
    board.write("/dev/rknpu", "")
    assert board.examine()["npu device"].what == "/dev/rknpu"


def test_nodes_below_the_driver_and_nodes_that_nobody_explains(board: Machine) -> None:
    """A driver built outside the kernel hangs its nodes on a device of its own, whose uevent is empty."""
    board.remove("/sys/class/drm")
    assert board.examine()["npu device"].what == "/dev/dri/renderD128, /dev/dri/renderD129"
    board.write("/sys/bus/platform/drivers/RKNPU/fdab0000.npu/drm/renderD129/uevent", "")
    assert board.examine()["npu device"].what == "/dev/dri/renderD129"


@pytest.mark.parametrize(
    ("shut", "status"), [({"card1"}, "advice"), ({"card1", "renderD129"}, "problem"), ({"card0", "renderD128"}, "ok")]
)
def test_no_permission(board: Machine, shut: set[str], status: str) -> None:
    board.process_has(may_use=lambda path: path.name not in shut)
    one = board.examine()["npu device"]
    assert one.status == status
    if status != "ok":
        assert all(f"/dev/dri/{node}" in one.what for node in shut)
        assert one.cure == "sudo usermod -aG render,video $USER, then log in again"


def test_the_cure_names_the_nodes_own_group(board: Machine) -> None:
    gid = os.getgid() or 109
    os.chown(board.path("/dev/dri/renderD129"), -1, gid)
    board.write("/etc/group", f"root:x:0:\nbroken\nnpu-users:x:{gid}:someone\n")
    board.process_has(may_use=lambda path: path.name != "renderD129")
    assert board.examine()["npu device"].cure.startswith("sudo usermod -aG npu-users $USER")


def test_a_wrong_governor(board: Machine) -> None:
    npu = next(board.path("/sys/class/devfreq").iterdir()).name
    board.write(f"/sys/class/devfreq/{npu}/governor", "rknpu_ondemand\n")
    board.write(f"/sys/class/devfreq/{npu}/cur_freq", "300000000\n")
    board.write("/sys/devices/system/cpu/cpufreq/policy4/scaling_governor", "schedutil\n")
    assert board.bad() == {"npu speed": "advice", "cpu speed": "advice"}
    found = board.examine()
    assert found["npu speed"].what == f"{npu}: rknpu_ondemand, 300 of 1000 MHz"
    assert f"echo performance | sudo tee /sys/class/devfreq/{npu}/governor" in found["npu speed"].cure
    assert "policy4: schedutil, 1800 of 1800 MHz" in found["cpu speed"].what
    assert found["cpu speed"].cure.endswith("tee /sys/devices/system/cpu/cpufreq/policy4/scaling_governor")


def test_a_frequency_that_is_fixed_or_limited(board: Machine) -> None:
    npu = f"/sys/class/devfreq/{next(board.path('/sys/class/devfreq').iterdir()).name}"
    cpu = "/sys/devices/system/cpu/cpufreq/policy0"
    board.write(f"{npu}/governor", "userspace\n")
    board.write(f"{cpu}/scaling_governor", "userspace\n")
    assert board.bad() == {}
    board.write(f"{npu}/cur_freq", "700000000\n")
    assert board.bad() == {"npu speed": "advice"}
    board.write(f"{npu}/max_freq", "700000000\n")
    board.write(f"{cpu}/scaling_max_freq", "1200000\n")
    found = board.examine()
    assert found["npu speed"].what.endswith(": userspace, 700 of 1000 MHz, limited to 700")
    assert found["npu speed"].cure.endswith(f"raise {npu}/max_freq")
    assert "policy0: userspace, 1800 of 1800 MHz, limited to 1200" in found["cpu speed"].what


def test_no_frequencies(board: Machine) -> None:
    board.remove("/sys/class/devfreq")
    board.remove("/sys/devices/system/cpu")
    assert board.bad() == {"npu speed": "unknown", "cpu speed": "unknown"}


def test_missing_libraries(board: Machine) -> None:
    board.remove(RKLLM)
    board.remove(RKNN)
    board.process_has(packages={"openvino": "2026.4.1"})
    assert board.bad() == {"librkllmrt": "problem", "librknnrt": "problem", "rknn-toolkit-lite2": "problem"}
    found = board.examine()
    assert found["librkllmrt"].what == "no librkllmrt.so in /usr/lib, /usr/lib/aarch64-linux-gnu, /usr/local/lib"
    assert "MMCHAT_RKLLM_LIB" in found["librkllmrt"].cure


@pytest.mark.parametrize("folder", ["/usr/lib/aarch64-linux-gnu", "/usr/local/lib"])
def test_librkllmrt_in_other_folders(board: Machine, folder: str) -> None:
    data = board.path(RKLLM).read_bytes()
    board.remove(RKLLM)
    board.write(f"{folder}/librkllmrt.so", data)
    assert board.bad() == {}
    assert folder in board.examine()["librkllmrt"].what


@pytest.mark.parametrize("folder", ["/usr/lib/aarch64-linux-gnu", "/usr/local/lib"])
def test_librknnrt_where_lite2_does_not_look(board: Machine, folder: str) -> None:
    board.remove(RKNN)
    board.write(f"{folder}/librknnrt.so", rknn("2.3.2"))
    assert board.bad() == {"librknnrt": "problem"}
    one = board.examine()["librknnrt"]
    assert one.what == f"RKNN 2.3.2 ({folder}/librknnrt.so), but rknn-toolkit-lite2 looks for {RKNN} alone"
    assert one.cure == f"sudo ln -s {folder}/librknnrt.so {RKNN}"


def test_two_of_each_library(board: Machine) -> None:
    board.write("/usr/local/lib/librkllmrt.so", rkllm("1.1.4"))
    board.write("/usr/local/lib/librknnrt.so", rknn("1.6.0"))
    assert board.bad() == {"librkllmrt": "advice", "librknnrt": "advice"}
    one = board.examine()["librkllmrt"]
    assert one.what == f"RKLLM 1.2.3 ({RKLLM}); also 1.1.4 (/usr/local/lib/librkllmrt.so)"
    assert board.examine()["librknnrt"].what == f"RKNN 2.3.2 ({RKNN}); also 1.6.0 (/usr/local/lib/librknnrt.so)"
    board.write("/usr/lib/aarch64-linux-gnu/librkllmrt.so", b"x")
    assert "one that is no such library (/usr/lib/aarch64-linux-gnu/" in board.examine()["librkllmrt"].what
    board.environ["MMCHAT_RKLLM_LIB"] = "/usr/local/lib/librkllmrt.so"  # now there is no doubt
    assert board.examine()["librkllmrt"].what == "RKLLM 1.1.4 (/usr/local/lib/librkllmrt.so)"


def test_the_models_own_library_goes_before_the_systems(board: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "librkllmrt.so").write_bytes(rkllm("1.1.4"))
    assert board.examine(folder)["librkllmrt"].what == f"RKLLM 1.1.4 ({folder}/librkllmrt.so)"
    board.remove(RKLLM)
    assert board.examine(folder)["librkllmrt"].status == "ok"
    assert board.examine()["librkllmrt"].status == "problem"


def test_a_link_is_no_second_library(board: Machine) -> None:
    link = board.path("/usr/local/lib/librkllmrt.so")
    link.parent.mkdir(parents=True)
    link.symlink_to("../../lib/librkllmrt.so")
    assert board.bad() == {}


def test_a_family_that_the_user_names(board: Machine) -> None:
    board.write(RKLLM, elf(FAMILIES["1.3.0"].symbols, "RKLLM SDK (version: 1.3.1 (x@2025))"))
    assert board.bad() == {"librkllmrt": "problem"}
    assert "MMCHAT_RKLLM_FAMILY" in board.examine()["librkllmrt"].cure
    board.environ["MMCHAT_RKLLM_FAMILY"] = "1.3.0"
    one = board.examine()["librkllmrt"]
    assert (one.status, one.what) == (
        "advice",
        f"RKLLM 1.3.1 ({RKLLM}), used as 1.3.0, which MMCHAT_RKLLM_FAMILY names",
    )
    board.environ["MMCHAT_RKLLM_FAMILY"] = "7.0"
    assert "unset MMCHAT_RKLLM_FAMILY" in board.examine()["librkllmrt"].cure


def test_a_named_library(board: Machine) -> None:
    board.environ["MMCHAT_RKLLM_LIB"] = "/opt/none.so"
    one = board.examine()["librkllmrt"]
    assert (one.status, one.what) == ("problem", "MMCHAT_RKLLM_LIB names /opt/none.so, which is no file")
    board.write("/opt/none.so", rkllm("1.3.0"))
    assert board.examine()["librkllmrt"].what == "RKLLM 1.3.0 (/opt/none.so)"


@pytest.mark.parametrize("version", FAMILY_OF_VERSION)
def test_every_version_of_rkllm(rk3588: Machine, version: str) -> None:
    rk3588.write(RKLLM, rkllm(version))
    assert rk3588.examine()["librkllmrt"].what == f"RKLLM {version} ({RKLLM})"


@pytest.mark.parametrize(
    ("data", "status", "told"),
    [
        (b"", "problem", "not a shared library (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n".ljust(200), "problem", "Git LFS pointer"),
        (rkllm("1.2.3")[:-70], "problem", "truncated or damaged"),
        (rkllm("1.2.3", machine=40), "problem", "made for arm"),
        (rknn("2.3.2"), "problem", "is no RKLLM runtime"),
        (elf(FAMILIES["1.3.0"].symbols, "RKLLM SDK (version: 1.9.0"), "problem", "RKLLM 1.9.0"),
        (elf(FAMILIES["1.1"].symbols, "RKLLM SDK (version: 1.3.0"), "problem", "the findings disagree"),
        (elf(FAMILIES["1.3.0"].symbols, "nothing"), "unknown", "does not tell"),
    ],
)
def test_a_wrong_rkllm_library(rk3588: Machine, data: bytes, status: str, told: str) -> None:
    rk3588.write(RKLLM, data)
    one = rk3588.examine()["librkllmrt"]
    assert one.status == status
    assert told in one.what


@pytest.mark.parametrize(
    ("data", "status", "told"),
    [
        (b"", "problem", "cannot be read"),
        (b"\x7fELF", "problem", "not a shared library (4 bytes)"),
        (rknn("2.3.2")[:-70], "problem", "truncated or damaged"),
        (rkllm("1.2.3"), "problem", "no RKNN runtime"),
        (elf(["rknn_init"], "nothing"), "unknown", "does not tell"),
        (rknn("1.6.0"), "advice", "RKNN 1.6.0 (/usr/lib/librknnrt.so), but rknn-toolkit-lite2 is 2.3.2"),
        (rknn("2.3.0"), "ok", "RKNN 2.3.0"),
    ],
)
def test_a_wrong_rknn_library(rk3588: Machine, data: bytes, status: str, told: str) -> None:
    rk3588.write(RKNN, data)
    one = rk3588.examine()["librknnrt"]
    assert one.status == status
    assert told in one.what


@pytest.mark.parametrize(("version", "status"), [("1.6.0", "problem"), ("2.3.0", "ok"), ("?", "ok")])
def test_lite2(board: Machine, version: str, status: str) -> None:
    board.process_has(packages={"openvino": "2026.4.1", "rknn-toolkit-lite2": version})
    assert board.examine()["rknn-toolkit-lite2"].status == status


def test_nothing_is_loaded(rk3588: Machine) -> None:
    rk3588.examine("demo")
    assert str(rk3588.root) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("available", "status"), [(8 * GIB, "advice"), (10 * GIB, "ok")])
def test_memory_for_the_published_model(rk3588: Machine, available: int, status: str) -> None:
    rk3588.write("/proc/meminfo", f"MemAvailable: {available >> 10} kB\n")
    one = rk3588.examine()["memory"]
    assert one.status == status
    assert f"{available / 1e9:.1f} GB available" in one.what


def test_memory_for_a_models_files(board: Machine, tmp_path: Path) -> None:
    """Files of 8 and 1 GB, with holes; 11 % more is in use in practice."""
    for name, size in (("qwen.rkllm", 8), ("vision_transformer.rknn", 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * 10**9)
    for available, status in ((8_900, "problem"), (9_500, "advice"), (10_100, "ok")):
        board.write("/proc/meminfo", f"MemAvailable: {available * 10**6 >> 10} kB\n")
        one = board.examine(tmp_path)["memory"]
        assert one.status == status
        assert "the model takes 10.0 GB and more" in one.what


def test_memory_for_a_checkpoint_is_that_of_float32(pc: Machine) -> None:
    """The demo's 6.6 MB of float16 become 13 MB."""
    for kilobytes, status in ((12_000, "problem"), (13_500, "advice"), (15_000, "ok")):
        pc.write("/proc/meminfo", f"MemAvailable: {kilobytes} kB\n")
        assert pc.examine("demo")["memory"].status == status


def test_memory_that_is_not_told(pc: Machine) -> None:
    pc.remove("/proc/meminfo")
    assert pc.bad() == {"memory": "unknown"}


@pytest.mark.parametrize(("free", "status"), [(50 << 20, "problem"), (GIB, "advice"), (3 * GIB, "ok")])
def test_disk(pc: Machine, free: int, status: str) -> None:
    nearest = pc.path("/home/user")  # that is there
    pc.process_has(free_bytes=lambda path: {nearest: free}[path])
    assert pc.examine()["disk"].status == status


def test_a_cap_of_the_store_that_is_none(pc: Machine) -> None:
    pc.environ["MMCHAT_STORE_CAP"] = "much"
    finding = pc.examine()["disk"]
    assert (finding.status, "MMCHAT_STORE_CAP is 'much'" in finding.what) == ("problem", True)


def test_disk_that_is_not_told(pc: Machine) -> None:
    def fail(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    pc.process_has(free_bytes=fail)
    assert pc.bad() == {"disk": "unknown"}


@pytest.mark.parametrize(
    ("limit", "status"), [("100", "problem"), ("512", "advice"), ("1024", "ok"), ("unlimited", "ok"), ("", "unknown")]
)
def test_open_files(pc: Machine, limit: str, status: str) -> None:
    pc.write("/proc/self/limits", f"Max processes   7   7   processes\nMax open files            {limit}\n")
    assert pc.examine()["open files"].status == status


def test_the_store_falls_back_to_a_temporary_folder(pc: Machine) -> None:
    pc.process_has(may_use=lambda path: "home" not in path.relative_to(pc.root).parts)
    pc.path("/tmp").mkdir()
    one = pc.examine()["store"]
    assert one.status == "advice"
    assert one.what.startswith("/home/user/.cache/mmchat/embeddings cannot be written; ")


@pytest.mark.parametrize("folder", ["/home/user/.profile/store", "/home/user/.profile"])
def test_a_store_that_cannot_be(pc: Machine, folder: str) -> None:
    pc.environ["MMCHAT_STORE"] = folder
    assert pc.bad() == {"store": "problem"}


def test_a_store_of_another_user(pc: Machine) -> None:
    pc.environ["MMCHAT_STORE"] = "/srv/store"
    pc.path("/srv/store").mkdir(parents=True)
    assert pc.bad() == {}
    pc.process_has(may_use=lambda path: path.name != "store")
    assert pc.bad() == {"store": "problem"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    copy = tmp_path / "a model"
    shutil.copytree(DEMO, copy, ignore=lambda folder, names: [name for name in names if name.startswith("__")])
    return copy


def rewrite(folder: Path, without: str = "", table: tuple[int, ...] | None = None) -> None:
    """Write the weights again, without some tensors or with another shape of the token rows."""
    tensors: dict[str, tuple[str, tuple[int, ...], list[bytes]]] = {}
    for name, info in ((name, Checkpoint(folder).info(name)) for name in Checkpoint(folder)):
        if not without or not name.startswith(without):
            tensors[name] = (info.dtype, info.shape, [Checkpoint(folder).array(name).tobytes()])
    if table:
        dtype, _, data = tensors["llm.model.embed_tokens.weight"]
        tensors["llm.model.embed_tokens.weight"] = (dtype, table, data)
    write_tensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize("name", ["model.rkllm", "vision.rknn"])
def test_a_checkpoint_with_a_boards_file_beside_it_is_one(pc: Machine, checkpoint: Path, name: str) -> None:
    """`mmchat convert llm-rkllm CHECKPOINT CHECKPOINT/model.rkllm` makes it."""
    (checkpoint / name).write_bytes(bytes(1000))
    assert pc.bad(checkpoint) == {}
    assert "a board folder" not in pc.examine(checkpoint)["model"].what
    rewrite(checkpoint, "llm.model.layers.2.")
    assert "1 of 8 layers lack tensors" in pc.examine(checkpoint)["model"].what


def test_models_that_are_not_whole(pc: Machine, checkpoint: Path) -> None:
    def told() -> str:
        one = pc.examine(checkpoint)["model"]
        assert one.status == "problem"
        return one.what

    assert pc.bad(checkpoint) == {}
    weights = (checkpoint / "model.safetensors").read_bytes()
    for change, text in (
        (lambda: rewrite(checkpoint, "llm.model.layers.2."), "1 of 8 layers lack tensors, as llm.model.layers.2 does"),
        (lambda: rewrite(checkpoint, "resampler."), "no tensors resampler.*"),
        (lambda: rewrite(checkpoint, "llm.model.embed_tokens."), "no tensor 'llm.model.embed_tokens.weight'"),
        (lambda: rewrite(checkpoint, table=(192, 800)), "token rows are (192, 800), but config.json says 800 x 192"),
        (lambda: (checkpoint / "model.safetensors").write_bytes(weights[:-1]), "model.safetensors"),
        (lambda: (checkpoint / "model.safetensors").write_bytes(b"version https://git-lfs.x\n"), "Git LFS pointer"),
        (lambda: (checkpoint / "tokenizer.json").write_text('{"model"'), "tokenizer.json: not JSON"),
        (lambda: (checkpoint / "config.json").unlink(), "lacks config.json"),
    ):
        change()
        assert text in told()
        for path in DEMO.iterdir():
            if path.is_file():
                shutil.copy(path, checkpoint)
    assert pc.bad(checkpoint) == {}
    (checkpoint / "model.safetensors").unlink()
    assert "no *.safetensors" in told()


@pytest.mark.parametrize(
    ("file", "kind"), [("qwen.rkllm", "a board folder"), ("openvino_language_model.bin", "an OpenVINO folder")]
)
def test_folders_of_other_kinds_are_recognised(pc: Machine, tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    one = pc.examine(tmp_path)["model"]
    assert one.status == "problem"
    assert f"it looks like {kind}" in one.what


def test_folders_that_are_half_made(pc: Machine, tmp_path: Path) -> None:
    """Each is named, with what it has, what it lacks, and the command that goes on."""

    def told(name: str, **state: object) -> str:
        folder = tmp_path / "half made"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(state))
        one = pc.examine(folder)["model"]
        assert one.status == "problem"
        return f"{one.what} | {one.cure}"

    folder = tmp_path / "half made"
    facts = {"checkpoint": "/a b/c", "target": "rk3576", "steps": ["small files", "encoder", "LLM"], "lacks": []}
    assert "it has small files, and lacks encoder, LLM | mmchat convert board '/a b/c'" in told(
        BOARD_STATE, facts=facts, steps={"small files": {}}
    )
    done: dict[str, object] = {name: {} for name in facts["steps"]}
    lacking = {**facts, "lacks": ["model.rkllm, which X makes"]}
    assert "lacks model.rkllm, which X makes | that command is:" in told(BOARD_STATE, facts=lacking, steps=done)
    assert "was not checked yet" in told(BOARD_STATE, facts=facts, steps=done)
    for garbage in ({"facts": 7, "steps": []}, {"facts": {"steps": 7}}):
        told(BOARD_STATE, **garbage)
    (folder / BOARD_STATE).unlink()
    assert "ONNX" in told(CONVERT_STATE, source={"step": "vision-onnx"})
    assert "goes on where it was" in told(CONVERT_STATE, source={"step": "llm-checkpoint"})
    (folder / "config.json").write_text("{}")
    assert "it is for transformers or rkllm-toolkit" in told(CONVERT_STATE, source={"step": "llm-checkpoint"})
    (folder / CONVERT_STATE).unlink()
    (folder / ".model-00002-of-00004.safetensors.part").write_bytes(b"x")
    assert "interrupted at model-00002-of-00004.safetensors; " in told(PULL_RECORD, repo="openbmb/MiniCPM-V-2_6")
    assert "| mmchat pull openbmb/MiniCPM-V-2_6 --to" in told(PULL_RECORD, repo="openbmb/MiniCPM-V-2_6")


def test_parts_of_a_checkpoint(pc: Machine, tmp_path: Path) -> None:
    """As pull --only leaves them: not a damaged checkpoint."""
    (tmp_path / PULL_RECORD).write_text(json.dumps({"repo": "openbmb/MiniCPM-V-2_6"}))
    for path in DEMO.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "embed_table.safetensors").write_bytes(b"x")
    one = pc.examine(tmp_path)["model"]
    assert one.status == "problem"
    assert "the token rows; lacks the LLM (*.rkllm) with mmchat.json and the vision encoder" in one.what
    assert "mmchat pull openbmb/MiniCPM-V-2_6 --to DIR" in one.cure
    (tmp_path / ".vision.safetensors.part").write_bytes(b"x")
    assert "interrupted at vision.safetensors" in pc.examine(tmp_path)["model"].what
    assert f"mmchat pull openbmb/MiniCPM-V-2_6 --only vision --to {tmp_path} goes" in pc.examine(tmp_path)["model"].cure
    (tmp_path / ".vision.safetensors.part").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "parts of" not in pc.examine(tmp_path)["model"].what


def test_a_folder_as_the_community_publishes_it(board: Machine, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(folders["square"], folder)
    (folder / "mmchat.json").unlink()
    (folder / "vision_positions.safetensors").unlink(missing_ok=True)
    assert "as the community's: its encoder takes one square" in board.examine(folder)["model"].what
    (folder / "vision.rknn").unlink()
    one = board.examine(folder)["model"]
    assert "lacks vision_transformer.rknn" in one.what
    assert "mmchat convert board" in one.what


@pytest.mark.parametrize("name", ["/none/such", "", "~nobody-of-that-name/x", "a\0b", "x" * 300, "/dev/null"])
def test_no_model_folder(pc: Machine, name: str) -> None:
    assert pc.bad(name) == {"model": "problem"}


def test_a_model_folder_that_is_shut(pc: Machine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shut(*arguments: object, **named: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", shut)
    assert pc.bad(checkpoint) == {"model": "problem"}


# A board's folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """vision.mode -> a folder as a person with a board has it."""
    library("1.2.1-1.2.3")  # skips where there is no compiler
    return {
        mode: write_board_folder(tmp_path_factory.mktemp(mode), "1.2.1-1.2.3", vision=mode) for mode in VISION_MODES
    }


@pytest.mark.parametrize("mode", VISION_MODES)
def test_a_boards_folder_and_its_encoder(board: Machine, folders: dict[str, Path], mode: str) -> None:
    board.write(RKNN, rknn("2.5.0"))
    board.process_has(packages={"openvino": "2026.4.1", "rknn-toolkit-lite2": "2.5.0"})
    found = board.examine(folders[mode])
    assert "a board folder (*.rkllm), complete" in found["model"].what
    if mode == "openvino":
        assert found["encoder"].what == "vision.safetensors: openvino, on the CPU"
    else:
        assert found["encoder"].what == f"vision.rknn: {mode}, for RK3588 and RK3576, by rknn-toolkit2 2.5.0"
    assert board.bad(folders[mode]) == {}


def test_of_models_side_by_side_one_is_loaded(board: Machine, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(folders["navit"], folder)
    before = board.examine(folder)
    for name in ("other.rkllm", "other.rknn"):
        with (folder / name).open("wb") as file:
            file.truncate(64 << 30)
    after = board.examine(folder)
    assert after["memory"] == before["memory"]
    assert after["model"] == before["model"]


def test_a_pc_asks_nothing_of_an_encoder_for_the_npu(pc: Machine, folders: dict[str, Path]) -> None:
    found = pc.examine(folders["navit"])
    assert "encoder" not in found
    assert (found["npu"].status, "runs on nothing else" in found["npu"].what) == ("advice", True)
    assert found["model"].status == "ok"


def described_otherwise(folder: Path, copy: Path, **values: object) -> Path:
    """A copy of a board's folder whose encoder tells something else of itself."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("lite2"))
    path = copy / "vision.rknn"
    data = path.read_bytes()
    at = 64 + struct.unpack_from("<Q", data, 16)[0]
    text = json.dumps({**json.loads(data[at + 8 :]), **values}).encode()
    path.write_bytes(data[:at] + struct.pack("<Q", len(text)) + text)
    config = json.loads((copy / "mmchat.json").read_text())
    config["files"]["vision.rknn"]["bytes"] = path.stat().st_size
    (copy / "mmchat.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("values", "status", "what", "cure"),
    [
        ({"target_platform": ["rk3566"]}, "problem", "for RK3566, .*; this is RK3588", "target_platform='rk3588'"),
        (
            {"target_platform": ["rk3588"], "version": "2.4.0"},
            "advice",
            "newer than librknnrt 2.3.2",
            "librknnrt.so 2.4.0",
        ),
        ({"target_platform": ["rk3588"], "version": "2.3.9"}, "ok", "by rknn-toolkit2 2.3.9", ""),
        ({"target_platform": ["rk3588"], "version": ""}, "ok", "of unknown version", ""),
        ({"target_platform": 7}, "unknown", "does not tell its chip", "for which chip it is"),
    ],
)
def test_encoders_of_another_kind(
    rk3588: Machine, folders: dict[str, Path], tmp_path: Path, values: dict[str, Any], status: str, what: str, cure: str
) -> None:
    folder = described_otherwise(folders["navit"], tmp_path / "folder", **values)
    one = rk3588.examine(folder)["encoder"]
    assert one.status == status
    assert re.search(what, one.what)
    assert cure in one.cure


def test_a_boards_folder_that_is_not_whole(rk3588: Machine, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = described_otherwise(folders["navit"], tmp_path / "folder")
    assert rk3588.examine(folder)["model"].status == "ok"
    (folder / "vision.rknn").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in rk3588.examine(folder)["model"].what
    for name in ("vision.rknn", "model.rkllm"):
        (folder / name).unlink()
    one = rk3588.examine(folder)["model"]
    assert one.status == "problem"
    assert "lacks model.rkllm" in one.what
    assert "it looks like a board folder" in one.what
    assert "On a board" in one.cure


def files_of(machine: Machine) -> list[str]:
    return sorted(str(path.relative_to(machine.root)) for path in machine.root.rglob("*") if path.is_file())


BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"9" * 5000, b"-1", b"v0.9.", b"Max open files 99999999999999999999", b"\xff\x00\n" * 3000]),
    st.sampled_from(["MemAvailable: ٣ kB", "RKNPU driver: v٠.٩.٨", "²"]).map(str.encode),
)


@given(data=st.data())
def test_garbage_never_raises(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any file of the board, and any of the model's, may hold anything or be something else."""
    board = make_board(tmp_path_factory.mktemp("garbage") / "root", data.draw(st.sampled_from(sorted(NPU))))
    model = board.root.parent / "model"
    model.mkdir()
    for path in DEMO.iterdir():
        if path.is_file():
            (model / path.name).symlink_to(path)
    paths = [board.root / name for name in files_of(board)] + sorted(model.iterdir())
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=8, unique=True)):
        kind = data.draw(st.sampled_from(["bytes", "spliced", "gone", "folder", "loop", "pipe"]))
        old = path.read_bytes() if path.is_file() else b""
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "bytes":
            path.write_bytes(data.draw(BYTES))
        elif kind == "spliced":
            at = data.draw(st.integers(0, min(len(old), 4096)))
            path.write_bytes(old[:at] + data.draw(BYTES) + old[at + data.draw(st.integers(0, 64)) :])
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "pipe" and path.parent != model:
            os.mkfifo(path)
    board.examine(model)
    shutil.rmtree(board.root.parent)


@given(texts=st.lists(st.text(st.characters(exclude_characters="\0", codec=None), max_size=30), min_size=6, max_size=6))
def test_strange_surroundings_never_raise(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    board = make_board(tmp_path_factory.mktemp("strange") / "root", "RK3588")
    names = ("MMCHAT_RKLLM_LIB", "MMCHAT_STORE", "XDG_CACHE_HOME")
    board.environ = dict(zip(names, texts, strict=False))
    versions = {"openvino": texts[3] or "?", "rknn-toolkit-lite2": texts[4] or "?"}
    board.process_has(python=texts[5] or "?", glibc=texts[3], packages=versions)
    board.examine(texts[4])
    shutil.rmtree(board.root.parent)


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mmchat.cli import main; main()", "doctor", *arguments]
    variables: Mapping[str, str] = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables, timeout=60)


def test_the_command_prints_a_table() -> None:
    shown = run("demo", COLUMNS="400")  # where columns are narrow, a long path pushes the rest to the next line
    assert shown.stderr == ""
    first, *rows = shown.stdout.splitlines()
    assert [column.strip() for column in first.replace("┃", "|").split("|")] == ["status", "name", "what", "cure"]
    assert any("model" in row and "a checkpoint, complete" in row for row in rows)
    assert shown.returncode == (1 if any(row.startswith("problem") for row in rows) else 0)


def test_the_command_prints_json() -> None:
    shown = run("--json", "demo")
    findings = [Finding(**one) for one in json.loads(shown.stdout)]
    assert [one.name for one in findings] == [one.name for one in examine(model="demo")]
    assert {one.name: one.status for one in findings}["model"] == "ok"
    assert shown.returncode == (1 if any(one.status == "problem" for one in findings) else 0)
    assert shown.stderr == ""


def test_a_problem_is_the_exit_code(tmp_path: Path) -> None:
    for name in ("pokój", "[bold]x[red]", os.fsdecode(b"\xff\xfe")):
        (tmp_path / name).mkdir()
        for arguments in (("--json",), ()):
            shown = run(*arguments, str(tmp_path / name), PYTHONIOENCODING="ascii", COLUMNS="400")
            assert (shown.returncode, shown.stderr) == (1, "")
            assert "lacks config.json" in shown.stdout
    assert "[bold]x[red]" in "".join(run(str(tmp_path / "[bold]x[red]"), COLUMNS="400").stdout.split())


def test_wrong_usage() -> None:
    assert run("demo", "demo").returncode == 2


def test_what_this_process_is(tmp_path: Path) -> None:
    here = Process()
    assert (here.machine, here.python) == (platform.machine(), platform.python_version())
    assert here.glibc in platform.libc_ver()
    assert not {"rknnlite", "rknnlite.api"} & set(sys.modules)
    assert here.may_use(tmp_path)
    assert not here.may_use(tmp_path / "none")
    assert here.free_bytes(tmp_path) > 0


def test_it_is_quick(rk3588: Machine) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        rk3588.examine("demo")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 5
