"""Measure the host's part: cutting large pictures and gathering embedding rows, each against a plain baseline.

    python tools/measure_host.py

Ours and the baseline alternate in one run, so that the ratios hold on a busy machine; medians of 15.  Results are
recorded in benchmarks/host.md.
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmchat.checkpoint import to_float32, write_tensors
from mmchat.embed_table import EmbedTable
from mmchat.images import open_image
from mmchat.slicing import plan_slices, slice_image

ROUNDS = 15


def plain_pil(data: bytes) -> list[NDArray[np.uint8]]:
    """The reference's steps, as anybody would write them."""
    Image.MAX_IMAGE_PIXELS = None
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


def jpeg(width: int, height: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def medians(*functions: Callable[[], object]) -> list[float]:
    """Seconds of each, taken in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    print("| JPEG | plain PIL ms | reference_pixels ms | ratio | default ms | ratio | PSNR dB |")
    print("|---|---|---|---|---|---|---|")
    for width, height in ((1920, 1080), (4000, 3000), (8000, 6000), (12000, 9000)):
        data = jpeg(width, height)
        expected = plain_pil(data)
        assert psnr(expected, ours(data, reference=True)) == math.inf, "the reference's pixels differ"
        plain, exact, fast = medians(
            lambda d=data: plain_pil(d),  # type: ignore[misc]
            lambda d=data: ours(d, reference=True),  # type: ignore[misc]
            lambda d=data: ours(d),  # type: ignore[misc]
        )
        print(
            f"| {width}x{height} | {1000 * plain:.0f} | {1000 * exact:.0f} | {exact / plain:.2f} "
            f"| {1000 * fast:.0f} | {fast / plain:.2f} | {psnr(expected, ours(data)):.1f} |"
        )

    print("\n| table | rows | memcpy GB/s | gather GB/s | ratio |\n|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40_000, 3584), dtype=np.float32) * np.float32(0.02)
    stored: dict[str, NDArray[np.generic]] = {
        "F16": values.astype(np.float16),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "F32": values,
    }
    with tempfile.TemporaryDirectory() as folder:
        for dtype, array in stored.items():
            path = Path(folder) / "table.safetensors"
            write_tensors(path, {"embed_tokens.weight": (dtype, array.shape, [array.tobytes()])})
            table = EmbedTable.open(path)
            for n in (1000, 4000):
                ids = rng.integers(0, table.n_ids, n)
                out, source = np.empty((n, 3584), np.float32), np.ones((n, 3584), np.float32)
                assert np.array_equal(table.rows(ids, out), to_float32(array[ids]))
                copy, gather = medians(
                    lambda o=out, s=source: np.copyto(o, s),  # type: ignore[misc]
                    lambda o=out, i=ids, t=table: t.rows(i, o),  # type: ignore[misc]
                )
                size = out.nbytes / 1e9
                print(f"| {dtype} | {n} | {size / copy:.2f} | {size / gather:.2f} | {copy / gather:.2f} |")


if __name__ == "__main__":
    main()
