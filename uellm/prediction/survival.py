"""What exceeds what: distributions of lengths of which some were cut, and what is still to come."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def survival_of(values: Floats, censored: Flags, weights: Floats) -> tuple[Floats, Floats]:
    """Kaplan-Meier estimate from weighted, right-censored values.

    A censored value counts as "at least": it is at risk up to itself and its mass moves to the
    larger ones. What is left beyond the largest is put there.

    Returns:
        The values, ascending, and the probability of more than each; the last is 0.
    """
    # At equal values the ended come first: a censored one is at risk there still.
    order = np.lexsort((censored, values))
    values, weights = values[order], weights[order]
    at_risk = np.cumsum(weights[::-1])[::-1]
    ended = np.where(censored[order], 0.0, weights)
    survival = np.cumprod(1.0 - ended / at_risk, dtype=np.float64)
    survival[-1] = 0.0
    return values, survival
