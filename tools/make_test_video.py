"""Make a video whose every moment is known: scenes of one large shape, some with a number, held for 2 to 6 seconds.

    python tools/make_test_video.py VIDEO [--seconds 600] [--fps 25] [--size 224x168] [--seed 0]

What is to be seen when is written beside it, to VIDEO.json: [{start, end, background, shape, color, number}], seconds.
The container is what the name says (.mp4, .mkv, .avi, .ts); the codec is H.264, nearly lossless.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL.Image import Image

from tools.render_scenes import COLORS, SHAPES, Size, draw, plain_scene

_ALIKE = ({"orange", "red"}, {"orange", "yellow"}, {"gray", "white"}, {"gray", "black"})


@dataclass(frozen=True)
class Held:
    """A scene on the screen: from start until end, in seconds.  number: what is printed, or ""."""

    start: float
    end: float
    background: str
    shape: str
    color: str
    number: str


def scenes(seconds: float, *, fps: int = 25, seed: int = 0, hold: tuple[float, float] = (2, 6)) -> list[Held]:
    """Neighbours differ in their background.  hold: seconds that a scene stays, from and to."""
    rng = Random(f"test video {seed}")
    made: list[Held] = []
    n_frames, frame = round(seconds * fps), 0
    while frame < n_frames:
        last = made[-1].background if made else ""
        background = rng.choice([color for color in COLORS if color != last])
        color = rng.choice([c for c in COLORS if c != background and {c, background} not in _ALIKE])
        number = str(rng.randrange(10, 1000)) if rng.random() < 0.5 else ""
        end = min(n_frames, frame + max(1, round(rng.uniform(*hold) * fps)))
        made.append(Held(frame / fps, end / fps, background, rng.choice(SHAPES), color, number))
        frame = end
    return made


def picture(held: Held, size: Size, radius: float = 0.28) -> Image:
    """radius: of the shape, in parts of the shorter side."""
    position = "top" if held.number else "center"
    shape = (held.color, held.shape, position)
    return draw(plain_scene(size, held.background, [shape], text=held.number, font_px=20, radius=radius))


def write(path: Path, made: list[Held], *, fps: int = 25, size: Size = (224, 168), seed: int = 0) -> None:
    """The video, and the list beside it."""
    rng = Random(f"sizes {seed}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "10", "preset": "veryfast"}
        number = 0
        for held in made:
            pixels = np.asarray(picture(held, size, rng.uniform(0.2, 0.3)))
            for _ in range(round((held.end - held.start) * fps)):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts, number = number, number + 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.with_name(f"{path.name}.json").write_text(json.dumps([asdict(held) for held in made]))


def at(made: list[Held], time: float) -> Held:
    """What is on the screen."""
    return next(held for held in made if held.start - 1e-6 <= time < held.end - 1e-6)


def read(path: Path) -> list[Held]:
    """The list of a video that write made."""
    return [Held(**values) for values in json.loads(path.with_name(f"{path.name}.json").read_text())]


def _size(text: str) -> Size:
    width, height = text.split("x")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=_size, default=(224, 168))
    given = parser.parse_args()
    made = scenes(given.seconds, fps=given.fps, seed=given.seed)
    write(given.video, made, fps=given.fps, size=given.size, seed=given.seed)
    print(f"{given.video}: {len(made)} scenes in {given.seconds} s, {given.video.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
