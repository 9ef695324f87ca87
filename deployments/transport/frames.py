"""Frames over a Unix socket between two processes of one user, cut out of what arrives without a copy."""

import asyncio
import os
import socket
import struct
from abc import ABC, abstractmethod
from typing import Any, cast

# Number of the call, bytes of the body that follows. A request without a body takes the call back.
HEAD = struct.Struct("<QQ")
_PEER = struct.Struct("3i")  # pid, uid, gid, as the kernel knows them


class Frames(asyncio.BufferedProtocol, ABC):
    """Cuts what arrives into frames, without a copy: the body is read into the buffer that it ends up in."""

    _number: int | None  # of the frame whose body is being read; None while it is a head
    _view: memoryview
    _filled: int

    def __init__(self) -> None:
        """Wait for a head."""
        self._transport: asyncio.WriteTransport | None = None
        self._expect(None, HEAD.size)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse other users: frames are pickles, which run what they are told to."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's isn't a subclass
        if _peer_uid(transport.get_extra_info("socket")) != os.getuid():
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes belong."""
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Count bytes that have come; a full buffer is a head or a body."""
        self._filled += nbytes
        if self._filled < len(self._view):
            return
        number, body = self._number, self._view
        if number is None:
            number, size = HEAD.unpack(body)
            if size:
                self._expect(number, size)
                return
            body = body[:0]
        self._expect(None, HEAD.size)
        self.received(number, body)

    @abstractmethod
    def received(self, number: int, body: memoryview) -> None:
        """Take one frame."""

    def send(self, number: int, body: bytes) -> None:
        """Write one frame, unless the other side has gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines((HEAD.pack(number, len(body)), body))

    def _expect(self, number: int | None, size: int) -> None:
        self._number, self._view, self._filled = number, memoryview(bytearray(size)), 0


def _peer_uid(connection: Any) -> int:
    """Return the user whose process is at the other end."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)
