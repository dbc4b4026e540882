"""Run Rockchip's real rknn-toolkit-lite2 (aarch64) on this machine, under qemu, with a fake librknnrt below it.

    python -m tests.emulated            # 10 to 30 minutes; the system it makes (600 MB) is kept in .emulated

1. How the package behaves: asked as tests/rknn_standin/manners.py asks, it answers what manners.json holds.
2. A conversation with pictures through mmchat.open, parent and both workers emulated, with the RKLLM stand-in built
   for aarch64: every byte that reaches librknnrt is the encoder's input, every embedding in the store is librknnrt's
   output, and the answers are those of the same folder on this machine.
3. Every call of librknnrt fails in turn: one clear error each.

It is no NPU and no librknnrt: nothing is said about what those compute.  Needs root, for debootstrap, and on Debian 12:
apt-get install qemu-user-static debootstrap gcc-aarch64-linux-gnu libc6-dev-arm64-cross
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat import vision_inputs
from mmchat.checkpoint import Checkpoint
from mmchat.images import read_image
from mmchat.model_dir import DEMO, POSITIONS, ModelSpec, open_model
from mmchat.slicing import plan_slices, slice_image
from mmchat.store import Store, slice_key
from tests.conversation import picture
from tests.emulated.drive import FAULTS, converse
from tests.rkllm_standin.__main__ import N_PATCHES, write_board_folder
from tests.rkllm_standin.build import library
from tests.rknn_standin import manners
from tests.rknn_standin.model import write_echo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDED = ROOT / "tests" / "rknn_standin" / "manners.json"
TOOLS = ("qemu-aarch64-static", "debootstrap", "dpkg-deb", "aarch64-linux-gnu-gcc")
SUITE, PYTHON = "bookworm", "3.11"
WHEELS = (
    "rknn-toolkit-lite2==2.5.0",
    "numpy==1.26.4",
    "psutil",
    "ruamel.yaml",
    "ruamel.yaml.clib",
    "msgpack",
    "pillow<13",
    "tokenizers",
)
PLATFORMS = ("manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_28_aarch64")


class System:
    """An aarch64 Debian's files, with Python, wheels, and what Lite2 looks for on an RK3588."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.site = folder, folder / "root", folder / "site"
        self.python = folder / "python"

    def make(self) -> None:
        """Once; later calls find it."""
        if not (self.folder / "made").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            say("making an aarch64 system")
            run(
                ["debootstrap", "--foreign", "--arch=arm64", "--variant=minbase", "--include=python3", SUITE, self.root]
            )
            for package in sorted((self.root / "var/cache/apt/archives").glob("*.deb")):
                run(["dpkg-deb", "-x", package, self.root])
            say("fetching wheels")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
            run([*pip, "--python-version", PYTHON, *platforms, "--dest", self.folder / "wheels", *WHEELS])
            for wheel in (self.folder / "wheels").glob("*.whl"):
                with zipfile.ZipFile(wheel) as file:
                    file.extractall(self.site)
            (self.folder / "made").touch()
        for name, content in (
            ("proc/device-tree/compatible", "maker,board\0rockchip,rk3588\0"),
            ("dev/dri/renderD129", ""),
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(content)
        say("building the fake librknnrt")
        flags = ["-std=gnu11", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra"]
        run(["aarch64-linux-gnu-gcc", *flags, HERE / "librknnrt.c", "-o", self.root / "usr/lib/librknnrt.so"])
        variables = {"PYTHONHOME": self.root / "usr", "PYTHONPATH": f"{self.site}:{ROOT}", "OPENBLAS_NUM_THREADS": 1}
        words = " ".join(f"-E {name}={value}" for name, value in variables.items())
        emulator = f"qemu-aarch64-static -0 {self.python} -L {self.root}"  # -0: what it starts others with
        program = f'exec {emulator} {words} {self.root}/usr/bin/python{PYTHON} "$@"'
        self.python.write_text(f"#!/bin/sh\n{program}\n")
        self.python.chmod(0o755)

    def ask(self, *words: str | Path, **environ: str) -> Any:
        """Run a program in the emulated Python; the JSON of its last line."""
        command = [str(self.python), *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ})
        if done.returncode != 0:
            raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout}")
        return json.loads(done.stdout.splitlines()[-1])


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


def run(command: Sequence[str | Path]) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def check_manners(system: System, work: Path, *, record: bool) -> None:
    say("asking rknn-toolkit-lite2 how it behaves")
    write_echo(work / "echo.rknn")
    (work / "no model").write_text("this is no model\n")
    told = system.ask(manners.__file__, work / "echo.rknn", work / "no model")
    if record:
        RECORDED.write_text(json.dumps(told, indent=1) + "\n")
    wanted = json.loads(RECORDED.read_text())
    for question in {**wanted, **told}:
        if told.get(question) != wanted.get(question):
            raise SystemExit(f"{question}: {told.get(question)!r}, but manners.json has {wanted.get(question)!r}")
    print(f"{len(told)} answers as recorded")


def check_conversation(system: System, work: Path, mode: str) -> None:
    say(f"a conversation with a {mode} encoder")
    pictures = [work / "0.png", work / "1.png"]
    for number, path in enumerate(pictures):
        picture(number).save(path)
    os.environ["CC"] = "aarch64-linux-gnu-gcc"
    folder = write_board_folder(work / mode, "1.3.0", vision=mode)
    del os.environ["CC"]
    store, dump = work / f"{mode} store", work / f"{mode} dump"
    told = system.ask(HERE / "drive.py", folder, store, *pictures, FAKE_RKNN_DUMP=str(dump))

    spec = open_model(folder)
    slices = [one for path in pictures for one in cut(spec, path)]
    inputs = [encoder_inputs(spec, one) for one in slices]
    arrived = np.fromfile(dump, np.float32)
    sent = np.concatenate([array.reshape(-1) for one in inputs for array in one])
    # The faults' dumps follow: the same first slice again, as often as its run began.
    if not np.array_equal(arrived[: sent.size], sent):
        raise SystemExit("what reached librknnrt is not what was sent")
    print(f"{len(inputs)} slices, {sent.nbytes:,} bytes, arrived as they were sent")
    for pixels, one in zip(slices, inputs, strict=True):
        kept = Store(store).get(slice_key(pixels, spec.encoder_digest))
        if kept is None or not np.array_equal(kept.reshape(-1), echo(one, kept.size)):
            raise SystemExit("what the store keeps is not what librknnrt gave")
    print(f"{len(inputs)} embeddings kept as they came")

    shutil.copyfile(library("1.3.0"), folder / "librkllmrt.so")
    (folder / "profile.json").unlink(missing_ok=True)
    here = converse(folder, store, pictures)  # the store has the embeddings: no encoder is asked
    for there, again in zip(told["answers"], here, strict=True):
        if (there["ids"], there["n_prompt"]) != (again["ids"], again["n_prompt"]) or again["slices_encoded"]:
            raise SystemExit(f"emulated {there}\nhere {again}")
    print(f"{len(here)} answers, token for token those on this machine: {[one['text'] for one in here]}")
    wanted = {fault: "init_runtime returned -1" if fault == "init:-3" else "the NPU gave no result" for fault in FAULTS}
    for fault, error in told["faults"].items():
        if not error.startswith(wanted[fault]):
            raise SystemExit(f"rknn_{fault} gave: {error}")
        print(f"rknn_{fault:16} {error[:70]}...")


def cut(spec: ModelSpec, path: Path) -> list[NDArray[np.uint8]]:
    rule, image = spec.slices, read_image(path)
    plan = plan_slices(
        *image.size,
        max_slice_nums=rule.max_slice_nums,
        scale_resolution=rule.scale_resolution,
        max_patches=rule.max_patches,
    )
    return slice_image(image, plan)


def encoder_inputs(spec: ModelSpec, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """What the encoder is to be given."""
    from PIL import Image

    assert spec.board is not None
    if spec.board.vision_mode == "square":
        side = spec.slices.scale_resolution
        scaled = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        return [np.asarray(scaled, np.float32)[None]]
    size = spec.vision.patch_size
    return list(
        vision_inputs.host_inputs(
            vision_inputs.patches(pixels, size),
            pixels.shape[0] // size,
            pixels.shape[1] // size,
            positions=Checkpoint(open_model(DEMO).folder).float32(POSITIONS),
            output_size=spec.vision.output_size,
            n=N_PATCHES,
        ).values()
    )


def echo(inputs: list[NDArray[np.float32]], n: int) -> NDArray[np.float32]:
    """What the fake librknnrt gives, in its order of adding."""
    out = np.zeros(n, np.float32)
    for k, array in enumerate(inputs):
        flat = array.reshape(-1)
        out += np.float32(1 + 99 * k) * flat[(1 if k else 5) * np.arange(n) % flat.size]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulated", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT / ".emulated", help="where the system is made and kept")
    parser.add_argument("--record", action="store_true", help="write manners.json anew")
    options = parser.parse_args()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        packages = "qemu-user-static debootstrap gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
        raise SystemExit(f"lacks {', '.join(missing)}: apt-get install {packages}")
    system = System(options.dir.resolve())
    system.make()
    with tempfile.TemporaryDirectory() as work:
        os.environ["XDG_STATE_HOME"] = work
        check_manners(system, Path(work), record=options.record)
        for mode in ("navit", "square"):
            check_conversation(system, Path(work), mode)


if __name__ == "__main__":
    main()
