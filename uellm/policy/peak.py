"""The most KV room that sequences will take together before they end."""

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

Floats = npt.NDArray[np.float64]


def future_peak(held: Floats, remaining: Floats) -> float:
    """The predicted peak of sequences that decode together, each until its end.

    While the i-th to end of them does, all that remain longer have grown by as much: with the
    longest first, the peak is ``max_i sum_{j<=i} held_j + i * remaining_i`` (Gong et al.,
    "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025).

    Args:
        held: tokens of each now.
        remaining: tokens that each will still generate.
    """
    if not len(held):
        return 0.0
    order = np.argsort(-remaining, kind="stable")
    left = remaining[order]
    return float((np.cumsum(held[order]) + np.arange(1, len(held) + 1) * left).max())


class PeakRoom:
    """Whether another sequence fits beside those that run, at their predicted peak.

    Args:
        room: KV tokens that the peak may reach.
        held: tokens of each running sequence.
        remaining: what each will still generate.
    """

    def __init__(self, room: float, held: ArrayLike, remaining: ArrayLike) -> None:
        self._room = room
        self._held = np.array(held, dtype=np.float64)
        self._remaining = np.array(remaining, dtype=np.float64)

    def fits(self, held: float, remaining: float) -> bool:
        """Whether it does. Alone, everything fits."""
        if not len(self._held):
            return True
        return (
            future_peak(np.append(self._held, held), np.append(self._remaining, remaining))
            <= self._room
        )

    def add(self, held: float, remaining: float) -> None:
        """Count it as running."""
        self._held = np.append(self._held, held)
        self._remaining = np.append(self._remaining, remaining)

    def remove(self, held: float, remaining: float) -> None:
        """Count one such sequence as gone."""
        (found,) = np.nonzero((self._held == held) & (self._remaining == remaining))
        self._held = np.delete(self._held, found[:1])
        self._remaining = np.delete(self._remaining, found[:1])
