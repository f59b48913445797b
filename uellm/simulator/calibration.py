"""How first promises were kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uellm.simulator.mesh import Outcome, Record

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Promises of alike probability.

    Attributes:
        promises: how many.
        promised: mean probability of being in time, with the first and with the last token.
        met: share that was.
    """

    promises: int
    promised: float
    met: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How the first promises of requests that finished were kept; None where there are none.

    Attributes:
        promises: how many.
        p50_coverage: share that finished by the promised median; 0.5 is right.
        p90_coverage: share that finished by the promised 90 % quantile; 0.9 is right.
        width: mean seconds from the promised median to the promised 90 % quantile.
        relative_width: the same as a share of the promised time until the median.
        pinball_p50: mean pinball loss of the promised medians, in seconds.
        pinball_p90: likewise of the 90 % quantiles.
        bins: by the promised probability of being in time, over all that had one.
    """

    promises: int
    p50_coverage: float | None
    p90_coverage: float | None
    width: float | None
    relative_width: float | None
    pinball_p50: float | None
    pinball_p90: float | None
    bins: tuple[Bin, ...]


def calibration(records: Sequence[Record]) -> Calibration:
    """How the first promises of a run were kept."""
    kept = [
        (record.finished_at, record.promised_at, record.promise)
        for record in records
        if record.promise is not None and record.outcome is Outcome.FINISHED
    ]
    if not kept:
        return Calibration(0, None, None, None, None, None, None, _bins(records))
    finish = np.array([at for at, _, _ in kept])
    since = np.array([at for _, at, _ in kept])
    median = np.array([promise.finish_p50 for _, _, promise in kept])
    high = np.array([promise.finish_p90 for _, _, promise in kept])
    return Calibration(
        promises=len(kept),
        p50_coverage=float(np.mean(finish <= median)),
        p90_coverage=float(np.mean(finish <= high)),
        width=float(np.mean(high - median)),
        relative_width=float(np.mean((high - median) / np.maximum(median - since, 1e-9))),
        pinball_p50=_pinball(finish - median, 0.5),
        pinball_p90=_pinball(finish - high, 0.9),
        bins=_bins(records),
    )


def _pinball(late: "np.ndarray[tuple[int], np.dtype[np.float64]]", level: float) -> float:
    return float(np.mean(np.maximum(level * late, (level - 1) * late)))


def _bins(records: Sequence[Record]) -> tuple[Bin, ...]:
    found: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for record in records:
        if record.promise is None or record.promise.p_meet is None:
            continue
        p_meet, met = record.promise.p_meet, record.punctual
        found[min(int(p_meet * BINS), BINS - 1)].append((p_meet, met))
    return tuple(
        Bin(
            len(pairs),
            sum(p for p, _ in pairs) / max(len(pairs), 1),
            sum(met for _, met in pairs) / max(len(pairs), 1),
        )
        for pairs in found
    )
