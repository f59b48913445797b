"""CPU time of a mesh's services, and what of it a request costs, and what a token."""

import statistics
from collections.abc import Mapping, Sequence

import psutil

from uellm.mesh.mesh import Mesh

Seconds = Mapping[str, float]
"""By name of the process, or of the children that it has."""


def cpu_seconds(mesh: Mesh) -> dict[str, float]:
    """CPU time that each service has used so far, its child processes counted apart."""
    used: dict[str, float] = {}
    pids = mesh.pids()
    if mesh.redis_pid is not None:
        pids["redis"] = mesh.redis_pid
    for name, pid in pids.items():
        process = psutil.Process(pid)
        used[name] = _time_of(process)
        children = process.children(recursive=True)
        if children:
            used[f"{name} engine"] = sum(_time_of(child) for child in children)
    return used


def _time_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def spent(before: Seconds, after: Seconds) -> dict[str, float]:
    """Seconds used between two looks; those of a process that is another one now are its own."""
    return {
        name: used - before.get(name, 0.0) if used >= before.get(name, 0.0) else used
        for name, used in after.items()
    }


def medians(runs: Sequence[Seconds]) -> dict[str, float]:
    """The median of each process; one that was not there in a run used nothing in it."""
    names = sorted({name for run in runs for name in run})
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}


def split_costs(
    one: Sequence[Seconds], many: Sequence[Seconds], tokens: int
) -> dict[str, dict[str, float]]:
    """What a request and each of its tokens cost, in µs.

    Args:
        one: of each run with answers of one token, seconds a request.
        many: the same with answers of so many.
        tokens: more than one.
    """
    of_one, of_many = medians(one), medians(many)
    costs: dict[str, dict[str, float]] = {}
    for name in sorted({*of_one, *of_many}):
        first = of_one.get(name, 0.0)
        per_token = max(of_many.get(name, 0.0) - first, 0.0) / (tokens - 1)
        costs[name] = {
            "us_per_request": round((first - per_token) * 1e6, 1),
            "us_per_token": round(per_token * 1e6, 2),
        }
    return costs
