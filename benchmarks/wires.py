"""Wires of any speed between network namespaces: a process that carries packets, late.

Usage: ``python -m benchmarks.wires '{"fds": …, "addresses": …, "ways": …}'``; ``benchmarks.hosts``
starts it.

Every host has a TUN device whose packets come here. Each goes on to the host that it is addressed
to, at the rate of the way between the two and after its latency. Each way, in each direction, is a
wire of its own. Kernels can do as much with netem; many are built without.
"""

import heapq
import json
import os
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from uellm.placement.topology import LinkSpeed

_PACKET_BYTES = 65536
_DESTINATION = slice(16, 20)
"""Of an IPv4 header."""


class Wires:
    """When packets arrive.

    Args:
        ways: from a host to another, by number.
    """

    def __init__(self, ways: Mapping[tuple[int, int], LinkSpeed]) -> None:
        self._ways = ways
        self._free_at: dict[tuple[int, int], float] = {}

    def arrival(self, src: int, dst: int, size: int, now: float) -> float:
        """When a packet of so many bytes, sent now, arrives: after those before it on the wire."""
        way = self._ways[src, dst]
        begins = max(self._free_at.get((src, dst), 0.0), now)
        ends = begins + size / way.bytes_per_second
        self._free_at[src, dst] = ends
        return ends + way.latency_seconds


def carry(fds: Sequence[int], addresses: Sequence[str], wires: Wires) -> None:
    """Carry packets for ever.

    Args:
        fds: of the TUN devices, by host.
        addresses: of the hosts.
        wires: between them.
    """
    number = {socket.inet_aton(address): index for index, address in enumerate(addresses)}
    host = {fd: index for index, fd in enumerate(fds)}
    late: list[tuple[float, int, int, bytes]] = []
    count = 0
    for fd in fds:
        os.set_blocking(fd, False)
    while True:
        patience = max(late[0][0] - time.monotonic(), 0.0) if late else None
        readable, _, _ = select.select(fds, [], [], patience)
        now = time.monotonic()
        for fd in readable:
            with suppress(BlockingIOError):
                while True:
                    packet = os.read(fd, _PACKET_BYTES)
                    # Neighbour discovery of IPv6 leads nowhere.
                    if (to := number.get(packet[_DESTINATION])) is None or to == host[fd]:
                        continue
                    count += 1
                    due = wires.arrival(host[fd], to, len(packet), now)
                    heapq.heappush(late, (due, count, fds[to], packet))
        while late and late[0][0] <= time.monotonic():
            _, _, fd, packet = heapq.heappop(late)
            with suppress(OSError):
                os.write(fd, packet)


def main() -> None:
    """Carry packets as the argument says, ahead of whatever else the machine does."""
    said = json.loads(sys.argv[1])
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    ways = {(src, dst): LinkSpeed(late, rate) for src, dst, late, rate in said["ways"]}
    carry(said["fds"], said["addresses"], Wires(ways))


if __name__ == "__main__":
    main()
