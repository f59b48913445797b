"""What steps that ran teach of a device: how much slower it is, and what its steps take besides.

A step of a few layers says little of many. What is learnt is in three parts:

    took = slowdown * predicted + besides                              of steps that decode
    took = (slowdown + prompts) * predicted + besides                  of steps of prompts

and all three are drawn to what was predicted: the mean of a normal posterior whose prior says so
(Bishop, "Pattern Recognition and Machine Learning", 3.3; ridge regression). A short stage moves
``besides``, whose prior is as wide as such a stage is long; a long one moves ``slowdown``; only
stages of several lengths tell both. Without evidence nothing differs. Pure.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PRIOR_SLOWDOWN = 0.3
"""Standard deviation of how much slower a device is than measured, before anything was seen."""
NOISE = 0.5
"""Of one report, in units of what was predicted or taken: the machine may have been busy."""
WEIGHT = 0.2
"""Share of the newest report in what stages of a shape took."""
MOST_REPORTS = 100.0
"""More of a shape say no more: they err alike."""
CLIP = 1.5
"""A report counts as at most so many times what was expected, and no less than that part of it."""
LEAST_RATIO, MOST_RATIO = 0.05, 100.0
"""What is beyond counts as that: so slow or so fast, and by how much makes no difference."""
MOST_SHAPES = 32
_LEAST_SLOWDOWN = 0.1


@dataclass(frozen=True, slots=True)
class Correction:
    """What a device's steps take, beside what was measured of its layers.

    Attributes:
        slowdown: in units of that; below 1 if it is faster.
        step_seconds: of every step besides, at no slowdown; below 0 if there is less than measured.
        prefill_ratio: what layers take for prompts, in units of their slowdown.
    """

    slowdown: float = 1.0
    step_seconds: float = 0.0
    prefill_ratio: float = 1.0

    def faded(self, trust: float) -> "Correction":
        """So much of it as is believed still, as a share."""
        return Correction(
            1 + (self.slowdown - 1) * trust,
            self.step_seconds * trust,
            1 + (self.prefill_ratio - 1) * trust,
        )


AS_PREDICTED = Correction()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Steps of one kind on a stage, as they were predicted and as they were.

    Attributes:
        layers: of the stage.
        layers_seconds: predicted of its layers.
        besides_seconds: predicted of the rest.
        took_seconds: all, as they would be if the device always computed.
        shape: what else tells steps of this kind from others, such as their sequences.
        prompts: they computed prompts, not tokens of answers.
    """

    layers: int
    layers_seconds: float
    besides_seconds: float
    took_seconds: float
    shape: Hashable = None
    prompts: bool = False

    @property
    def predicted(self) -> float:
        """Seconds of all of it."""
        return self.layers_seconds + self.besides_seconds

    @property
    def key(self) -> Hashable:
        """Steps of one are alike."""
        return self.layers, self.prompts, self.shape


@dataclass(frozen=True, slots=True)
class _Seen:
    """Steps of a shape.

    Attributes:
        latest: the newest of them.
        ratio: what they took in units of what was predicted, smoothed.
        reports: how many, the older ones counting less.
        at: when the newest was.
    """

    latest: Comparison
    ratio: float
    reports: float
    at: float


class Evidence:
    """What was seen of a device's steps, by their shape.

    Args:
        half_life_seconds: after this, what was seen counts half.
    """

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life = half_life_seconds
        self._seen: dict[Hashable, _Seen] = {}

    def see(self, compared: Comparison, now: float) -> None:
        """Take note of a step, at ``now`` seconds."""
        if not (compared.predicted > 0 and 0 < compared.took_seconds < math.inf):
            return
        ratio = compared.took_seconds / compared.predicted
        ratio = min(max(ratio, LEAST_RATIO), MOST_RATIO)
        held = self._seen.get(compared.key)
        expected = held.ratio if held else self.ratio(compared, now)
        ratio = min(max(ratio, expected / CLIP), expected * CLIP)
        reports = 1.0
        if held is not None:
            before = held.reports * self._trust(now - held.at)
            reports = min(before + 1, MOST_REPORTS)
            ratio = held.ratio + max(WEIGHT, 1 / reports) * (ratio - held.ratio)
        self._seen[compared.key] = _Seen(compared, ratio, reports, now)
        if len(self._seen) > MOST_SHAPES:
            del self._seen[min(self._seen, key=lambda key: self._seen[key].at)]

    def ratio(self, compared: Comparison, now: float) -> float:
        """What a step is expected to take by now, in units of what was predicted."""
        took = corrected(compared, self.correction(now))
        return min(max(took / compared.predicted, LEAST_RATIO), MOST_RATIO)

    @property
    def reports(self) -> float:
        """How many reports it rests on, the older ones counting less."""
        return sum(seen.reports for seen in self._seen.values())

    @property
    def latest_at(self) -> float:
        """When the newest was; 0: never."""
        return max((seen.at for seen in self._seen.values()), default=0.0)

    def trust(self, now: float) -> float:
        """Share of what it says that is believed still."""
        return self._trust(now - self.latest_at)

    def _trust(self, seconds: float) -> float:
        return float(0.5 ** (max(seconds, 0.0) / self._half_life))

    def correction(self, now: float) -> Correction:
        """What it all says, as far as it is believed at ``now`` seconds."""
        return fit_correction(
            [
                (
                    replace(seen.latest, took_seconds=seen.ratio * seen.latest.predicted),
                    seen.reports * self._trust(now - seen.at),
                )
                for seen in self._seen.values()
            ]
        )


def corrected(compared: Comparison, found: Correction) -> float:
    """What steps take with a correction, in seconds."""
    layers = compared.layers_seconds * (found.prefill_ratio if compared.prompts else 1.0)
    besides = max(compared.besides_seconds + found.step_seconds, 0.0)
    return found.slowdown * (layers + besides)


def fit_correction(seen: Sequence[tuple[Comparison, float]]) -> Correction:
    """The likeliest correction.

    Args:
        seen: of each shape what its steps take, and how many reports say so.
    """
    if not seen:
        return AS_PREDICTED
    predicted = np.array([each.predicted for each, _ in seen])
    took = np.array([each.took_seconds for each, _ in seen])
    prompts = np.array([each.layers_seconds * each.prompts for each, _ in seen])
    noise = NOISE * np.minimum(predicted, took)
    weights = np.array([reports for _, reports in seen]) / noise**2
    # A step may well take as much besides as it does already, or as one layer does.
    short = [each for each, _ in seen if not each.prompts] or [each for each, _ in seen]
    scale = np.mean([max(e.besides_seconds, e.layers_seconds / max(e.layers, 1)) for e in short])
    spread = np.array([PRIOR_SLOWDOWN, max(scale, 1e-12), PRIOR_SLOWDOWN])
    terms = np.stack([predicted, np.ones(len(seen)), prompts], axis=1) * spread
    found = spread * _ridge(terms, took - predicted, weights)
    slowdown = _within(1 + found[0])
    besides = float(found[1]) / slowdown
    least = min(each.besides_seconds for each in short)
    if besides < -least:
        # There is no less to be taken besides than nothing.
        terms = np.stack([predicted - least, prompts], axis=1) * spread[[0, 2]]
        found[[0, 2]] = spread[[0, 2]] * _ridge(terms, took - predicted + least, weights)
        slowdown, besides = _within(1 + found[0]), -least
    return Correction(slowdown, besides, _within(slowdown + found[2]) / slowdown)


def _within(slowdown: float) -> float:
    return min(max(float(slowdown), _LEAST_SLOWDOWN), MOST_RATIO)


def _ridge(terms: Array, values: Array, weights: Array) -> Array:
    """The posterior mean of coefficients whose prior is standard normal."""
    information = np.eye(terms.shape[1]) + terms.T @ (weights[:, None] * terms)
    return np.asarray(np.linalg.solve(information, terms.T @ (weights * values)), np.float64)
