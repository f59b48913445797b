"""A control link between two stages: small framed messages over one TCP connection.

A frame is a 4-byte big-endian length, a kind, and that many bytes.
"""

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from enum import IntEnum

from uellm.addresses import host_of
from uellm_worker.engine.errors import LeaveRequestedError, PeerLostError
from uellm_worker.engine.inbox import Inbox

_HEADER = struct.Struct("!IB")
_MAX_PAYLOAD_BYTES = 64 << 20
_SEND_SECONDS = 2.0
_POLL_SECONDS = 0.2
"""How soon a forming stage notices that its agent wants it to leave."""


class Kind(IntEnum):
    """What a frame carries."""

    HEARTBEAT = 0
    HELLO = 1
    WELCOME = 2
    STEP = 3
    RESULT = 4


class Link:
    """One end of a control link.

    Args:
        sock: connected; the link owns it from now on.
        stage: the peer's, or -1 until it has said so.
    """

    def __init__(self, sock: socket.socket, stage: int = -1) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_SEND_SECONDS)
        self.socket = sock
        self.stage = stage
        self.heard_at = time.monotonic()
        self._lock = threading.Lock()
        self._buffer = bytearray()

    def send(self, kind: Kind, *payload: bytes | memoryview) -> None:
        """Send one frame, whose payload is made of these parts.

        Raises:
            PeerLostError: if the peer is gone or does not read.
        """
        header = _HEADER.pack(sum(memoryview(part).nbytes for part in payload), kind)
        try:
            with self._lock:
                self.socket.sendall(b"".join((header, *payload)))
        except OSError as error:
            raise PeerLostError(f"stage {self.stage} does not read: {error}") from error

    def beat(self) -> None:
        """Send a heartbeat, unless a frame is on its way anyway."""
        if self._lock.acquire(blocking=False):
            try:
                self.socket.sendall(_HEADER.pack(0, Kind.HEARTBEAT))
            except OSError:
                pass  # The receiving side finds out why.
            finally:
                self._lock.release()

    def read(self) -> None:
        """Take in what has arrived; to be called when the socket is readable.

        Raises:
            PeerLostError: if the peer has closed or reset the connection.
        """
        try:
            data = self.socket.recv(1 << 18)
        except OSError as error:
            raise PeerLostError(f"stage {self.stage} is gone: {error}") from error
        if not data:
            raise PeerLostError(f"stage {self.stage} is gone: it closed the connection")
        self._buffer += data
        self.heard_at = time.monotonic()

    def frames(self) -> Iterator[tuple[Kind, bytes]]:
        """The frames that have arrived whole.

        Raises:
            PeerLostError: if they are not frames of this protocol.
        """
        while len(self._buffer) >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer)
            if length > _MAX_PAYLOAD_BYTES or kind not in tuple(Kind):
                raise PeerLostError(f"stage {self.stage} does not speak this protocol")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield Kind(kind), payload

    def expect(self, kind: Kind, deadline: float, inbox: Inbox) -> bytes:
        """Wait for a frame of ``kind`` while the group forms; heartbeats are passed over.

        Raises:
            PeerLostError: if another comes, or none until ``deadline`` (monotonic).
            LeaveRequestedError: if the agent wants the stage to leave.
        """
        while True:
            for got, payload in self.frames():
                if got == kind:
                    return payload
                if got != Kind.HEARTBEAT:
                    raise PeerLostError(f"stage {self.stage} sent {got.name}, not {kind.name}")
            wait_readable(self.socket, deadline, inbox)
            self.read()

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


def wait_readable(sock: socket.socket, deadline: float, inbox: Inbox) -> None:
    """Wait until a socket is readable.

    Raises:
        PeerLostError: at ``deadline`` (monotonic).
        LeaveRequestedError: if the agent wants the stage to leave.
    """
    while not select.select([sock], [], [], _POLL_SECONDS)[0]:
        if inbox.leaving:
            raise LeaveRequestedError("the agent ended the generation while it was forming")
        if time.monotonic() > deadline:
            raise PeerLostError("the stages of the replica did not join in time")


def connect(address: str, deadline: float, inbox: Inbox) -> socket.socket:
    """Connect to ``host:port``, trying again while nobody listens there.

    Raises:
        PeerLostError: at ``deadline`` (monotonic).
        LeaveRequestedError: if the agent wants the stage to leave.
    """
    while True:
        try:
            port = int(address.rpartition(":")[2])
            return socket.create_connection((host_of(address), port), timeout=_SEND_SECONDS)
        except (OSError, ValueError) as error:
            if inbox.leaving:
                raise LeaveRequestedError("the agent ended the generation") from error
            if time.monotonic() > deadline:
                raise PeerLostError(f"nobody answers at {address!r}: {error}") from error
        time.sleep(_POLL_SECONDS / 4)
