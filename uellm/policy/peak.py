"""The most KV room that sequences will take together before they end."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class PeakRoom:
    """Whether another sequence fits beside those that run, at their predicted peak.

    Sequences decode together, each until its end. While the i-th to end of them does, all that
    remain longer have grown by as much: with the longest first, the peak is
    ``max_i sum_{j<=i} held_j + i * remaining_i`` (Gong et al., "Past-Future Scheduler for LLM
    Serving under SLA Guarantees", ASPLOS 2025).

    Attributes:
        room: KV tokens that the peak may reach.
        shorter: minus what each sequence will still generate, ascending.
        held: tokens of each, in the same order.
    """

    room: float
    shorter: Floats
    held: Floats

    @property
    def free(self) -> float:
        """Room that is not held at present, whatever is to come."""
        return self.room - float(self.held.sum())

    @property
    def fits(self) -> bool:
        """Whether all that are there do. Alone, everything fits."""
        count = len(self.held)
        if count <= 1:
            return True
        terms = self.held.cumsum()
        terms -= np.arange(1, count + 1) * self.shorter
        return float(terms.max()) <= self.room

    def beside(self, held: float, remaining: float) -> "PeakRoom":
        """The same with one more sequence, whether that fits or not."""
        place = int(self.shorter.searchsorted(-remaining, side="right"))
        shorter, all_held = (
            np.concatenate((values[:place], (more,), values[place:]))
            for values, more in ((self.shorter, -remaining), (self.held, held))
        )
        return PeakRoom(self.room, shorter, all_held)

    def without(self, held: float, remaining: float) -> "PeakRoom":
        """The same without one such sequence, if there is one."""
        place = int(self.shorter.searchsorted(-remaining))
        some = np.flatnonzero(self.held[place:] == held)
        if len(some) and self.shorter[place := place + int(some[0])] == -remaining:
            shorter, all_held = (
                np.concatenate((values[:place], values[place + 1 :]))
                for values in (self.shorter, self.held)
            )
            return PeakRoom(self.room, shorter, all_held)
        return self


def peak_room(room: float, held: ArrayLike, remaining: ArrayLike) -> PeakRoom:
    """The room beside those that run.

    Args:
        room: KV tokens that the peak may reach.
        held: tokens of each running sequence.
        remaining: what each will still generate.
    """
    shorter = -np.asarray(remaining, dtype=np.float64)
    order = np.argsort(shorter, kind="stable")
    return PeakRoom(room, shorter[order], np.asarray(held, dtype=np.float64)[order])
