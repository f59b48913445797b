"""What stages that run take, against what was predicted of them. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from uellm.placement.learning import AS_PREDICTED, Comparison, Correction, Evidence

HALF_LIFE_SECONDS = 600.0
"""A device that nothing runs on any more is trusted again, by and by: after this half as little."""
LEAST_REPORTS = 20.0
"""Before so many a device says nothing of its kind: it is drawn to what was predicted still."""
_LEAST_TRUST = 1e-3


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
            device = stage.device_id
            if self._kinds.get(device) != stage.kind:
                # It was measured meanwhile: what was seen was against a guess.
                self._kinds[device], self._evidence[device] = (
                    stage.kind,
                    Evidence(HALF_LIFE_SECONDS),
                )
            self._evidence[device].see(stage.compared, now)

    def forget(self, replicas: Sequence[str], now: float) -> None:
        """Keep the latest steps of these replicas alone, and of devices what is believed still."""
        self._latest = {name: self._latest[name] for name in replicas if name in self._latest}
        for device, seen in list(self._evidence.items()):
            if seen.trust(now) < _LEAST_TRUST:
                del self._evidence[device], self._kinds[device]

    def measured_anew(self, devices: Collection[str]) -> None:
        """Devices were measured again: what was seen was against the measurement before."""
        for device in devices:
            self._evidence.pop(device, None)
            self._kinds.pop(device, None)

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
        best = self._best()
        return {
            device: Correction(_against(seen, best.get(kind), now))
            if (kind := self._kinds[device])
            else seen.correction(now)
            for device, seen in self._evidence.items()
        }

    def _best(self) -> Mapping[str, float]:
        """The least slowdown of each kind, by devices of which enough was seen."""
        best: dict[str, float] = {}
        for device, seen in self._evidence.items():
            kind = self._kinds[device]
            if seen.reports >= LEAST_REPORTS:
                # As it was when it was seen: that it is not believed any more makes none the best.
                slowdown = seen.correction(seen.latest_at).slowdown
                best[kind] = min(best.get(kind, slowdown), slowdown)
        return best

    def best_of(self, device_ids: Sequence[str], now: float) -> Correction:
        """What the fastest of these takes that were seen, against what was predicted of it."""
        found = [
            self._evidence[device].correction(now)
            for device in device_ids
            if device in self._evidence
        ]
        return min(found, key=lambda each: each.slowdown, default=AS_PREDICTED)


def _against(seen: Evidence, best: float | None, now: float) -> float:
    """A device's slowdown against the best one of its kind, as far as it is believed."""
    if best is None or seen.reports < LEAST_REPORTS:
        return 1.0
    slowdown = seen.correction(seen.latest_at).slowdown / best
    return 1 + (slowdown - 1) * seen.trust(now)
