"""What the real dimensions take on this machine: MiniCPM-V-2.6's sizes with random weights, converted and run.

    python -m tools.full_size WORK                  # 4 of the LLM's 28 layers, the whole tower: 15 GB of disk, minutes
    python -m tools.full_size WORK --layers 28 --only chat

WORK keeps what was written (checkpoint, ONNX, OpenVINO folder); a second run uses it.  Each line is one process: its
seconds, and the largest that its memory was, in all and without mapped files.

    vision   one view of 448 x 448: the encoder from the checkpoint, the OpenVINO folder's, and ONNX Runtime's; cosines
    convert  mmchat convert openvino --weights KIND
    chat     two turns with one picture on that folder
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools import write_large_checkpoint

SIDE = 448
_WATCHED = ("VmRSS", "RssAnon")


def watch(peaks: dict[str, int], pid: int | str = "self") -> None:
    """Keep the largest of what /proc tells of a process, in MB, until it ends."""

    def look() -> None:
        while True:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                return
            for name, _, value in (line.partition(":") for line in lines):
                if name in _WATCHED:
                    peaks[name] = max(peaks.get(name, 0), int(value.split()[0]) // 1024)
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()


def picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Coarse patches of colour, of a size that is not cut."""
    coarse = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    return np.kron(coarse, np.ones((SIDE // 16, SIDE // 16, 1), np.uint8)).astype(np.uint8)


def encode(work: Path, how: str) -> dict[str, Any]:
    """Encode the picture with one of the three, and keep the embedding."""
    from mmchat.checkpoint import Checkpoint
    from mmchat.model_dir import POSITIONS, open_model
    from mmchat.openvino_vision import open_encoder

    pixels = picture()
    if how == "onnx":
        import onnxruntime

        from mmchat import vision_inputs
        from mmchat.convert import vision_onnx

        spec = open_model(work / "checkpoint")
        vision_onnx.run(vision_onnx.plan(spec), work / "onnx", lambda *_: None)
        n, rows = vision_onnx.default_patches(spec), SIDE // 14
        inputs = vision_inputs.host_inputs(
            vision_inputs.patches(pixels, 14),
            rows,
            rows,
            positions=Checkpoint(work / "checkpoint").float32(POSITIONS),
            output_size=spec.vision.output_size,
            n=n,
        )
        session = onnxruntime.InferenceSession(work / "onnx" / "vision.onnx", providers=["CPUExecutionProvider"])
        started = time.perf_counter()
        found = session.run(["embeddings"], inputs)[0][0]
    else:
        encoder = open_encoder(open_model(work / how), None)
        started = time.perf_counter()
        found = encoder.encode(pixels)
    seconds = time.perf_counter() - started
    np.save(work / f"{how}.npy", found)
    return {"seconds of one view": round(seconds, 1)}


def convert(work: Path, kind: str) -> dict[str, Any]:
    from mmchat.convert import openvino_folder
    from mmchat.model_dir import open_model

    plan = openvino_folder.plan(open_model(work / "checkpoint"), kind)
    openvino_folder.run(plan, work / kind, lambda *_: None)
    sizes = {path.stem: path.stat().st_size / 1e9 for path in (work / kind).glob("*_model.bin")}
    return {"estimated MB": plan.estimate.memory // 1_000_000, "GB": {k: round(v, 2) for k, v in sizes.items()}}


def chat(work: Path, kind: str) -> dict[str, Any]:
    import mmchat

    with mmchat.open(work / kind, store=work / "store", context_rows=2048) as runtime:
        peaks: dict[str, dict[str, int]] = {"LLM": {}, "vision": {}}
        runtime.ready()
        watch(peaks["LLM"], runtime.llm.worker.pid or "self")
        runtime.vision.worker.start()
        runtime.vision.worker.ready()
        watch(peaks["vision"], runtime.vision.worker.pid or "self")
        session, said = runtime.session(max_slice_nums=1), []
        for question, images in (("What is it?", [picture()]), ("And what else?", [])):
            usage = session.ask(question, images, temperature=0.0, max_new_tokens=16)
            said.append({k: round(v, 1) for k, v in usage.usage.to_dict().items() if v and k != "total_s"})
        time.sleep(0.2)
        return {"turns": said, "MB": peaks}


def run(step: str, work: Path, what: str) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, "-m", "tools.full_size", str(work), "--child", step, what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{step} {what} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{step} {what}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-layers", type=int, default=write_large_checkpoint.VISION_LAYERS)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--only", choices=["vision", "chat"], help="the default is both")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work: Path = given.work
    if given.child:
        step, what = given.child
        peaks: dict[str, int] = {}
        watch(peaks)
        started, cpu = time.perf_counter(), time.process_time()
        found = {"encode": encode, "convert": convert, "chat": chat}[step](work, what)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        print(json.dumps({**found, "wall s": round(wall, 1), "cpu s": round(cpu, 1), "peak MB": peaks}))
        return
    if not (work / "checkpoint" / "config.json").exists():
        write_large_checkpoint.write(
            work / "checkpoint",
            n_layers=given.layers,
            vocab=151666,
            vision_layers=given.vision_layers,
            random=("llm.", "vpm.", "resampler."),
        )
    run("convert", work, given.weights)
    if given.only != "chat":
        for how in ("checkpoint", given.weights, "onnx"):
            run("encode", work, how)
        right = np.load(work / "checkpoint.npy").astype(np.float64)
        for how in (given.weights, "onnx"):
            other = np.load(work / f"{how}.npy").astype(np.float64)
            cosine = np.vdot(right, other) / np.linalg.norm(right) / np.linalg.norm(other)
            print(f"vision, {how}: cosine {cosine:.8f}, largest difference {np.abs(right - other).max():.2e}")
    if given.only != "vision":
        run("chat", work, given.weights)


if __name__ == "__main__":
    main()
