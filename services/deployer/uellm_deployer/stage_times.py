"""What stages that run take, against what was predicted of them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uellm.placement.learning import AS_PREDICTED, Comparison, Correction, Evidence

HALF_LIFE_SECONDS = 600.0
"""A device that nothing runs on any more is trusted again, by and by: after this half as little."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """The latest steps of a kind of a part of a replica.

    Attributes:
        device_id: where.
        kind: devices of which what is predicted errs alike; "" where it is not to err.
        predicted: seconds, at the device's nominal speed.
        took: seconds.
        compared: the same as it teaches: without what a quota adds.
    """

    device_id: str
    kind: str
    predicted: float
    took: float
    compared: Comparison


class StageTimes:
    """What was learnt by device, and the latest steps that only decoded by replica."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, tuple[StageTime, ...]]] = {}
        self._evidence: dict[str, Evidence] = {}
        self._kinds: dict[str, str] = {}

    def see(self, replica: str, stages: Sequence[StageTime], now: float) -> None:
        """Take note of a step; ``now`` in seconds."""
        if not any(stage.compared.prompts for stage in stages):
            self._latest[replica] = now, tuple(stages)
        for stage in stages:
            found = self._evidence.setdefault(stage.device_id, Evidence(HALF_LIFE_SECONDS))
            found.see(stage.compared, now)
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

    def ratio(self, stage: StageTime, now: float) -> float:
        """What such a step is taken to take by now, in units of what was predicted; 0: not known.

        As far as what was seen is believed still: what was seen long ago says nothing.
        """
        found = self._evidence.get(stage.device_id)
        return found.ratio(stage.compared, now) if found is not None else 0.0

    def learnt(self, now: float) -> Mapping[str, Correction]:
        """What devices take beside what was predicted, by id.

        Where nothing was measured or declared, what devices of a kind have in common is an error of
        the prediction: there a device is as slow as it is against the best one of its kind.
        """
        found = {device: seen.correction(now) for device, seen in self._evidence.items()}
        best: dict[str, float] = {}
        for device, each in found.items():
            kind = self._kinds[device]
            best[kind] = min(best.get(kind, each.slowdown), each.slowdown)
        return {
            device: Correction(each.slowdown / best[kind])
            if (kind := self._kinds[device])
            else each
            for device, each in found.items()
        }

    def of(self, device_id: str, now: float) -> Correction:
        """What one device takes, against what was predicted of itself alone."""
        found = self._evidence.get(device_id)
        return found.correction(now) if found is not None else AS_PREDICTED
