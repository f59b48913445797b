"""How long steps take on a stage that waits between them, as stages do, under a quota or not."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from uellm_worker.cores import quota
from uellm_worker.engine.device import on_host
from uellm_worker.engine.rests import REST_SECONDS

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

    def once(self, step: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a step, and those of processors; it rests behind it."""
        started, used = time.perf_counter(), time.process_time()
        step()
        if not on_host(self._place):
            torch.accelerator.synchronize(self._place)
        took = time.perf_counter() - started, time.process_time() - used
        self._rest(took[1])
        return took

    def _rest(self, used: float) -> None:
        regained = used / (self.share * self._threads) if used <= self._lasts else 0.0
        time.sleep(max(REST_SECONDS, regained))

    def unhindered(self, times: Sequence[tuple[float, float]]) -> float:
        """What a step takes on the average, if no quota had held it back.

        Args:
            times: as ``once`` returns them.
        """
        if self.share == 1:
            return usual_mean([took for took, _ in times])
        # Some wait for what others of their group have used: medians leave them out.
        wall = statistics.median(took for took, _ in times)
        used = statistics.median(used for _, used in times)
        if used <= self._lasts:
            return wall
        return min(wall, used / min(max(used / wall, 1.0), self._threads))


def usual_mean(seconds: Sequence[float]) -> float:
    """The mean of times, of which none counts as more than twice the median.

    Answers are sums of steps, most of which are a little shorter than the mean: a median is 5 to
    10 % below it. But one hiccup among a few times is not one of every so many steps.
    """
    most = 2 * statistics.median(seconds)
    return statistics.mean(min(each, most) for each in seconds)


class TimedSteps:
    """Steps that are timed in turn, so that all see the same disturbances.

    Args:
        timer: of their device.
        steps: to be computed again and again.

    Attributes:
        turn_seconds: of the latest turn, with its rests.
    """

    def __init__(self, timer: StepTimer, steps: Sequence[Callable[[], object]]) -> None:
        self._timer, self._steps = timer, steps
        self._times: list[list[tuple[float, float]]] = [[] for _ in steps]
        self.turn_seconds = 0.0

    def warm_up(self) -> None:
        """Compute each twice: the first time does not count."""
        self.turn()
        self._times = [[] for _ in self._steps]
        self.turn()

    def turn(self) -> None:
        """Compute each once."""
        started = time.perf_counter()
        for times, step in zip(self._times, self._steps, strict=True):
            times.append(self._timer.once(step))
        self.turn_seconds = time.perf_counter() - started

    @property
    def seconds(self) -> list[float]:
        """Mean seconds of each step if no quota holds it back."""
        return [self._timer.unhindered(times) for times in self._times]


def turns(seconds: Sequence[float], budget: float) -> list[int]:
    """Who has a turn when, so that those of each are spread over all of the time.

    A machine that is shared is slow for a while, and then fast: what has all its turns in one
    moment is timed by that moment. Strides are even (Waldspurger and Weihl, "Stride scheduling",
    1995); what one does not need of its share is the others'.

    Args:
        seconds: of a turn of each.
        budget: seconds for all; a few turns of each at least.

    Returns:
        Numbers of those whose turn it is.
    """
    repeats: dict[int, int] = {}
    for place, index in enumerate(sorted(range(len(seconds)), key=lambda i: seconds[i])):
        share = max(budget, 0.0) / (len(seconds) - place)
        wanted = int(share / seconds[index]) if seconds[index] > 0 else _MOST_REPEATS
        repeats[index] = min(max(wanted, LEAST_REPEATS), _MOST_REPEATS)
        budget -= repeats[index] * seconds[index]
    when = [
        ((turn + 0.5) / count, index) for index, count in repeats.items() for turn in range(count)
    ]
    return [index for _, index in sorted(when)]
