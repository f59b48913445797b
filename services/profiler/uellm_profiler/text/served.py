"""What is known of each model, adapter and sampling regime: how long its answers are to prompts.

The text model says how long the answer to a prompt is in relation to others. A served one's
lengths follow from that by a line in the logarithm, which is followed as it moves; its errors give
the distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from uellm.prediction.calibration import Calibration, pack, unpack
from uellm.prediction.interface import State
from uellm_profiler.text.rows import Key

FORGETTING = 1.0 - 1.0 / 500
"""What the weight of all former observations is multiplied by at each."""
PRIOR_WEIGHT = 10.0
"""How many observations the line that is expected counts as; it is not forgotten."""
MOST_SERVED = 1024
_LEAST_SLOPE = 0.05
_EXEMPLARS = 64
"""Of those that were taught last, so many say what is expected of a new one."""

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Served:
    """One of them.

    Attributes:
        expected: intercept and slope before anything was observed.
        moments: forgetful sums of 1, x, x², y, x·y, for x a relative and y a true log length.
        calibration: of its errors.
    """

    expected: tuple[float, float]
    calibration: Calibration
    moments: Floats = field(default_factory=lambda: np.zeros(5))

    @property
    def line(self) -> tuple[float, float]:
        """Intercept and slope: least squares, leaning on what is expected."""
        intercept, slope = self.expected
        count, x, xx, y, xy = self.moments + PRIOR_WEIGHT * np.array(
            [1.0, 0.0, 1.0, intercept, slope]
        )
        fitted = (count * xy - x * y) / (count * xx - x * x)
        fitted = max(fitted, _LEAST_SLOPE)
        return (y - fitted * x) / count, fitted

    def observe(self, x: float, spread: float, y: float, censored: bool) -> None:
        """Take the outcome of a prediction.

        Args:
            x: relative length that was predicted.
            spread: of it.
            y: logarithm of the true length.
            censored: it is longer than that.
        """
        intercept, slope = self.line
        predicted = intercept + slope * x
        self.calibration.observe((y - predicted) / (slope * spread), censored)
        if censored and y < predicted:
            # Nothing speaks against the prediction.
            y = predicted
        self.moments *= FORGETTING
        self.moments += (1.0, x, x * x, y, x * y)


class Book:
    """All that are or were served, by key; the least recently taught are forgotten."""

    def __init__(self) -> None:
        self._served: dict[Key, Served] = {}

    def keys(self) -> Sequence[Key]:
        """Those that are known."""
        return list(self._served)

    def put(self, key: Key, served: Served) -> None:
        """Know one from now on."""
        self._served.pop(key, None)
        self._served[key] = served
        if len(self._served) > MOST_SERVED:
            del self._served[next(iter(self._served))]

    def find(self, key: Key) -> Served:
        """What is known of one, or expected by what is known of the others."""
        return self._served.get(key) or self._expected(key)

    def learn(self, key: Key) -> Served:
        """The same, to be taught."""
        served = self.find(key)
        self.put(key, served)
        return served

    def _expected(self, key: Key) -> Served:
        akin = [served for (model, _, _), served in self._served.items() if model == key[0]]
        latest = (akin or list(self._served.values()))[-_EXEMPLARS:]
        lines = np.array([served.line for served in latest])
        if not len(lines):
            return Served((np.log(150.0), 1.0), Calibration(1.5))
        intercept, slope = (float(value) for value in lines.mean(axis=0))
        # Two lines at least say how far apart lines are; of one that has to be assumed.
        apart = float(lines[:, 0].std()) if len(lines) > 1 else 0.5
        return Served((intercept, slope), Calibration(float(np.hypot(1.3, apart / slope))))

    def state(self) -> State:
        """Arrays that ``load`` takes."""
        every = list(self._served.values())
        return {
            "served_keys": np.array(list(self._served), dtype=np.str_).reshape(len(every), 3),
            "served_expected": np.array([each.expected for each in every]).reshape(len(every), 2),
            "served_moments": np.array([each.moments for each in every]).reshape(len(every), 5),
            **{f"served_{k}": v for k, v in pack([each.calibration for each in every]).items()},
        }

    def load(self, state: State) -> None:
        """Take the place of the one that made this state.

        Raises:
            KeyError, ValueError, IndexError: if it is none.
        """
        keys = [(str(m), str(a), str(r)) for m, a, r in state["served_keys"]]
        calibrations = unpack(state["served_calibration"], state["served_calibration_sizes"])
        facts = zip(
            keys, state["served_expected"], state["served_moments"], calibrations, strict=True
        )
        self._served = {
            key: Served((float(line[0]), float(line[1])), calibration, np.array(moments))
            for key, line, moments, calibration in facts
        }
