"""Sources: what a user can name, and what files do that are odd, damaged or hostile."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from mmchat.errors import ImageError, VideoError
from mmchat.images import read_image
from mmchat.video import Arrays, open_source
from mmchat.video.decoding import public
from tests.video_kit import COLOURS, colour, distinct, frames_of, make_video, many


def corner_video(path: Path, **how: Any) -> Path:
    """25 blue frames, red in the top left corner; wider than high."""
    picture = colour("blue", (64, 32))
    picture.paste("red", (0, 0, 24, 12))
    return make_video(path, [picture] * 25, **how)


def near(image: Image.Image, place: tuple[int, int]) -> str:
    pixel = image.getpixel(place)
    assert isinstance(pixel, tuple)
    named = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    return min(named, key=lambda name: sum(abs(a - b) for a, b in zip(pixel, named[name], strict=True)))


# What can be named


def test_pictures_of_a_folder_come_as_people_count(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame2.PNG", "frame1.jpg"):
        colour("red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    for source in (tmp_path, tmp_path / "frame*", str(tmp_path / "**" / "*")):
        opened = open_source(source)
        frames, notices = frames_of(opened)
        assert [frame.name for frame in frames] == ["frame1.jpg", "frame2.PNG", "frame10.png"]
        assert [(frame.time, frame.duration) for frame in frames] == [(0, 1), (1, 1), (2, 1)]
        assert (opened.length, opened.live, notices) == (3, False, [])


def test_a_file_may_look_like_a_glob(tmp_path: Path) -> None:
    colour("red").save(tmp_path / "a[1].png")
    make_video(tmp_path / "b*.mkv", [colour("red")] * 3)
    assert [frame.name for frame in frames_of(open_source(tmp_path / "a[1].png"))[0]] == ["a[1].png"]
    assert len(frames_of(open_source(tmp_path / "b*.mkv"))[0]) == 3


def test_a_picture_that_is_broken_is_known_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    [frame] = frames_of(open_source(tmp_path))[0]
    with pytest.raises(ImageError, match=r"a\.png"):
        frame.read()


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_an_impossible_rate(rate: float) -> None:
    with pytest.raises(VideoError, match="above 0"):
        Arrays([], rate=rate)


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3), (40, 60, 4)])
def test_one_picture_is_no_list_of_them(shape: tuple[int, ...]) -> None:
    with pytest.raises(VideoError, match="is one picture: give a list"):
        open_source(np.zeros(shape, np.uint8))
    assert len(frames_of(open_source(np.zeros((2, *shape[:2], 3), np.uint8)))[0]) == 2
    assert len(frames_of(open_source(np.array(["a.png", "b.png"])))[0]) == 2


def test_a_time_that_is_none_costs_its_picture() -> None:
    frames, notices = frames_of(Arrays([(0.0, colour("red")), (float("nan"), colour("blue")), (1.0, colour("white"))]))
    assert [frame.time for frame in frames] == [0, 1]
    assert "picture 1 skipped: its time is nan" in str(notices[0])


def test_an_iterator_gives_times_or_gets_them() -> None:
    frames, _ = frames_of(open_source([distinct(0), colour("red"), (7.5, distinct(2))]))
    assert [frame.time for frame in frames] == [0, 1, 7.5]
    assert [frame.read().size for frame in frames] == [(28, 28), (56, 42), (28, 28)]
    assert [frame.time for frame in frames_of(Arrays(map(distinct, range(3)), rate=4))[0]] == [0, 0.25, 0.5]


def test_seconds_may_be_numpys() -> None:
    frames, _ = frames_of(open_source([(np.float32(1.5), distinct(0)), (np.int64(3), distinct(1))]))
    assert [(frame.time, frame.read().size) for frame in frames] == [(1.5, (28, 28)), (3.0, (28, 28))]


def test_an_iterator_may_use_one_picture_for_all(tmp_path: Path) -> None:
    """As PIL's own ImageSequence does, and cameras that fill one buffer."""
    names = ["red", "green", "blue"]
    colour("red").save(tmp_path / "a.gif", save_all=True, append_images=[colour(name) for name in names[1:]])
    wanted = [np.asarray(colour(name)).tolist() for name in names]
    with Image.open(tmp_path / "a.gif") as gif:
        frames, _ = frames_of(Arrays(ImageSequence.Iterator(gif)))
        assert [np.asarray(frame.read()).tolist() for frame in frames] == wanted

    def camera() -> Iterator[Any]:
        buffer = np.zeros((42, 56, 3), np.uint8)
        canvas = Image.new("RGB", (56, 42))
        for name in names:
            buffer[:] = np.asarray(colour(name))
            yield buffer
            canvas.paste(name, (0, 0, 56, 42))
            yield canvas

    frames, _ = frames_of(Arrays(camera()))
    assert [np.asarray(frame.read()).tolist() for frame in frames] == [one for one in wanted for _ in range(2)]


def test_a_picture_that_is_only_opened_is_decoded_when_it_is_read(tmp_path: Path) -> None:
    colour("red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    opened, damaged = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data[: len(data) // 2]))
    frames, _ = frames_of(Arrays([opened, damaged]))
    assert opened.tile  # not yet decoded
    assert near(frames[0].read(), (5, 5)) == "red"
    with pytest.raises(ImageError, match="truncated or damaged"):
        frames[1].read()


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_a_damaged_animation_is_what_it_is_by_itself_and_ends_nothing(kind: str) -> None:
    def seen(read: Callable[[], Image.Image]) -> bytes | None:
        try:
            return read().tobytes()
        except ImageError:
            return None

    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 80, 3), np.uint8)) for i in range(3)]
    file = io.BytesIO()
    pages[0].save(file, kind, save_all=True, append_images=pages[1:])
    whole = file.getvalue()
    sources = [whole[:at] + bytes(20) + whole[at + 20 :] for at in range(1000, len(whole), 700)]
    found = []
    for source in [*sources, whole[: len(whole) // 3], whole[: len(whole) // 3 * 2]]:
        frames, _ = frames_of(Arrays([Image.open(io.BytesIO(source)), colour("red")]))
        assert near(frames[1].read(), (5, 5)) == "red"
        found.append(seen(frames[0].read))
        assert found[-1] == seen(partial(read_image, Image.open(io.BytesIO(source))))
    assert None in found


def test_the_format_of_a_picture_is_not_lost_on_the_way(tmp_path: Path) -> None:
    """Of a 16-bit PGM PIL makes the same as of a 32-bit picture, and only its format tells."""
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 0, 200))
    with Image.open(tmp_path / "a.pgm") as picture:
        picture.load()
        frames, _ = frames_of(Arrays([picture]))
        assert np.asarray(frames[0].read())[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nothing.mp4", "nothing.mp4: no such file"),
        ("*.png", "no pictures there"),
        ("folder", "no pictures there"),
        ("empty.mp4", "empty.mp4"),
        ("text.mp4", "text.mp4"),
        ("sound.mkv", "holds no moving pictures"),
        ("ftp://host/a.mp4", "ftp:// is not known"),
        ("concat://a|b", "concat:// is not known"),
        ("nul\0.mp4", "no such file|cannot be read"),
        (b"bytes", "not bytes"),
        (7, "not int"),
    ],
)
def test_what_is_no_source_says_so(source: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    with av.open("sound.mkv", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=told) as raised:
        open_source(source)
    assert "\n" not in str(raised.value)


def test_without_av_pictures_go_and_videos_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mkv", [colour("red")] * 3)
    colour("red").save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(frames_of(open_source(tmp_path))[0]) == 1
    for source in (str(tmp_path / "a.mkv"), "/dev/video0", "rtsp://127.0.0.1/"):
        with pytest.raises(VideoError, match=r"pip install av"):
            open_source(source)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://user:secret@camera:554/live?x=1", "rtsp://user:***@camera:554/live?x=1"),
        ("rtsp://camera/live", "rtsp://camera/live"),
        ("http://a:b:c@host/", "http://a:***@host/"),
    ],
)
def test_passwords_are_not_shown(address: str, shown: str) -> None:
    assert public(address) == shown


def test_the_password_of_an_address_that_fails_is_not_shown() -> None:
    with pytest.raises(VideoError) as raised:
        open_source("http://user:secret@127.0.0.1:9/video")
    assert "secret" not in str(raised.value)
    assert "127.0.0.1:9" in str(raised.value)


# Videos


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv444p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_a_video_has_its_frames_and_times(name: str, codec: str, form: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / name, [colour(COLOURS[i // 10]) for i in range(50)], codec=codec, form=form)
    source = open_source(path)
    frames, notices = frames_of(source)
    assert [frame.index for frame in frames] == list(range(50))
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(50)], abs=0.011)
    assert notices == []
    assert source.length == pytest.approx(2, abs=0.1)
    assert source.times() == pytest.approx([frame.time for frame in frames], abs=1e-6)
    assert frames[-1].duration == pytest.approx(1 / 25, abs=0.011)
    assert frames[25].read().size == (56, 42)


@pytest.mark.parametrize("times", [2, 3])
def test_recordings_in_a_row_have_the_times_that_their_frames_are_shown_at(times: int, tmp_path: Path) -> None:
    """`cat a.ts a.ts`: the numbers begin anew."""
    path = make_video(tmp_path / "a.ts", [colour(COLOURS[i // 10]) for i in range(50)])
    path.write_bytes(path.read_bytes() * times)
    source = open_source(path)
    frames, _ = frames_of(source)
    assert len(frames) == 50 * times
    assert source.times() == pytest.approx([frame.time for frame in frames], abs=0.05)


def test_a_variable_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    ticks = [0, 1, 2, 50, 51, 200, 500]
    for name in ("a.mkv", "a.mp4"):
        path = make_video(tmp_path / name, [distinct(i, (64, 48)) for i in range(7)], ticks=ticks)
        frames, _ = frames_of(open_source(path))
        assert [frame.time for frame in frames] == pytest.approx([tick / 25 for tick in ticks], abs=0.002)


def test_odd_sizes_keep_every_pixel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in ((101, 57), (1, 1), (17, 300)):
        pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        path = make_video(tmp_path / "odd.mkv", [pixels] * 2, codec="ffv1", form="bgr0")
        [first, _] = frames_of(open_source(path))[0]
        assert np.array_equal(np.asarray(first.read()), pixels)


# The matrix of a track, 16.16 fixed point: a b u, c d v, x y w (ISO/IEC 14496-12); x' = a x + c y.
_ONE = 1 << 16
_MATRICES = {
    0: (_ONE, 0, 0, _ONE),
    90: (0, _ONE, -_ONE, 0),  # clockwise, as a phone held upright writes it
    180: (-_ONE, 0, 0, -_ONE),
    270: (0, -_ONE, _ONE, 0),
}


@pytest.mark.parametrize(("degrees", "red_at"), [(0, (4, 4)), (90, (27, 4)), (180, (60, 28)), (270, (4, 60))])
def test_rotation_metadata_is_followed(degrees: int, red_at: tuple[int, int], tmp_path: Path) -> None:
    path = corner_video(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    matrix = header + (40 if data[header] == 0 else 52)
    a, b, c, d = _MATRICES[degrees]
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    image = frames_of(open_source(path))[0][0].read()
    assert image.size == ((64, 32) if degrees % 180 == 0 else (32, 64))
    assert near(image, red_at) == "red"
    assert [near(image, place) for place in ((4, 4), (27, 4), (4, 28), (16, 16))].count("red") == (degrees in (0, 90))


def test_a_frame_that_is_damaged_is_skipped_and_told(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mov", [distinct(i, (64, 48)) for i in range(20)], codec="png", form="rgb24")
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"IHDR"]
    for number in (7, 8):
        data[starts[number] + 4 : starts[number] + 8] = bytes(4)  # no width
    path.write_bytes(data)
    frames, notices = frames_of(open_source(path))
    assert [frame.index for frame in frames] == [*range(7), *range(9, 20)]
    assert [frame.time for frame in frames] == pytest.approx([frame.index / 25 for frame in frames], abs=1e-3)
    assert len(notices) == 2
    assert all(notice.bad_frame and "skipped" in notice.text for notice in notices)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("whole")
    pictures = [distinct(i, (96, 64)) for i in range(60)]
    flags = {"movflags": "faststart"}
    with av.open(str(folder / "a.mp4"), "w", options=flags) as container:  # the index before the pictures
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return [
        folder / "a.mp4",
        make_video(folder / "b.mkv", pictures),
        make_video(folder / "c.ts", pictures),
        make_video(folder / "d.avi", pictures, codec="mpeg4"),
        make_video(folder / "e.avi", pictures, codec="mjpeg", form="yuvj420p"),
    ]


def survives(path: Path, n_most: int) -> int:
    """Frames that can be read; anything but frames, notices and VideoError is a failure."""
    try:
        source = open_source(path)
        source.times()
        frames, _ = frames_of(source)
    except VideoError:
        return 0
    assert len(frames) <= n_most
    for frame in frames:
        assert frame.read().size == (96, 64)
    return len(frames)


def test_a_file_that_is_cut_anywhere_gives_what_is_left(whole: list[Path], tmp_path: Path) -> None:
    rng = random.Random(7)
    read = 0
    for path in whole:
        data = path.read_bytes()
        for _ in range(many(4, 100)):
            cut = tmp_path / path.name
            cut.write_bytes(data[: rng.randrange(len(data))])
            read += survives(cut, 60)
    assert read > 60


def test_damage_anywhere_is_survived(whole: list[Path], tmp_path: Path) -> None:
    rng = random.Random(8)
    for path in whole:
        for _ in range(many(2, 100)):
            data = bytearray(path.read_bytes())
            for _ in range(rng.randrange(1, 40)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            bad = tmp_path / path.name
            bad.write_bytes(data)
            try:
                source = open_source(bad)
                frames, _ = frames_of(source)
            except VideoError:
                continue
            for frame in frames[:5]:
                with contextlib.suppress(VideoError):
                    frame.read()


def test_a_cut_file_says_how_much_is_missing(whole: list[Path], tmp_path: Path) -> None:
    data = whole[0].read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    frames, notices = frames_of(open_source(tmp_path / "a.mp4"))
    assert 1 <= len(frames) <= 35
    assert any("of 2.40; it is cut off or damaged" in notice.text for notice in notices)


# Addresses


class Server:
    """Files over HTTP on loopback; what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                file = folder / self.path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                data = file.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                try:
                    self.wfile.write(data)
                except OSError:  # the client has enough
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


def test_a_file_at_an_address_is_a_file(server: Server, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mkv", [colour("red")] * 30)
    source = open_source(f"{server.address}/a.mkv")
    assert not source.live
    assert source.length == pytest.approx(1.2)
    assert len(frames_of(source)[0]) == 30
    with pytest.raises(VideoError, match="404"):
        open_source(f"{server.address}/b.mkv")


def test_a_file_cannot_make_us_fetch_anything(server: Server, tmp_path: Path) -> None:
    """A playlist is a list of addresses: one on disk stays on the disk."""
    make_video(tmp_path / "a.ts", [colour("red")] * 30)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{}/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist.format(server.address))
    with pytest.raises(VideoError):
        frames_of(open_source(tmp_path / "list.m3u8"))
    assert server.asked == []
