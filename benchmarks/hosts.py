"""Hosts of one's own making on one machine: network namespaces on shaped wires, shares of a core.

Linux, root, ``ip`` and /dev/net/tun. All of it is gone when the context ends, however it ends; what
a killed process left is taken away by the next one.
"""

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import psutil
from uellm_worker.cores import control_groups

from uellm.mesh.tether import tethered
from uellm.placement.topology import LinkSpeed

OUTSIDE = "outside"
"""The machine itself, as a host beside the others."""
PERIOD_SECONDS = 0.01
"""Of quotas. Within each a process runs, and then waits: in the kernel's own period of 0.1 s a step
would run freely or not at all."""
_PREFIX = "uellm-"
_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_MTU = 9000
_FILES = Path("/etc/netns")
"""What is below a namespace's name there takes the place of what is in /etc."""
_NAMESPACES = Path("/run/netns")
_ENTER = """
    hostname "$0"
    for name in hosts resolv.conf; do mount --bind "$1/$name" "/etc/$name"; done
    shift
    exec "$@"
"""
_GONE_SECONDS = 5.0


class NoHostsError(Exception):
    """No hosts can be made here; says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host.

    Attributes:
        name: as its processes see it.
        namespace: of its network; "" for the machine itself.
        address: on the wires.
    """

    name: str
    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs there."""
        if not self.namespace:
            return list(arguments)
        # What `ip netns exec` does, but for /sys, where processes find their control groups.
        there = ("nsenter", f"--net={_NAMESPACES / self.namespace}", "unshare", "--uts", "--mount")
        return [*there, "sh", "-ec", _ENTER, self.name, str(_FILES / self.namespace), *arguments]


def why_not() -> str:
    """Why no hosts can be made here; "" if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts of one's own making need Linux and root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    missing = [
        name for name in ("ip", "nsenter", "unshare", "hostname") if shutil.which(name) is None
    ]
    return f"{', '.join(missing)} is not installed" if missing else ""


@contextmanager
def network(
    names: Sequence[str], way: Callable[[str, str], LinkSpeed]
) -> Iterator[dict[str, Host]]:
    """Hosts, and ``OUTSIDE``, with a wire from each to each.

    Args:
        names: of the hosts.
        way: how fast the wire from one to another is; both may be ``OUTSIDE``.

    Raises:
        NoHostsError: if there can be none.
    """
    if reason := why_not():
        raise NoHostsError(reason)
    _sweep()
    tag, subnet = os.getpid(), f"10.254.{os.getpid() % 250 + 1}"
    every = [*names, OUTSIDE]
    hosts = {
        name: Host(
            name, f"{_PREFIX}{tag}-{name}" if name != OUTSIDE else "", f"{subnet}.{index + 1}"
        )
        for index, name in enumerate(every)
    }
    ways = [
        (src, dst, speed.latency_seconds, speed.bytes_per_second)
        for src, dst in permutations(range(len(every)), 2)
        for speed in (way(every[src], every[dst]),)
    ]
    with ExitStack() as stack:
        fds = [
            stack.enter_context(_plugged(host, f"ul{tag}.{index}"[:15], hosts))
            for index, host in enumerate(hosts.values())
        ]
        addresses = [host.address for host in hosts.values()]
        said = json.dumps({"fds": fds, "addresses": addresses, "ways": ways})
        command = tethered([sys.executable, "-m", "benchmarks.wires", said])
        carrier = subprocess.Popen(command, pass_fds=fds, start_new_session=True)
        try:
            yield hosts
        finally:
            carrier.kill()
            carrier.wait()


@contextmanager
def _plugged(host: Host, tun: str, hosts: dict[str, Host]) -> Iterator[int]:
    """A host with an end of the wires."""
    with ExitStack() as stack:
        if host.namespace:
            stack.enter_context(_namespace(host, hosts))
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR)
            stack.callback(os.close, fd)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", tun.encode(), _TUN_WITHOUT_HEADER))
            inside: list[str] = []
            if host.namespace:
                _run("ip", "link", "set", tun, "netns", host.namespace)
                inside = ["ip", "netns", "exec", host.namespace]
                _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "addr", "add", f"{host.address}/24", "dev", tun)
            _run(*inside, "ip", "link", "set", tun, "mtu", str(_MTU), "up")
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoHostsError(f"no wire can be made here: {error}") from error
        yield fd


@contextmanager
def _namespace(host: Host, hosts: dict[str, Host]) -> Iterator[None]:
    # Libraries look up names of hosts, and would wait for a resolver that is not reached.
    own = _FILES / host.namespace
    known = [f"{each.address} {each.name}" for each in hosts.values()]
    try:
        try:
            own.mkdir(parents=True, exist_ok=True)
            (own / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
            _run("ip", "netns", "add", host.namespace)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoHostsError(f"no network namespace can be made here: {error}") from error
        yield
    finally:
        _remove(host.namespace)


def _remove(namespace: str) -> None:
    with suppress(subprocess.CalledProcessError, OSError):
        _run("ip", "netns", "del", namespace)
    shutil.rmtree(_FILES / namespace, ignore_errors=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _sweep() -> None:
    """Take away what processes left that are gone."""
    for place in (_NAMESPACES, _FILES):
        for path in place.glob(f"{_PREFIX}*") if place.is_dir() else ():
            if not _alive(path.name):
                _remove(path.name)
    with suppress(NoHostsError):
        for path in groups().glob(f"{_PREFIX}*"):
            if not _alive(path.name):
                with suppress(OSError):
                    path.rmdir()


def _alive(name: str) -> bool:
    owner = name.removeprefix(_PREFIX).partition("-")[0]
    return owner.isdigit() and psutil.pid_exists(int(owner))


# ---- shares of a core --------------------------------------------------------------------------


def groups(mounts: Path = Path("/proc/mounts")) -> Path:
    """Where control groups that limit processors are, of either version.

    Raises:
        NoHostsError: if there are none.
    """
    unified: Path | None = None
    for line in mounts.read_text().splitlines():
        _, at, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(at)
        controllers = Path(at) / "cgroup.controllers"
        if kind == "cgroup2" and "cpu" in controllers.read_text().split():
            unified = Path(at)
    if unified is None:
        raise NoHostsError("no control groups for processors are mounted")
    return unified


@dataclass(frozen=True, slots=True)
class Quota:
    """A control group whose processes get so much of a core together."""

    group: Path

    def hold(self, pids: Sequence[int]) -> None:
        """Have it hold processes, and all that they start from now on."""
        for pid in pids:
            with suppress(ProcessLookupError):
                (self.group / "cgroup.procs").write_text(str(pid))

    def set(self, cores: float) -> None:
        """Grant so much of a core; 0: all there is."""
        period = round(PERIOD_SECONDS * 1e6)
        if (self.group / "cpu.max").exists():
            granted = str(round(cores * period)) if cores else "max"
            (self.group / "cpu.max").write_text(f"{granted} {period}")
            return
        (self.group / "cpu.cfs_quota_us").write_text("-1")
        (self.group / "cpu.cfs_period_us").write_text(str(period))
        if cores:
            (self.group / "cpu.cfs_quota_us").write_text(str(round(cores * period)))

    def held_seconds(self) -> float:
        """How long processes that wanted to compute were not let to, so far, all together."""
        lines = (self.group / "cpu.stat").read_text().splitlines()
        found = dict(line.split() for line in lines)
        if "throttled_usec" in found:
            return float(found["throttled_usec"]) / 1e6
        return float(found.get("throttled_time", 0)) / 1e9


@contextmanager
def quota(name: str) -> Iterator[Quota]:
    """A control group, without a limit yet. Its processes are to be gone when it ends.

    Raises:
        NoHostsError: if none can be made.
    """
    root = groups()
    group = root / f"{_PREFIX}{os.getpid()}-{name}"
    try:
        if (root / "cgroup.subtree_control").exists():
            (root / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir()
    except OSError as error:
        raise NoHostsError(f"no control group can be made here: {error}") from error
    try:
        _keep_priority(group)
        yield Quota(group)
    finally:
        deadline = time.monotonic() + _GONE_SECONDS
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@contextmanager
def apart() -> Iterator[None]:
    """This process, and what it starts, in a control group without a limit.

    Kernels that group processes by session share processors evenly among sessions, and a priority
    says nothing beyond its own. Control groups are exempt.

    Raises:
        NoHostsError: if none can be made.
    """
    before = next(control_groups("cpu"), groups())
    with quota("rest") as rest:
        rest.hold([os.getpid()])
        try:
            yield
        finally:
            Quota(before).hold([os.getpid()])


def _keep_priority(group: Path) -> None:
    """Groups compete as a whole: without a word, a high priority would be lost in one."""
    nice = min(os.getpriority(os.PRIO_PROCESS, 0), 0)
    if (group / "cpu.weight.nice").exists():
        (group / "cpu.weight.nice").write_text(str(nice))
    else:
        # As the kernel weighs processes: a quarter more for every step.
        (group / "cpu.shares").write_text(str(max(round(1024 / 1.25**nice), 2)))
