"""What a model's load needs of a cluster, and what its copies really do. Pure."""

from collections import deque
from dataclasses import dataclass, replace

from uellm.core.load import OfferedLoad

_SATURATED_SHARE = 0.9
_FEW = 10
"""Fewer requests than this say nothing of what copies do, or of how many are in time."""
_SMOOTHING = 0.5
_WORSE = 0.9
_LEAST, _MOST = 0.05, 20.0


@dataclass(frozen=True, slots=True)
class Targets:
    """What is aimed at.

    Attributes:
        utilisation: share of what copies do that the load may take.
        attainment: share of the requests that ask for a time which are to be in time.
        keep_seconds: for so long copies are kept that are not needed any more.
    """

    utilisation: float = 0.8
    attainment: float = 0.9
    keep_seconds: float = 300.0


class Demand:
    """A model's, followed over time; times are seconds of any one clock.

    Attributes:
        load: the latest.
        needed: requests per second that copies have to do, reserve and backlog included.
        efficiency: what copies do, in units of what is predicted of them. It is learnt where they
            are busy all the time; where requests waited and came too late, it is taken to be less.
    """

    def __init__(self, targets: Targets) -> None:
        self.load = OfferedLoad()
        self.needed = 0.0
        self.efficiency = 1.0
        self._targets = targets
        self._history: deque[tuple[float, float]] = deque()
        self._began: float | None = None
        self._corrected_at = float("-inf")

    def see(self, load: OfferedLoad, predicted: float, now: float) -> None:
        """Take note of the load.

        Args:
            load: of the model.
            predicted: requests per second that its copies were to do.
            now: the present.
        """
        self.load = self.with_lengths(load)
        self._began = now if self._began is None else self._began
        if predicted > 0 and load.window_seconds > 0:
            self._correct(load, predicted, now)
        rate = load.requests_per_second
        if load.waited_share >= _SATURATED_SHARE:
            # What has piled up is to be gone within a window.
            rate += load.waiting / max(load.window_seconds, 1.0)
        self.needed = rate / self._targets.utilisation
        self._history.append((now, self.needed))
        while self._history[0][0] < now - self._targets.keep_seconds:
            self._history.popleft()

    def with_lengths(self, load: OfferedLoad) -> OfferedLoad:
        """A load; of one without any request, the lengths are those of the last that had some."""
        if load.output_tokens:
            return load
        names = ("prompt_tokens", "prompt_tokens_p90", "output_tokens", "output_tokens_p90")
        return replace(load, **{name: getattr(self.load, name) for name in names})

    @property
    def lately(self) -> float:
        """The most that was needed while copies are kept; inf until that long was looked at."""
        if self._began is None or not self._history:
            return float("inf")
        now = self._history[-1][0]
        if now - self._began < self._targets.keep_seconds:
            return float("inf")
        return max(needed for _, needed in self._history)

    def _correct(self, load: OfferedLoad, predicted: float, now: float) -> None:
        done = load.answered_per_second / predicted
        many = load.answered_per_second * load.window_seconds >= _FEW
        settled = now - self._corrected_at >= load.window_seconds
        late = load.judged >= _FEW and load.attainment < self._targets.attainment
        waited = load.waited_share > 1 - self._targets.attainment
        if many and settled and load.waited_share >= _SATURATED_SHARE:
            self.efficiency += _SMOOTHING * (done - self.efficiency)
        elif settled and late and waited:
            self.efficiency *= _WORSE
        elif many and done > self.efficiency:
            self.efficiency = done
        else:
            return
        self.efficiency = min(max(self.efficiency, _LEAST), _MOST)
        self._corrected_at = now
