"""The most KV room that sequences will take together before they end."""

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

Floats = npt.NDArray[np.float64]


class PeakRoom:
    """Whether another sequence fits beside those that run, at their predicted peak.

    Sequences decode together, each until its end. While the i-th to end of them does, all that
    remain longer have grown by as much: with the longest first, the peak is
    ``max_i sum_{j<=i} held_j + i * remaining_i`` (Gong et al., "Past-Future Scheduler for LLM
    Serving under SLA Guarantees", ASPLOS 2025).

    Args:
        room: KV tokens that the peak may reach.
        held: tokens of each running sequence.
        remaining: what each will still generate.
    """

    def __init__(self, room: float, held: ArrayLike, remaining: ArrayLike) -> None:
        self._room = room
        left = np.asarray(remaining, dtype=np.float64)
        order = np.argsort(-left, kind="stable")
        # Of each sequence minus what it will still generate, ascending, and what it holds.
        self._shorter: Floats = -left[order]
        self._held: Floats = np.asarray(held, dtype=np.float64)[order]

    @property
    def free(self) -> float:
        """Room that is not held at present, whatever is to come."""
        return self._room - float(self._held.sum())

    def fits(self, held: float, remaining: float) -> bool:
        """Whether it does. Alone, everything fits."""
        if not len(self._held):
            return True
        shorter, all_held = self._beside(held, remaining)
        terms = np.cumsum(all_held)
        terms -= np.arange(1, len(terms) + 1) * shorter
        return float(terms.max()) <= self._room

    def add(self, held: float, remaining: float) -> None:
        """Count it as running."""
        self._shorter, self._held = self._beside(held, remaining)

    def remove(self, held: float, remaining: float) -> None:
        """Count one such sequence as gone."""
        (found,) = np.nonzero((self._held == held) & (self._shorter == -remaining))
        if len(found):
            place = found[0]
            self._shorter, self._held = (
                np.concatenate((values[:place], values[place + 1 :]))
                for values in (self._shorter, self._held)
            )

    def _beside(self, held: float, remaining: float) -> tuple[Floats, Floats]:
        """The sequences and one more, in order."""
        place = int(self._shorter.searchsorted(-remaining, side="right"))
        return (
            np.concatenate((self._shorter[:place], (-remaining,), self._shorter[place:])),
            np.concatenate((self._held[:place], (held,), self._held[place:])),
        )
