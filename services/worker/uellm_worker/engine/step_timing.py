"""How long steps take on a stage that waits between them, as stages do, under a quota or not."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from uellm_worker.cores import quota
from uellm_worker.engine.device import on_host

REST_SECONDS = 0.004
"""Between two steps: a stage waits about as long for the other stages. One that does not rest has
all it needs in its caches, where a stage that does has not."""
LEAST_REPEATS, _MOST_REPEATS = 4, 15


class StepTimer:
    """Times steps on a device.

    A quota on the processors lets a process run freely until it is used up, and then not at all
    until the next period. Steps rest for so long that theirs lasts; of those that are too long for
    any rest, the processor's time says what they would take.

    Args:
        place: the device's.

    Attributes:
        share: of the time that steps may compute if they always do; 1: no quota binds.
        period_seconds: of the quota; 0: none binds.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._threads = torch.get_num_threads()
        granted = quota()
        self.share = min(granted.cores / self._threads, 1.0) if on_host(place) else 1.0
        self.period_seconds = granted.period_seconds if self.share < 1 else 0.0
        self._lasts = granted.cores * granted.period_seconds if self.share < 1 else math.inf

    def seconds(self, steps: Sequence[Callable[[], object]], budget: float) -> list[float]:
        """Median seconds of each step if no quota holds it back.

        They are taken in turn, so that all see the same disturbances.

        Args:
            steps: to be computed again and again.
            budget: seconds to do so; a few times at least.
        """
        found: list[list[tuple[float, float]]] = [[] for _ in steps]
        end = time.perf_counter() + budget
        for repeat in range(_MOST_REPEATS + 1):
            for times, step in zip(found, steps, strict=True):
                took = self._once(step)
                if repeat:  # The first is to warm up.
                    times.append(took)
                self._rest(took[1])
            if repeat >= LEAST_REPEATS and time.perf_counter() > end:
                break
        return [self._unhindered(times) for times in found]

    def _once(self, step: Callable[[], object]) -> tuple[float, float]:
        """Seconds, and those of processors."""
        started, used = time.perf_counter(), time.process_time()
        step()
        if not on_host(self._place):
            torch.accelerator.synchronize(self._place)
        return time.perf_counter() - started, time.process_time() - used

    def _rest(self, used: float) -> None:
        regained = used / (self.share * self._threads) if used <= self._lasts else 0.0
        time.sleep(max(REST_SECONDS, regained))

    def _unhindered(self, times: Sequence[tuple[float, float]]) -> float:
        wall = statistics.median(took for took, _ in times)
        used = statistics.median(used for _, used in times)
        if used <= self._lasts:
            return wall
        return min(wall, used / min(max(used / wall, 1.0), self._threads))
