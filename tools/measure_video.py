"""Measure captioning: is it right, does it stay as fast and as small as it begins, and what does the loop cost?

    python -m tools.measure_video VIDEO [--rounds 5]

VIDEO is one of tools/make_test_video.py.  First all of it at one frame per second: answers that are right, encodes
per distinct frame, time per frame and memory in the first and the last tenth; and both tenths in turns, in two
runtimes, so that a busy machine holds up both.  Then its first minute, again and again: bare engine calls for the same
frames, the loop without reading ahead, and the loop, in turns, so that the ratios hold on a busy machine.  Every round
begins with an empty store.  Results are in benchmarks/video.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

import mmchat
from mmchat.engine import Sampling
from mmchat.prompt import Message, Picture, Text, render
from mmchat.runtime import Runtime
from mmchat.slicing import slice_image
from mmchat.store import slice_key
from mmchat.video import Caption, Frame, captions, open_source
from mmchat.video.asking import SAMPLING
from mmchat.video.pace import Pace
from mmchat.video.values import Shot
from tools.make_test_video import at, read

QUESTION = "What color is the background?"
CLIP_S = 60


def resident_mb(rt: Runtime) -> float:
    """Of this process and its workers."""
    pids = ["self", *(str(worker.pid) for worker in (rt.llm.worker, rt.vision.worker) if worker.pid)]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * 4096 / 1e6


def processor_s(rt: Runtime) -> float:
    """Seconds of processor that this process and its workers have used: what a busy machine does not stretch."""
    used = time.process_time()
    for worker in (rt.llm.worker, rt.vision.worker):
        if worker.pid:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
            used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def whole(rt: Runtime, video: Path) -> int:
    """The first part: all of the video.  The number of frames."""
    truth = read(video)
    took: list[float] = []
    used: list[float] = []
    memory: list[float] = []
    made: list[Caption] = []
    right: dict[float, bool] = {}
    before = time.perf_counter()
    for caption in captions(rt, video, QUESTION):
        now = time.perf_counter()
        took.append(now - before)
        before = now
        used.append(processor_s(rt))
        made.append(caption)
        memory.append(resident_mb(rt))
        held = at(truth, caption.time)
        right.setdefault(held.start, held.background in caption.text.lower())
    tenth = len(made) // 10
    first, last = took[1 : 1 + tenth], took[-tenth:]
    print(f"frames                 {len(made)}, {len({c.digest for c in made})} of them distinct")
    print(f"slices encoded         {sum(c.usage.slices_encoded for c in made)}")
    print(f"rows reused, prefilled {made[-1].usage.n_reused}, {made[-1].usage.n_prefilled} (the last frame)")
    print(f"right                  {sum(right.values())} of {len(right)} distinct scenes")
    for name, of in (("median", statistics.median), ("mean", statistics.mean)):
        a, b = of(first), of(last)
        print(f"{name:6} ms per frame   first tenth {1000 * a:.1f}, last tenth {1000 * b:.1f}, ratio {b / a:.3f}")
    parts = [made[1 : tenth + 1], made[-tenth:]]
    early, late = used[tenth] - used[0], used[-1] - used[-1 - tenth]
    encodes = [sum(caption.usage.slices_encoded for caption in part) for part in parts]
    print(f"processor ms per frame first tenth {1000 * early / tenth:.1f}, last tenth {1000 * late / tenth:.1f}, "
          f"ratio {late / early:.3f} (encodes: {encodes[0]}, {encodes[1]})")  # fmt: skip
    print(f"memory MB              first tenth {memory[tenth]:.1f}, last {memory[-1]:.1f}, peak {max(memory):.1f}")
    return len(made)


def aged(old: Runtime, young: Runtime, video: Path, n: int) -> None:
    """The last tenth of n frames in a loop with all others behind it, the first tenth in one that begins, in turns."""
    old.store.clear()
    loops = {
        "first": captions(young, video, QUESTION, ahead=False),
        "last": captions(old, video, QUESTION, ahead=False),
    }
    for _ in range(n - n // 10):
        next(loops["last"])
    next(loops["first"])  # the model is loaded
    took: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(n // 10 - 1):
        for name, running in loops.items():
            started = time.perf_counter()
            caption = next(running)
            if not caption.usage.slices_encoded:
                took[name].append(time.perf_counter() - started)
    first, last = (1000 * statistics.median(seconds) for seconds in took.values())
    print(f"in turns, ms per frame first tenth {first:.1f}, last tenth {last:.1f}, ratio {last / first:.3f} "
          f"(frames that are not encoded: {len(took['first'])}, {len(took['last'])})")  # fmt: skip


def clip(video: Path) -> list[tuple[float, Image]]:
    """The frames of the first minute that the loop takes, read."""
    source = open_source(video)
    frames = (item for item in source.frames(threading.Event()) if isinstance(item, Frame))
    shots = (shot.frame for shot in Pace().shots(frames, source) if isinstance(shot, Shot))
    return [(frame.time, frame.read()) for frame in shots if frame.time < CLIP_S]


def bare(rt: Runtime, pictures: Sequence[Image]) -> float:
    """Seconds of encoder and engine calls alone; cutting and prompts are made before."""
    wanted = []
    for image in pictures:
        plan = rt.spec.slices.plan(image.size, 1)
        slices = slice_image(image, plan)
        keys = tuple(slice_key(pixels, rt.spec.encoder_digest) for pixels in slices)
        message = Message("user", (Picture(plan, keys), Text(QUESTION)))
        prompt = render([message], rt.tokenizer, query_num=rt.spec.vision.query_num, use_image_id=False)
        wanted.append((list(zip(keys, slices, strict=True)), prompt.pieces))
    sampling = Sampling.from_dict({**rt.spec.sampling.to_dict(), **SAMPLING})
    rt.store.clear()
    started = time.perf_counter()
    for slices_of, pieces in wanted:
        rt.vision.encode([pair for pair in slices_of if not rt.store.has(pair[0])])
        for _ in rt.llm.generate(pieces, sampling, lambda: False):
            pass
    return time.perf_counter() - started


def loop(rt: Runtime, video: Path, n: int, *, ahead: bool) -> float:
    """Seconds of the loop over as many frames, from the file to the captions."""
    rt.store.clear()
    started = time.perf_counter()
    for number, _ in enumerate(captions(rt, video, QUESTION, ahead=ahead), 1):
        if number == n:
            break
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-clip", action="store_true", help="leave out the first part")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, mmchat.open("demo", store=folder) as rt:
        if not given.only_clip:
            n_frames = whole(rt, given.video)
            with tempfile.TemporaryDirectory() as other, mmchat.open("demo", store=other) as young:
                aged(rt, young, given.video, n_frames)
        pictures = [image for _, image in clip(given.video)]
        n = len(pictures)
        rt.ready()
        bare(rt, pictures[:3])
        times: dict[str, list[float]] = {"bare engine calls": [], "loop, not ahead": [], "loop": []}
        for _ in range(given.rounds):
            times["bare engine calls"].append(bare(rt, pictures))
            times["loop, not ahead"].append(loop(rt, given.video, n, ahead=False))
            times["loop"].append(loop(rt, given.video, n, ahead=True))
        base = statistics.median(times["bare engine calls"])
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            all_ms = " ".join(f"{1000 * s / n:.1f}" for s in seconds)
            print(f"{name:22} {n / middle:6.2f} frames/s, {base / middle:.2f} of bare; ms per frame: {all_ms}")


if __name__ == "__main__":
    main()
