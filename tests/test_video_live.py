"""Streams and cameras: they stall, break off and come back; whoever is slow gets the newest frame."""

from __future__ import annotations

import contextlib
import errno
import socketserver
import struct
import threading
import time
from collections.abc import Generator, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import pytest

from mmchat.errors import VideoError
from mmchat.video import Arrays, Caption, Frame, Notice, captions, decoding, live, open_source
from mmchat.video.feed import Feed
from tests.video_kit import FakeRuntime, distinct, make_video


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed, and the next try made, sooner than a user would like."""
    monkeypatch.setattr(decoding, "SILENCE_S", 1.0)
    monkeypatch.setattr(live, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(live, "LONGEST_WAIT_S", 0.2)


# A stream over HTTP


class Camera:
    """A stream on loopback.  acts: what each connection does in turn; the last one is repeated.

    "send": frames at their pace, forever.  "drop": some, then it hangs up.  "stall": some, then silence.
    "refuse": 503.  "rubbish": what is no stream.
    """

    def __init__(self, video: Path, acts: list[str]) -> None:
        self.connections: list[str] = []
        self._stop = threading.Event()
        outer, data = self, video.read_bytes()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                act = acts[min(len(outer.connections), len(acts) - 1)]
                outer.connections.append(act)
                if act == "refuse":
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "video/mp2t")
                self.end_headers()
                try:
                    if act == "rubbish":
                        self.wfile.write(b"rubbish " * 5000)
                    while act in ("send", "drop", "stall") and not outer._stop.is_set():
                        for start in range(0, len(data), 188 * 20):
                            self.wfile.write(data[start : start + 188 * 20])
                            if outer._stop.wait(0.01):
                                return
                        if act != "send":
                            break
                    if act == "stall":
                        outer._stop.wait(60)
                except OSError:
                    pass

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/live"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return make_video(tmp_path / "a.ts", [distinct(i, (96, 64)) for i in range(75)], g="10")


@pytest.mark.usefixtures("impatient")
def test_a_stream_that_stalls_drops_and_comes_back(video: Path, tmp_path: Path) -> None:
    camera = Camera(video, ["drop", "refuse", "rubbish", "stall", "refuse", "send"])
    notices: list[str] = []
    try:
        running = captions(
            FakeRuntime(tmp_path / "store").rt, camera.address, every=0, on_notice=notices.append, max_new_tokens=1
        )
        got: list[Caption] = []
        deadline = time.monotonic() + 120
        while "send" not in camera.connections or len(got) < 10:
            got.append(next(running))
            assert time.monotonic() < deadline
        after = [next(running) for _ in range(3)]
        running.close()
    finally:
        camera.close()
    every = [*got, *after]
    assert [caption.index for caption in every] == sorted({caption.index for caption in every})
    assert [caption.time for caption in every] == sorted({caption.time for caption in every})
    assert all(caption.at is not None for caption in every)
    told = " ".join(notices)
    assert told.count(camera.address) == len(notices)
    assert "Server returned 5XX" in told
    assert "no answer in time; trying again" in told
    assert not [thread for thread in threading.enumerate() if thread.name == "mmchat-feed"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("act", ["refuse", "rubbish", "stall"])
def test_a_stream_that_never_works_is_an_error_at_once(act: str, tmp_path: Path) -> None:
    (tmp_path / "nothing.ts").touch()
    camera = Camera(tmp_path / "nothing.ts", [act])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "OPEN_S", 1.0)
        try:
            with pytest.raises(VideoError, match=f"^{camera.address}"):
                open_source(camera.address)
        finally:
            camera.close()


class RtspCamera:
    """RTSP on loopback, as little of RFC 2326 as plays: a transport stream in RTP over the same connection.

    It wants a password in the address, hangs up after the whole video, and may be asked again.
    """

    def __init__(self, video: Path) -> None:
        self.requests: list[str] = []
        outer, data = self, video.read_bytes()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while request := self.rfile.readline().decode().strip():
                    headers = dict(iter(lambda: self._header(), ("", "")))
                    outer.requests.append(request.split()[0])
                    self._answer(request.split()[0], headers)
                    if request.startswith("PLAY"):
                        self._play()
                        return

            def _header(self) -> tuple[str, str]:
                name, _, value = self.rfile.readline().decode().partition(":")
                return name.strip().lower(), value.strip()

            def _answer(self, method: str, headers: dict[str, str]) -> None:
                sdp = (
                    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
                )
                more = {
                    "OPTIONS": "Public: DESCRIBE, SETUP, PLAY\r\n",
                    "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n",
                    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
                    "PLAY": "Session: 1\r\n",
                }[method]
                status = "200 OK"
                if "authorization" not in headers and method == "DESCRIBE":
                    status, more, sdp = "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n', ""
                head = f"RTSP/1.0 {status}\r\nCSeq: {headers['cseq']}\r\n{more}\r\n"
                self.wfile.write((head + (sdp if method == "DESCRIBE" else "")).encode())

            def _play(self) -> None:
                with contextlib.suppress(OSError):
                    for number, start in enumerate(range(0, len(data), 188 * 7)):
                        rtp = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 900, 1)
                        packet = rtp + data[start : start + 188 * 7]
                        self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                        time.sleep(0.005)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"rtsp://user:secret@127.0.0.1:{self._server.server_address[1]}/live"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.usefixtures("impatient")
def test_an_rtsp_stream_is_read_and_asked_for_again(video: Path, tmp_path: Path) -> None:
    camera = RtspCamera(video)
    notices: list[str] = []
    try:
        running = captions(
            FakeRuntime(tmp_path / "store").rt, camera.address, every=0, on_notice=notices.append, max_new_tokens=1
        )
        got: list[Caption] = []
        deadline = time.monotonic() + 120
        while camera.requests.count("PLAY") < 3:
            got.append(next(running))
            assert time.monotonic() < deadline
        running.close()
    finally:
        camera.close()
    assert len(got) > 3
    assert [caption.index for caption in got] == sorted({caption.index for caption in got})
    assert sum("trying again in" in notice for notice in notices) >= 1
    assert not any("secret" in notice for notice in notices)


# A camera, at the boundary to PyAV: no test machine has one


class _Packet:
    def __init__(self, frames: list[av.VideoFrame] | Exception) -> None:
        self._frames = frames

    def decode(self) -> list[av.VideoFrame]:
        if isinstance(self._frames, Exception):
            raise self._frames
        return self._frames


class _Container:
    """What PyAV opens: some frames of a device, then the way it ends."""

    duration = None

    def __init__(self, numbers: range, end: Exception | None) -> None:
        self.closed = False
        self._numbers, self._end = numbers, end

        class Stream:
            codec_context = type("Codec", (), {"options": {}})()
            average_rate, time_base, start_time, duration = None, Fraction(1, 1000), None, None

        self.streams = type("Streams", (), {"video": [Stream()]})()

    def demux(self, stream: object) -> Iterator[_Packet]:
        for number in self._numbers:
            if number == 2:
                yield _Packet(av.InvalidDataError(1, "Invalid data found when processing input"))
            yield _Packet([av.VideoFrame.from_ndarray(distinct(number), "rgb24")])
            time.sleep(0.002)
        if self._end:
            raise self._end

    def close(self) -> None:
        self.closed = True


@pytest.mark.usefixtures("impatient")
def test_a_camera_that_vanishes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = OSError(errno.ENODEV, "No such device")
    opened: list[_Container] = []
    script: list[_Container | Exception] = [
        _Container(range(5), gone),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        OSError(errno.EBUSY, "Device or resource busy"),
        _Container(range(10, 15), None),
        _Container(range(20, 100_000), None),
    ]

    def fake_open(place: str, **how: Any) -> _Container:
        assert (place, how["format"]) == ("/dev/video0", "v4l2")
        made = script.pop(0)
        if isinstance(made, Exception):
            raise made
        opened.append(made)
        return made

    monkeypatch.setattr(av, "open", fake_open)
    notices: list[str] = []
    running = captions(
        FakeRuntime(tmp_path / "store").rt, "/dev/video0", every=0, on_notice=notices.append, max_new_tokens=1
    )
    got = [next(running)]
    while got[-1].index < 20:
        got.append(next(running))
    running.close()
    assert all(container.closed for container in opened)
    assert [caption.index for caption in got] == sorted({caption.index for caption in got})
    told = [notice for notice in notices if "trying again" in notice]
    assert [word for word in ("No such device", "No such file", "busy", "it ended") if word in " ".join(told)] == [
        "No such device",
        "No such file",
        "busy",
        "it ended",
    ]
    waits = [float(notice.split()[-2]) for notice in told]
    assert waits == [0.05, 0.1, 0.2, 0.05]
    assert any("frame 2 skipped: Invalid data" in notice for notice in notices)


# The newest wins


def test_of_a_live_source_every_frame_is_captioned_or_counted(tmp_path: Path) -> None:
    """Frames come while answers are made; each is asked about or passed over, once."""
    fake = FakeRuntime(tmp_path / "store")
    seen: list[int] = []
    deadline = time.monotonic() + 60

    def frames() -> Iterator[Any]:
        for number in range(300):
            seen.append(number)
            while number == 250 and fake.engine.n_requests < 3 and time.monotonic() < deadline:
                time.sleep(0.01)  # however slow the machine is
            time.sleep(0.001)
            yield distinct(number)

    made = list(captions(fake.rt, Arrays(frames(), live=True), every=0, max_new_tokens=2))
    assert len(seen) == 300
    assert 2 < len(made) < 300
    for before, caption in zip([None, *made], made, strict=False):
        assert caption.index == (before.index if before else -1) + caption.drops + 1
    assert made[-1].index == 299


def test_a_slow_answer_is_followed_by_the_newest_frame(tmp_path: Path) -> None:
    fake = FakeRuntime(tmp_path / "store")
    fake.engine.gate = threading.Event()
    given, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def frames() -> Iterator[Any]:
        for number in range(8):
            yield distinct(number)
            given.release()
            if number in (0, 6):
                go_on.acquire()

    running = captions(fake.rt, Arrays(frames(), live=True), every=0, max_new_tokens=1)
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(next(running)))
    reader.start()
    given.acquire()
    assert fake.engine.waits.wait(60)  # the first frame is being answered
    go_on.release()
    for _ in range(6):
        given.acquire()
    fake.engine.gate.set()
    reader.join(60)
    got.append(next(running))
    go_on.release()
    got += running
    assert [(caption.index, caption.drops) for caption in got] == [(0, 0), (6, 5), (7, 0)]


def test_windows_of_a_live_source_are_passed_over_whole(tmp_path: Path) -> None:
    def frames() -> Iterator[Any]:
        for number in range(200):
            time.sleep(0.001)
            yield distinct(number)

    made = list(
        captions(FakeRuntime(tmp_path / "s").rt, Arrays(frames(), live=True), every=0, window=4, max_new_tokens=1)
    )
    reached = -4
    for caption in made:
        assert (caption.frames, caption.drops % 4) == (4, 0)
        assert caption.index == reached + 4 + caption.drops
        reached = caption.index
    assert any(caption.drops for caption in made)


def test_max_frames_ends_a_live_source(tmp_path: Path) -> None:
    def forever() -> Iterator[Any]:
        number = 0
        while True:
            time.sleep(0.001)
            yield distinct(number)
            number += 1

    made = list(
        captions(FakeRuntime(tmp_path / "s").rt, Arrays(forever(), live=True), every=0, max_frames=5, max_new_tokens=1)
    )
    assert len(made) == 5


# The thread


def numbers(n: int, log: list[int]) -> Generator[int, None, None]:
    try:
        for i in range(n):
            log.append(i)
            yield i
    finally:
        log.append(-1)


def test_a_feed_runs_so_far_ahead_and_no_further() -> None:
    log: list[int] = []
    feed = Feed(numbers(10, log), depth=3)
    deadline = time.monotonic() + 20
    while len(log) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    assert log == [0, 1, 2]
    assert next(feed) == 0
    feed.close()
    assert log[-1] == -1
    feed.close()


def test_a_feed_raises_what_was_raised_after_what_came_before() -> None:
    def broken() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise VideoError("broken")

    feed = Feed(broken())
    assert [next(feed), next(feed)] == [1, 2]
    with pytest.raises(VideoError, match="broken"):
        next(feed)
    with pytest.raises(StopIteration):
        next(feed)


def test_a_feed_of_the_newest_passes_nothing_light_over() -> None:
    done = threading.Event()

    def items() -> Generator[int, None, None]:
        yield from (0, 1, -1, 2, -2, 3)
        done.set()

    feed = Feed(items(), newest=True, weight=lambda item: max(0, item))
    assert done.wait(20)
    assert list(feed) == [0, -1, -2, 3]
    assert feed.passed_over == 3


def test_notices_do_not_pile_up() -> None:
    done = threading.Event()

    def items() -> Generator[Frame | Notice, None, None]:
        yield from (Notice(str(number)) for number in range(1000))
        done.set()

    feed = Feed(items(), newest=True, weight=lambda item: 0)
    assert done.wait(20)
    assert len(list(feed)) == 100
