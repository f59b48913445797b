"""How long activations take from one worker to another, over the transport that carries them.

Two children form a group of two stages, as those of a replica do. The first sends activations of
different sizes as if they were steps, the second answers each with an empty result. There and back
again is all that can be timed, as clocks of different hosts differ: the way back is taken to be as
long as the shortest way there, so that what is found of the longer ones is theirs. Each direction
takes a probe of its own. In between both rest, as stages do while others compute: a hop to one that
was just awake is several times as short.
"""

import socket
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from uellm.addresses import bare, is_anywhere, listening
from uellm.v1.engine_pb2 import LinkProbed, ProbeLink
from uellm.v1.topology_pb2 import LinkSample, ShardAssignment
from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.errors import PeerLostError
from uellm_worker.engine.group import Group, Rendezvous, join
from uellm_worker.engine.inbox import Inbox, PeerLost, StepAnnounced
from uellm_worker.engine.rests import REST_SECONDS

_HEADER = struct.Struct("!BI")
_ACTIVATION, _WIRE, _END = 1, 2, 3
_GENERATION = 1
_ROWS = (1, 16, 64, 256, 1024, 4096)
_MOST_BYTES = 64 << 20
_LEAST_REPEATS, _MOST_REPEATS = 3, 30
_WIRE_REPEATS = 20
_WIRE_SECONDS = 5.0


class Carrier(Protocol):
    """What carries activations between two stages."""

    def send(self, header: bytes, rows: int) -> None:
        """Send an activation of so many rows behind a header."""
        ...

    def receive(self, rows: int, inline: bytes) -> None:
        """Receive it; ``inline`` came behind the header."""
        ...

    def close(self) -> None:
        """Give up what it has opened."""
        ...


class LinkEngine(Protocol):
    """What a probe needs of an engine; see ``uellm_worker.engine.runner.Engine``."""

    def offer(self, bind_host: str) -> str:
        """What the other needs to join the data plane."""
        ...

    def place(self, device_id: str) -> str:
        """A device's name in the world, as ``Prepared.device`` has it."""
        ...

    def carrier(self, group: Group, inbox: Inbox, command: ProbeLink) -> Carrier:
        """The data plane of a group of two."""
        ...


def probe_link(
    command: ProbeLink, engine: LinkEngine, inbox: Inbox, listening: Callable[[str], None]
) -> LinkProbed:
    """Take part in a probe, as the sender if there is no rendezvous yet.

    Args:
        command: what is to be measured.
        engine: has the transport.
        inbox: where the peer's news go.
        listening: told where the sender waits.

    Raises:
        PeerLostError: the other did not come, or went.
        LeaveRequestedError: the agent wants it to end.
    """
    sends = not command.rendezvous
    inbox.generation = _GENERATION
    assignment = ShardAssignment(
        stage_index=0 if sends else 1, stage_count=2, generation=_GENERATION
    )
    device = engine.place(command.device_id)
    prepared = Prepared(Capacity(1, 1, 1), Vocabulary(1), device=device)
    host = _advertised(command)
    rendezvous: Rendezvous | None = None
    group: Group | None = None
    carrier: Carrier | None = None
    try:
        if sends:
            rendezvous = Rendezvous(command.bind_host, host)
            listening(rendezvous.address)
            group = rendezvous.form(assignment, prepared, engine.offer(command.bind_host), inbox)
        else:
            group = join(command.rendezvous, assignment, prepared, command.bind_host, host, inbox)
        carrier = engine.carrier(group, inbox, command)
        if sends:
            return _send(command, group, carrier, inbox)
        _answer(group, carrier, inbox)
        return LinkProbed()
    finally:
        for part in (rendezvous, carrier, group):
            if part is not None:
                part.close()


def _advertised(command: ProbeLink) -> str:
    if not is_anywhere(command.bind_host):
        return bare(command.bind_host)
    return command.host or socket.gethostname()


def _send(command: ProbeLink, group: Group, carrier: Carrier, inbox: Inbox) -> LinkProbed:
    end = time.perf_counter() + command.budget_seconds
    wire = _wire_seconds(command.bind_host, group)
    width = max(command.hidden_size, 1) * (4 if command.dtype == "float32" else 2)
    found: list[tuple[int, float]] = []
    back = processor = 0.0
    sizes = [rows for rows in _ROWS if rows == 1 or rows * width <= _MOST_BYTES]
    for left, rows in zip(range(len(sizes), 0, -1), sizes, strict=True):
        share = (end - time.perf_counter()) / left
        if found and _LEAST_REPEATS * _expected(found, rows * width) > max(3 * share, 0.0):
            break

        def there_and_back(rows: int = rows) -> None:
            carrier.send(_HEADER.pack(_ACTIVATION, rows), rows)
            inbox.wait_result()

        used = time.process_time()
        seconds = _times(there_and_back, share)
        processor = processor or (time.process_time() - used) / (len(seconds) + 1)
        # What disturbs a way makes it longer: the least of the times is nearest to its own.
        back = back or min(seconds) / 2
        found.append((rows * width, statistics.median(seconds)))
    group.send_step(_HEADER.pack(_END, 0))
    samples = [LinkSample(bytes=size, seconds=max(seconds - back, back)) for size, seconds in found]
    # A part of the way, however the two were disturbed.
    wire = min(wire, samples[0].seconds)
    return LinkProbed(samples=samples, wire_seconds=wire, processor_seconds=processor)


def _expected(found: Sequence[tuple[int, float]], size: int) -> float:
    """Seconds of a larger message, if the last two tell."""
    if len(found) < 2:
        return 2 * found[-1][1]
    (small, short), (large, long) = found[-2:]
    return long + max(long - short, 0.0) * (size - large) / (large - small)


def _times(work: Callable[[], None], share: float) -> list[float]:
    seconds: list[float] = []
    end = time.perf_counter() + share
    work()
    while len(seconds) < _MOST_REPEATS:
        time.sleep(REST_SECONDS)
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        if len(seconds) >= _LEAST_REPEATS and time.perf_counter() > end:
            break
    return seconds


def _answer(group: Group, carrier: Carrier, inbox: Inbox) -> None:
    """Answer whatever comes until the sender has ended."""
    while True:
        item = inbox.take(None)
        if isinstance(item, PeerLost):
            raise PeerLostError(item.message)
        if not isinstance(item, StepAnnounced):
            continue
        kind, number = _HEADER.unpack_from(item.meta)
        if kind == _END:
            return
        if kind == _WIRE:
            _echo(group.leader_host, number)
        else:
            carrier.receive(number, item.meta[_HEADER.size :])
            group.send_result(b"")


def _wire_seconds(bind_host: str, group: Group) -> float:
    """Half of the median way of a byte there and back over a bare connection."""
    with listening(bind_host) as listener:
        listener.settimeout(_WIRE_SECONDS)
        group.send_step(_HEADER.pack(_WIRE, listener.getsockname()[1]))
        try:
            with listener.accept()[0] as connection:
                connection.settimeout(_WIRE_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                seconds = [_ping(connection) for _ in range(_WIRE_REPEATS)]
        except OSError as error:
            raise PeerLostError(f"the receiver does not echo: {error}") from error
    return statistics.median(seconds) / 2


def _ping(connection: socket.socket) -> float:
    started = time.perf_counter()
    connection.sendall(b"?")
    if not connection.recv(1):
        raise ConnectionResetError("it closed the connection")
    return time.perf_counter() - started


def _echo(host: str, port: int) -> None:
    try:
        with socket.create_connection((host, port), timeout=_WIRE_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(1):
                connection.sendall(data)
    except OSError as error:
        raise PeerLostError(f"the sender does not listen at {host}:{port}: {error}") from error
