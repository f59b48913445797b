"""What stages that run take, against what was predicted of them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uellm.placement.measuring import LIVE_WEIGHT

HALF_LIFE_SECONDS = 600.0
"""A device that nothing runs on any more is trusted again, by and by: after this half as little."""
_LEAST, _MOST = 0.2, 20.0
"""What is beyond was no step like those that are predicted."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """The latest step of a part of a replica that only decoded.

    Attributes:
        device_id: where.
        kind: devices of which what is predicted errs alike; "" where it is not to err.
        predicted: seconds, at the device's nominal speed.
        took: seconds.
        throttled: a quota holds the device back where it always computes. Steps that it lets
            through say nothing of more layers: those that took less than predicted count as that.
    """

    device_id: str
    kind: str
    predicted: float
    took: float
    throttled: bool = False

    @property
    def ratio(self) -> float:
        """What is learnt of it: what was taken in units of what was predicted."""
        ratio = self.took / self.predicted
        return max(ratio, 1.0) if self.throttled else ratio


class StageTimes:
    """Smoothed ratios by device, and the latest steps by replica."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, tuple[StageTime, ...]]] = {}
        self._ratios: dict[str, tuple[float, float]] = {}
        self._kinds: dict[str, str] = {}

    def see(self, replica: str, stages: Sequence[StageTime], now: float) -> None:
        """Take note of a step; ``now`` in seconds."""
        self._latest[replica] = now, tuple(stages)
        for stage in stages:
            if not (stage.predicted and _LEAST <= stage.took / stage.predicted <= _MOST):
                continue
            held, _ = self._ratios.get(stage.device_id, (1.0, now))
            ratio = held + LIVE_WEIGHT * (stage.ratio - held)
            self._ratios[stage.device_id] = (ratio, now)
            self._kinds[stage.device_id] = stage.kind

    def forget(self, replicas: Sequence[str]) -> None:
        """Keep the latest steps of these replicas alone."""
        self._latest = {name: self._latest[name] for name in replicas if name in self._latest}

    def latest(self, replica: str) -> tuple[StageTime, ...]:
        """The latest step of a replica, in stage order; none before the first."""
        return self._latest.get(replica, (0.0, ()))[1]

    def seen_at(self, replica: str) -> float:
        """When that was, by the clock of ``see``; 0: never."""
        return self._latest.get(replica, (0.0, ()))[0]

    def ratio(self, device_id: str, now: float) -> float:
        """What steps on a device take, in units of what was predicted; 0: none was seen.

        As far as that is believed still: what was seen long ago says nothing.
        """
        if device_id not in self._ratios:
            return 0.0
        ratio, at = self._ratios[device_id]
        return 1 + (ratio - 1) * _trust(now - at)

    def slowdowns(self, now: float) -> Mapping[str, float]:
        """How much slower devices are than was predicted, or below 1 faster, by id.

        Where nothing was measured or declared, what devices of a kind have in common is an error of
        the prediction: there a device is as slow as it is against the best one of its kind.
        """
        best: dict[str, float] = {}
        for device, (ratio, _) in self._ratios.items():
            kind = self._kinds[device]
            best[kind] = min(best.get(kind, ratio), ratio)
        found = {}
        for device, (ratio, at) in self._ratios.items():
            kind = self._kinds[device]
            slow = ratio / best[kind] if kind else ratio
            found[device] = 1 + (slow - 1) * _trust(now - at)
        return found


def _trust(seconds: float) -> float:
    """Share of what was seen so long ago that is believed still."""
    return float(0.5 ** (seconds / HALF_LIFE_SECONDS))
