"""What nobody foresaw: faults of the program, survived, and made known.

A service is many tasks, most of them one model's or one caller's. A fault in one of these ends that
task alone: it is logged with its trace, counted (``uellm.faults``), said in the service's
registration for `uellm health`, and what was under way is tried again, later each time.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uellm.logs import logger
from uellm.telemetry import meter

_log = logger("faults")
_MOST_SAID = 8
"""Of the faults that last, in a registration."""
_FIRST_SECONDS = 0.5
_LONGEST_SECONDS = 30.0
CALM_SECONDS = 120.0
"""What has not failed for so long is well again: it may have gone on without an end to be seen."""
_counter = meter.create_counter("uellm.faults", description="Failures that nobody foresaw.")


def pause(failures: int) -> float:
    """Seconds until the next try after so many failures in a row."""
    return min(_FIRST_SECONDS * 2.0 ** min(max(failures - 1, 0), 30), _LONGEST_SECONDS)


def described(error: BaseException) -> str:
    """What a fault is and where, without what it is about: its message may quote a prompt."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}"


@dataclass(frozen=True, slots=True)
class _Failed:
    """How often a task failed in a row, how last, and when."""

    times: int
    last: str
    at: float


class Faults:
    """The faults of one service.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._failed: dict[str, _Failed] = {}

    def note(self, task: str, error: BaseException) -> int:
        """A task failed as nobody foresaw; returns how many times in a row."""
        self._forget()
        earlier = self._failed.pop(task, None)
        times = 1 + (earlier.times if earlier is not None else 0)
        self._failed[task] = _Failed(times, described(error), self._now())
        _counter.add(1, {"error.type": type(error).__name__})
        _log.error("failed unforeseen", task=task, times=times, exc_info=error)
        return times

    def clear(self, task: str) -> None:
        """A task did what it should."""
        self._failed.pop(task, None)

    def _forget(self) -> None:
        since = self._now() - CALM_SECONDS
        self._failed = {task: f for task, f in self._failed.items() if f.at >= since}

    @property
    def lasting(self) -> Sequence[str]:
        """What failed lately and did not succeed since, for people; the latest last."""
        self._forget()
        said = [
            f"{task} failed {failed.times} time(s), last by {failed.last}"
            for task, failed in self._failed.items()
        ]
        return said[-_MOST_SAID:]
