"""What the host's part costs on this machine: each thing against a plain baseline, in turns, medians.

pictures   reading and cutting a JPEG for 9 slices at 448, against the same steps in plain Pillow
rows       gathering rows of 3584 from a memory-mapped table, against a copy of as many float32 rows
messages   a request to a worker and its events, against as many bytes over a bare socket to a bare process
start      processes from nothing to their result, against an interpreter that does nothing
memory     the largest resident size of each process over a chat, against an interpreter that does nothing
"""

from __future__ import annotations

import io
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import mmchat
from mmchat.bench import echo
from mmchat.bench.timing import medians
from mmchat.checkpoint import to_float32, write_tensors
from mmchat.embed_table import EmbedTable
from mmchat.errors import EngineError
from mmchat.images import open_image
from mmchat.slicing import plan_slices, slice_image
from mmchat.worker import Worker

ROUNDS = 7
_JPEGS = ((1920, 1080), (4000, 3000), (8000, 6000), (12000, 9000))
_TABLE_ROWS, _WIDTH = 40_000, 3584

# The bare process: reads 4 bytes of length and so many bytes, answers with n messages of 40 bytes.
_BARE = """
import socket, struct, sys
peer = socket.socket(fileno=int(sys.argv[1]))
file = peer.makefile("rb")
while head := file.read(8):
    size, n = struct.unpack("<II", head)
    file.read(size)
    for _ in range(n):
        peer.sendall(bytes(40))
"""


def run(model: str, say: Callable[[str], None], *, rounds: int = ROUNDS) -> dict[str, Any]:
    """model: for the start and memory of a whole program.

    Raises what opening the model raises; EngineError: a program of its own fails with it.
    """
    with mmchat.open(model) as runtime:  # now, not when all else has been measured
        runtime.ready()
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "pictures": lambda: _pictures(rounds),
        "rows": lambda: _rows(rounds),
        "messages": lambda: _messages(rounds),
        "start": lambda: _start(model, rounds),
        "memory": lambda: _memory(model),
    }
    found: dict[str, Any] = {"rounds": rounds}
    for name, section in sections.items():
        say(f"host: {name}")
        found[name] = section()
    return {"host": found}


def plain_pillow(data: bytes) -> list[NDArray[np.uint8]]:
    """The reference's steps, as anybody would write them."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    plan = plan_slices(*image.size)
    inputs = [np.asarray(image.resize(plan.source, Image.Resampling.BICUBIC))]
    if plan.grid and plan.refined and plan.cell:
        refined = image.resize(plan.refined, Image.Resampling.BICUBIC)
        (columns, rows), (width, height) = plan.grid, plan.cell
        for row in range(rows):
            for column in range(columns):
                box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                inputs.append(np.asarray(refined.crop(box)))
    return inputs


def ours(data: bytes, reference: bool = False) -> list[NDArray[np.uint8]]:
    with open_image(data, reference=reference) as opened:
        plan = plan_slices(*opened.size)
        return slice_image(opened.read(at_least=plan.refined or plan.source), plan)


def psnr(a: list[NDArray[np.uint8]], b: list[NDArray[np.uint8]]) -> float:
    """Peak signal-to-noise ratio over all views, in dB; infinite where they are equal."""
    error = np.concatenate([(x.astype(np.float64) - y).reshape(-1) for x, y in zip(a, b, strict=True)])
    power = float(np.mean(error**2))
    return 10 * math.log10(255**2 / power) if power else math.inf


def _jpeg(width: int, height: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _pictures(rounds: int) -> list[dict[str, Any]]:
    found = []
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # plain Pillow refuses the largest
    try:
        for width, height in _JPEGS:
            data = _jpeg(width, height)
            expected = plain_pillow(data)
            fidelity = psnr(expected, ours(data))
            plain_s, exact_s, fast_s = medians(
                lambda d=data: plain_pillow(d),  # type: ignore[misc]
                lambda d=data: ours(d, reference=True),  # type: ignore[misc]
                lambda d=data: ours(d),  # type: ignore[misc]
                rounds=rounds,
            )
            found.append(
                {
                    "size": [width, height],
                    "megapixels": width * height / 1e6,
                    "plain_pillow_ms_per_megapixel": plain_s * 1e9 / (width * height),
                    "ms_per_megapixel": fast_s * 1e9 / (width * height),
                    "ratio": fast_s / plain_s,
                    "reference_pixels_ratio": exact_s / plain_s,
                    "reference_pixels_equal": psnr(expected, ours(data, reference=True)) == math.inf,
                    "psnr_db": None if math.isinf(fidelity) else fidelity,
                }
            )
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return found


def _rows(rounds: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    values = random.standard_normal((_TABLE_ROWS, _WIDTH), dtype=np.float32) * np.float32(0.02)
    stored: dict[str, NDArray[np.generic]] = {
        "F16": values.astype(np.float16),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "F32": values,
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype, array in stored.items():
            path = Path(folder) / "table.safetensors"
            write_tensors(path, {"embed_tokens.weight": (dtype, array.shape, [array.tobytes()])})
            table = EmbedTable.open(path)
            for n in (1000, 4000):
                ids = random.integers(0, table.n_ids, n)
                out, source = np.empty((n, _WIDTH), np.float32), np.ones((n, _WIDTH), np.float32)
                if not np.array_equal(table.rows(ids, out), to_float32(array[ids])):
                    raise AssertionError("the gathered rows differ from the table's")
                copy_s, gather_s = medians(
                    lambda o=out, s=source: np.copyto(o, s),  # type: ignore[misc]
                    lambda o=out, i=ids, t=table: t.rows(i, o),  # type: ignore[misc]
                    rounds=2 * rounds,
                )
                gigabytes = out.nbytes / 1e9
                found.append(
                    {
                        "dtype": dtype,
                        "rows": n,
                        "memcpy_gb_per_s": gigabytes / copy_s,
                        "gather_gb_per_s": gigabytes / gather_s,
                        "ratio": copy_s / gather_s,
                    }
                )
    return found


def _messages(rounds: int) -> list[dict[str, Any]]:
    """A short request, a conversation of 2000 tokens, nine slices at 448; and an answer of 500 tokens."""
    n_pixels = 448 * 448 * 3
    requests = (
        ("empty", 1, b"", 0),
        ("2000 token ids", 1, list(range(150_000, 152_000)), 10_000),
        ("9 slices of 448", 1, [bytes(n_pixels)] * 9, 9 * n_pixels),
        ("500 events", 500, b"", 0),
    )
    worker = Worker(echo.__name__, {}, name="echo")
    ours_end, theirs = socket.socketpair()
    bare = subprocess.Popen(
        [sys.executable, "-c", _BARE, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()

    def ask(data: Any, n: int) -> None:
        for _ in worker.call({"data": data, "n_events": n}, silence_s=60):
            pass

    def ask_bare(size: int, n: int) -> None:
        ours_end.sendall(size.to_bytes(4, "little") + n.to_bytes(4, "little") + bytes(size))
        left = 40 * n
        while left:
            data = ours_end.recv(1 << 16)
            if not data:
                raise RuntimeError("the process at the other end of the bare socket ended")
            left -= len(data)

    found = []
    try:
        for name, n_events, data, size in requests:
            ask(data, n_events)
            ask_bare(size, n_events)
            ours_s, bare_s = medians(
                lambda d=data, n=n_events: ask(d, n),  # type: ignore[misc]
                lambda s=size, n=n_events: ask_bare(s, n),  # type: ignore[misc]
                rounds=5 * rounds,
            )
            found.append({"request": name, "ms": 1000 * ours_s, "bare_ms": 1000 * bare_s, "ratio": ours_s / bare_s})
    finally:
        ours_end.close()
        bare.wait()
        worker.close()
    return found


_ANSWER = """
import sys, mmchat
from mmchat.bench.pictures import draw
with mmchat.open(sys.argv[1], store=sys.argv[2]) as rt:
    rt.session().ask("Describe the image.", [draw(1)][:int(sys.argv[3])], max_new_tokens=1).text
"""


def _start(model: str, rounds: int) -> list[dict[str, Any]]:
    def answer(n_images: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _python(_ANSWER, model, folder, str(n_images))

    whats: list[tuple[str, Callable[[], object]]] = [
        ("an interpreter that does nothing", lambda: _python("pass")),
        ("import mmchat", lambda: _python("import mmchat")),
        ("mmchat --help", lambda: _python("from mmchat.cli import main; main()", "--help")),
        ("first token, a question alone", lambda: answer(0)),
        ("first token, a picture and an empty store", lambda: answer(1)),
    ]
    taken = medians(*(what for _, what in whats), rounds=rounds)
    return [{"what": name, "s": seconds} for (name, _), seconds in zip(whats, taken, strict=True)]


_PEAK = """
import json, sys
def peak_mb(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmHWM:"):  # the largest resident size so far
            return int(line.split()[1]) * 1024 / 1e6
"""
_NOTHING = _PEAK + "print(peak_mb('self'))"
_CHAT = (
    _PEAK
    + """
import mmchat
from mmchat.bench.script import N_TURNS, say
with mmchat.open(sys.argv[1], store=sys.argv[2]) as rt:
    session = rt.session()
    for turn in range(N_TURNS):
        say(session, turn)
    pids = {"program": "self", "LLM worker": rt.llm.worker.pid, "vision worker": rt.vision.worker.pid}
    print(json.dumps({name: peak_mb(pid) for name, pid in pids.items()}))
"""
)


def _memory(model: str) -> list[dict[str, Any]]:
    runs = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            alone = {"an interpreter that does nothing": json.loads(_python(_NOTHING))}
            runs.append({**alone, **json.loads(_python(_CHAT, model, folder))})
    return [{"process": name, "peak_mb": statistics.median(run[name] for run in runs)} for name in runs[0]]


def _python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineError(f"a program that was to be measured failed ({last})")
    return done.stdout
