"""Two network namespaces, and a wire between them of the speed that a test wants. Linux, root.

The wire is a process that carries packets from one TUN device to another, each direction at its own
rate, all of them late by the same time: kernels without netem can be slow as well. A second way, as
fast as it gets, leads from each namespace to the host: what tests control goes over it.
"""

import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_MTU = 9000
_FILES = Path("/etc/netns")
"""What is below a namespace's name there takes the place of /etc in it."""


@dataclass(frozen=True)
class Side:
    """One end of a wire.

    Attributes:
        namespace: its name.
        address: on the wire.
        control: where the host reaches it.
        host: where it reaches the host.
    """

    namespace: str
    address: str
    control: str
    host: str

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _TUN_WITHOUT_HEADER))
    return fd


def _side(number: int, tag: str) -> tuple[Side, int]:
    """A namespace with its two ways out, and the wire's end of one of them."""
    namespace, tun, veth = f"uellm{tag}{number}", f"ut{tag}{number}", f"uv{tag}{number}"
    # Libraries look up the names of addresses, and would wait for a resolver that is not reached.
    own = _FILES / namespace
    own.mkdir(parents=True)
    (own / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    _run("ip", "netns", "add", namespace)
    fd = _open_tun(tun)
    side = Side(
        namespace,
        address=f"10.254.77.{number + 1}",
        control=f"10.254.{78 + number}.2",
        host=f"10.254.{78 + number}.1",
    )
    _run("ip", "link", "set", tun, "netns", namespace)
    _run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _run("ip", "addr", "add", f"{side.host}/30", "dev", veth)
    _run("ip", "link", "set", veth, "up")
    for command in (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "addr", "add", f"{side.control}/30", "dev", "eth0"),
        ("ip", "link", "set", "eth0", "up"),
        ("ip", "route", "add", "default", "via", side.host),
        ("ip", "addr", "add", side.address, "peer", f"10.254.77.{2 - number}", "dev", tun),
        ("ip", "link", "set", tun, "mtu", str(_MTU), "up"),
    ):
        _run(*side.command(*command))
    return side, fd


@contextmanager
def wire(
    bytes_per_second: tuple[float, float], latency_seconds: float
) -> Iterator[tuple[Side, Side]]:
    """Two sides, and the rate from the first to the second and back; skips where it cannot be."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, ip and /dev/net/tun")
    tag = f"{os.getpid() % 100000}"
    fds: list[int] = []
    sides: list[Side] = []
    process: subprocess.Popen[bytes] | None = None
    try:
        for number in (0, 1):
            try:
                side, fd = _side(number, tag)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespace can be made here: {error}")
            sides.append(side)
            fds.append(fd)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.wire", *map(str, fds)),
                *map(str, bytes_per_second),
                str(latency_seconds),
            ],
            pass_fds=fds,
        )
        yield sides[0], sides[1]
    finally:
        if process is not None:
            process.kill()
            process.wait()
        for fd in fds:
            os.close(fd)
        for number in (0, 1):
            with suppress(subprocess.CalledProcessError, FileNotFoundError):
                _run("ip", "netns", "del", f"uellm{tag}{number}")
            shutil.rmtree(_FILES / f"uellm{tag}{number}", ignore_errors=True)


def carry(fds: tuple[int, int], rates: tuple[float, float], latency: float) -> None:
    """Carry packets for ever."""
    late: list[tuple[float, int, int, bytes]] = []
    free_at = [0.0, 0.0]
    count = 0
    for fd in fds:
        os.set_blocking(fd, False)
    while True:
        patience = max(late[0][0] - time.monotonic(), 0.0) if late else None
        readable, _, _ = select.select(fds, [], [], patience)
        now = time.monotonic()
        for direction, fd in enumerate(fds):
            while fd in readable:
                try:
                    packet = os.read(fd, 65536)
                except BlockingIOError:
                    break
                free_at[direction] = max(free_at[direction], now) + len(packet) / rates[direction]
                count += 1
                due = free_at[direction] + latency
                heapq.heappush(late, (due, count, fds[1 - direction], packet))
        while late and late[0][0] <= time.monotonic():
            _, _, fd, packet = heapq.heappop(late)
            with suppress(OSError):
                os.write(fd, packet)


if __name__ == "__main__":
    first, second, there, back, wait = sys.argv[1:]
    carry((int(first), int(second)), (float(there), float(back)), float(wait))
