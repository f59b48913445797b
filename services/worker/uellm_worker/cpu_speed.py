"""How fast the host's processors are: arithmetic and reading of memory, measured in 0.2 s.

Where other work is in the way it takes up to two seconds.
``python -m uellm_worker.cpu_speed`` prints it as JSON. It runs in a process of its own, since the
threads of numpy's BLAS are chosen when it is loaded, and stay. What was found is kept in a file for
an hour, so that the workers of a host measure one after another, and once.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from uellm_worker.cores import quota

MOST_AGE_SECONDS = 3600.0
_MEASURE_SECONDS = 0.1
_LEAST_TRIES = 16
"""On a busy host few of them have all cores to themselves."""
_MOST_SECONDS = 1.0
_LIMIT_SECONDS = 30.0
_SIDE = 512
_READ_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class CpuSpeed:
    """What the cores do together.

    Attributes:
        flops_per_second: of large products in float32, as long as one likes.
        memory_bytes_per_second: of reading, likewise.
        measured_at: seconds since the epoch, by the host's clock.
    """

    flops_per_second: float
    memory_bytes_per_second: float
    measured_at: float


def cpu_speed(threads: int, file: Path, now: float) -> CpuSpeed:
    """As it was measured less than an hour ago, or else is measured now; blocks.

    Where nothing can be kept, each worker measures for itself. Where a quota grants less than these
    threads can use, what they do in the end is as much less.

    Args:
        threads: to compute with.
        file: where results are kept.
        now: seconds since the epoch, by the host's clock.

    Raises:
        OSError: if the measurement cannot be started.
        subprocess.SubprocessError: if it fails.
        ValueError: likewise.
    """
    share = min(quota().cores / threads, 1.0)
    found = _at_full_speed(threads, file, now)
    return replace(
        found,
        flops_per_second=share * found.flops_per_second,
        memory_bytes_per_second=share * found.memory_bytes_per_second,
    )


def _at_full_speed(threads: int, file: Path, now: float) -> CpuSpeed:
    key = f"{platform.node()} {platform.machine()} {threads}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a+")
    except OSError:
        return CpuSpeed(*_measure_apart(threads), now)
    with opened as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        kept = _parse(shared.read())
        known = kept.get(key)
        if known is not None and 0 <= now - known.measured_at < MOST_AGE_SECONDS:
            return known
        found = CpuSpeed(*_measure_apart(threads), now)
        kept[key] = found
        shared.truncate(0)
        shared.write(json.dumps({name: asdict(speed) for name, speed in kept.items()}))
        return found


def _parse(text: str) -> dict[str, CpuSpeed]:
    """What the file holds; nothing if it is not what this version writes."""
    try:
        return {name: CpuSpeed(**facts) for name, facts in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _measure_apart(threads: int) -> tuple[float, float]:
    """Measure in a process with so many threads."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    answer = subprocess.run(
        [sys.executable, "-m", "uellm_worker.cpu_speed"],
        env={**os.environ, **dict.fromkeys(names, str(threads))},
        capture_output=True,
        timeout=_LIMIT_SECONDS,
        check=True,
        text=True,
    )
    flops, reading = json.loads(answer.stdout)
    return float(flops), float(reading)


def measure() -> tuple[float, float]:
    """FLOP/s and bytes per second that are read, with the threads that BLAS has here."""
    random = np.random.default_rng(0)
    left, right = random.random((2, _SIDE, _SIDE), dtype=np.float32)
    product = np.empty_like(left)
    first, second = np.ones((2, _READ_BYTES // 8), dtype=np.float32)
    flops = _rate(lambda: np.matmul(left, right, out=product), 2.0 * _SIDE**3)
    reading = _rate(lambda: np.dot(first, second), float(_READ_BYTES))
    return flops, reading


def _rate(work: Callable[[], object], amount: float) -> float:
    """The best of what is done per second: anything less was somebody else's turn."""
    best, tries = float("inf"), 0
    work()
    began = time.perf_counter()
    while (start := time.perf_counter()) < began + (
        _MEASURE_SECONDS if tries >= _LEAST_TRIES else _MOST_SECONDS
    ):
        work()
        best, tries = min(best, time.perf_counter() - start), tries + 1
    return amount / best if best < float("inf") else 0.0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()))
