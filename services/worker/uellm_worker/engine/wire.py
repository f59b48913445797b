"""The framing between an agent and its children: 4-byte big-endian length, then a message."""

import socket
import struct
import threading

from uellm.v1.engine_pb2 import EngineCommand, EngineEvent

LENGTH = struct.Struct("!I")
"""The prefix of a frame."""
MAX_FRAME_BYTES = 256 << 20
"""Larger prefixes can only come from a broken stream."""


def pack(message: EngineCommand | EngineEvent) -> bytes:
    """One frame."""
    body = message.SerializeToString()
    return LENGTH.pack(len(body)) + body


def unpack_length(prefix: bytes) -> int:
    """The length of the message behind a prefix.

    Raises:
        ConnectionError: if it is beyond any message.
    """
    length: int = LENGTH.unpack(prefix)[0]
    if length > MAX_FRAME_BYTES:
        raise ConnectionError(f"a frame of {length} bytes: the stream is broken")
    return length


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """``count`` bytes, or fewer if the other side closed before."""
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            break
        parts += part
    return bytes(parts)


class ChildChannel:
    """A child's end of the socket pair; ``send`` may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    def send(self, event: EngineEvent) -> None:
        """Send one event; blocks while the agent's buffer is full."""
        frame = pack(event)
        with self._lock:
            self._socket.sendall(frame)

    def receive(self) -> EngineCommand | None:
        """The next command, or None when the agent is gone."""
        try:
            prefix = read_exactly(self._socket, LENGTH.size)
            if len(prefix) < LENGTH.size:
                return None
            length = unpack_length(prefix)
            body = read_exactly(self._socket, length)
        except OSError:
            return None
        return EngineCommand.FromString(body) if len(body) == length else None
