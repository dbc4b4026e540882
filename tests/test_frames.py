"""frames: messages arrive whole and in order however the bytes do; a broken peer is told apart from a silent one."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmchat import frames
from mmchat.frames import Channel, FrameError, PeerGone, pack

messages = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=10)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def drain(channel: Channel) -> None:
    while True:
        channel.receive(5)


@given(values=st.lists(messages, max_size=5), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_messages_split_anywhere_arrive_whole(values: list[Any], cuts: list[int]) -> None:
    """Whatever the pieces they come in; between pieces receive() says that nothing is there yet."""
    data = b"".join(map(pack, values))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, got = Channel(ours), []
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, end in itertools.pairwise(edges):
            theirs.sendall(data[start:end])
            try:
                while True:
                    got.append(channel.receive(0))
            except TimeoutError:
                pass
        assert got == values
        theirs.close()
        with pytest.raises(PeerGone):
            channel.receive()


def test_both_ends_at_once() -> None:
    """A large message each way, more than the socket holds, with one thread sending while another receives."""
    left, right = (Channel(sock) for sock in socket.socketpair())
    large = {"pixels": bytes(range(256)) * 20_000, "n": 7}
    senders = [threading.Thread(target=channel.send, args=(large,)) for channel in (left, right)]
    for thread in senders:
        thread.start()
    assert left.receive(20) == right.receive(20) == large
    for thread in senders:
        thread.join()
    left.close()
    right.close()


def test_bytes_and_text_are_told_apart(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    Channel(peer).send([b"a", "a"])
    assert channel.receive(5) == [b"a", "a"]


def test_the_bound_holds_on_both_sides(pair: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large is not sent; a length above the bound is refused before its data is waited for."""
    channel, peer = pair
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    Channel(peer).send(b"x" * 98)  # two bytes of msgpack's own: exactly the bound
    assert channel.receive(5) == b"x" * 98
    with pytest.raises(FrameError, match="a message of 101 bytes is over the bound of 100"):
        channel.send(b"x" * 99)
    peer.sendall(struct.pack(">I", 101))
    with pytest.raises(FrameError, match="a frame of 101 bytes is over the bound"):
        channel.receive(5)


@given(st.binary(min_size=5, max_size=60))
def test_garbage_is_a_frame_error_or_a_value(data: bytes) -> None:
    """Random bytes, then the end: some values, at last FrameError or PeerGone; never anything else."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        theirs.sendall(data)
        theirs.close()
        with pytest.raises((FrameError, PeerGone)):
            drain(channel)


@given(st.binary(max_size=40))
def test_a_frame_of_garbage(body: bytes) -> None:
    """The same within a frame of the right length; the stream goes on after it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        theirs.sendall(struct.pack(">I", len(body)) + body + pack("next"))
        try:
            channel.receive(5)
        except FrameError as error:
            assert "not msgpack" in str(error)  # noqa: PT017
        assert channel.receive(5) == "next"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",  # never used in msgpack
        b"\x01\x02",  # two values
        b"\xa5ab",  # a text shorter than it says
        b"\xa2\xff\xfe",  # a text that is not UTF-8
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
        b"\xdd\xff\xff\xff\xff",
        b"\x81\x01\x02",  # a map with a number for a key
        b"\x91" * 100_000,  # deeper than anything we send
        b"\xd4\x05\x00",  # an extension type: passed on as a value or refused, never run
    ],
)
def test_frames_that_are_no_message(pair: tuple[Channel, socket.socket], body: bytes) -> None:
    channel, peer = pair
    sender = threading.Thread(target=peer.sendall, args=(struct.pack(">I", len(body)) + body,))
    sender.start()
    if body.startswith(b"\xd4"):
        assert type(channel.receive(5)).__name__ == "ExtType"
    else:
        with pytest.raises(FrameError, match="not msgpack"):
            channel.receive(5)
    sender.join()


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 20])
def test_a_peer_gone_in_mid_frame(pair: tuple[Channel, socket.socket], n: int) -> None:
    """After what arrived whole has been received."""
    channel, peer = pair
    peer.sendall(pack("whole") + pack("y" * 30)[:n])
    peer.close()
    assert channel.receive(5) == "whole"
    for _ in range(2):
        with pytest.raises(PeerGone):
            channel.receive(5)


def test_sending_to_nobody(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    peer.close()
    with pytest.raises(PeerGone):
        channel.send("x")


def test_a_channel_closed_here(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    channel.close()
    channel.close()
    with pytest.raises(PeerGone):
        channel.send("x")


def test_a_timeout_keeps_what_has_arrived(pair: tuple[Channel, socket.socket]) -> None:
    """Byte by byte, each time asking too early."""
    channel, peer = pair
    data = pack({"a": [1, 2, 3]})
    for byte in data[:-1]:
        peer.sendall(bytes([byte]))
        with pytest.raises(TimeoutError):
            channel.receive(0)
    peer.sendall(data[-1:])
    assert channel.receive(0) == {"a": [1, 2, 3]}


def test_a_timeout_takes_as_long_as_it_says(pair: tuple[Channel, socket.socket]) -> None:
    """Also where bytes keep coming: the deadline is the message's, not each byte's."""
    channel, peer = pair
    stop = threading.Event()

    def drip() -> None:
        peer.sendall(struct.pack(">I", 1000))
        while not stop.wait(0.01):
            peer.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.receive(0.15)
    taken = time.monotonic() - began
    stop.set()
    dripping.join()
    assert 0.14 <= taken < 20
