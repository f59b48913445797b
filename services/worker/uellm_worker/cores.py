"""How many cores this process may use, by affinity and by the quota of its control group."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Environment in which threads of one process wait for each other: some microseconds, then asleep.

Asleep at once, half of a decode step goes into waking them; awake all the time, they take the cores
from other processes: on four busy cores a step of two stages, four threads each, took a second.
"""


@dataclass(frozen=True, slots=True, order=True)
class Quota:
    """Processor time that a control group grants.

    Attributes:
        cores: seconds of it in a second; inf: no limit.
        period_seconds: it is granted by so long; what is left of it is lost.
    """

    cores: float = math.inf
    period_seconds: float = 0.0


def granted_cores(system: Path = Path("/")) -> int:
    """Cores that may be used; at least 1.

    Args:
        system: where ``proc`` and ``sys`` are.
    """
    cores = available_cores()
    return max(1, min(cores, math.ceil(min(quota(system).cores, cores))))


def available_cores() -> int:
    """Cores that this process may run on, quotas aside."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def lost_to(used_seconds: float, threads: int, system: Path = Path("/")) -> float:
    """Seconds that computing loses to other work of this process's control group.

    Nothing where there are processors besides; else the share of all that the other work takes.

    Args:
        used_seconds: of a processor, by the other work.
        threads: that compute.
        system: where ``proc`` and ``sys`` are.
    """
    cores = min(quota(system).cores, available_cores())
    return used_seconds / cores if cores <= threads else 0.0


def quota(system: Path = Path("/")) -> Quota:
    """Processor time that may be used, as control groups grant it: the least.

    Where it is used up the kernel has all threads wait, so that a fraction of a core is a whole
    one that is there a part of the time.

    Args:
        system: where ``proc`` and ``sys`` are.
    """
    return min(_quotas(system), default=Quota())


def control_groups(controller: str, system: Path = Path("/")) -> Iterator[Path]:
    """Directories of this process's control group and of those that it is in, either version's.

    Args:
        controller: such as ``cpu`` or ``memory``.
        system: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup"
        group = (root if not controllers else root / controller) / path.lstrip("/")
        while group.is_relative_to(root):
            yield group
            group = group.parent


def _quotas(system: Path) -> Iterator[Quota]:
    """Quotas of this process's groups."""
    for group in control_groups("cpu", system):
        yield from _quota(group)


def _quota(group: Path) -> Iterator[Quota]:
    try:
        if (group / "cpu.max").is_file():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        quota = Quota(float(limit) / float(period), float(period) / 1e6)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number, and no limit.
        return
    if quota.cores > 0:
        yield quota
