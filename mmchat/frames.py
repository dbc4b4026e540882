"""Messages between parent and worker: 4 bytes of length (big-endian), then one msgpack value.

Nothing is ever unpickled; a frame has a size bound; what cannot be decoded is a broken peer, not a crash.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack

# A request's largest part is one slice of pixels: a megabyte or two.
MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct(">I")
# At a time: Python makes room for that much first, which for a megabyte takes longer than a token's message.
_READ_BYTES = 1 << 16


class FrameError(Exception):
    """The peer sent something that is no frame, or one over the bound."""


class PeerGone(Exception):
    """The other end is closed."""


def pack(message: Any) -> bytes:
    """Raises FrameError for a message over the bound, or of what is no message."""
    try:
        data: bytes = msgpack.packb(message, use_bin_type=True)
    except Exception as error:  # of many kinds
        raise FrameError(f"a message that cannot be packed ({error})") from None
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(data):,} bytes is over the bound of {MAX_FRAME_BYTES:,}")
    return _LENGTH.pack(len(data)) + data


class Channel:
    """Frames over a connected stream socket.  One thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()  # not select(): a host program may have more than 1024 files open
        self._poll.register(sock, select.POLLIN)
        self._room = select.poll()
        self._room.register(sock, select.POLLOUT)
        self._buffer = bytearray()

    def send(self, message: Any) -> None:
        """Blocks while the peer does not read.  Raises PeerGone, FrameError."""
        self.send_packed(pack(message))

    def send_packed(self, data: bytes, may_wait: Callable[[], bool] = lambda: True) -> None:
        """Send what pack made.

        may_wait: asked ten times a second while the peer does not read.  Raises PeerGone; TimeoutError where it says
        no: then the peer has part of a frame, and the channel is of no use any more.
        """
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if not self._room.poll(100) and not may_wait():
                    raise TimeoutError from None
            except OSError:
                raise PeerGone from None

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message.  Raises PeerGone, FrameError, TimeoutError (what has arrived so far is kept)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._take()) is _NOTHING:
            wait = None if deadline is None else 1000 * max(0.0, deadline - time.monotonic())
            if not self._poll.poll(wait):
                raise TimeoutError
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError:
                data = b""
            if not data:
                raise PeerGone
            self._buffer += data
        return message

    def close(self) -> None:
        self._socket.close()

    def _take(self) -> Any:
        if len(self._buffer) < _LENGTH.size:
            return _NOTHING
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length:,} bytes is over the bound of {MAX_FRAME_BYTES:,}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return _NOTHING
        try:
            with memoryview(self._buffer) as buffer, buffer[_LENGTH.size : end] as data:
                return msgpack.unpackb(data, raw=False, strict_map_key=True)
        except Exception as error:  # msgpack raises many kinds, none of them worth telling apart here
            raise FrameError(f"a frame that is not msgpack ({error})") from None
        finally:
            del self._buffer[:end]


_NOTHING = object()
