"""What of a measurement is the machine's: how fast it is just now, and what its processors do."""

import time
from statistics import median

import numpy as np

_ROWS, _STEPS, _REST_SECONDS = 1 << 14, 40, 0.004
"""64 MiB of weights, which are in no cache."""


def reference_seconds() -> float:
    """Seconds of work like a layer's that is always the same: the machine may be shared."""
    weights, activation = np.ones((_ROWS, 1024), np.float32), np.ones(1024, np.float32)
    took = []
    for _ in range(_STEPS):
        time.sleep(_REST_SECONDS)
        began = time.perf_counter()
        weights @ activation
        took.append(time.perf_counter() - began)
    return median(took)


def per_token(
    before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], tokens: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time for a token in between, by host and what took it."""
    return {
        host: {
            what: 1e3 * (seconds - before[host][what]) / tokens for what, seconds in kinds.items()
        }
        for host, kinds in after.items()
        if host in before
    }


def spread(values: list[float]) -> float:
    """How far apart repeats are: half of all are within so much of the median, as a share."""
    middle = median(values)
    return median(abs(value / middle - 1) for value in values)
