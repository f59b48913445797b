"""What is forecast of requests, and what can be promised of them: plain numbers, a row each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uellm.policy.rows import Flags, Floats, Places

WAIT = 0
"""Place of the feature that is the share of waiting."""


@dataclass(frozen=True, slots=True)
class Forecasts:
    """What some requests can expect; times are seconds from now. Arrays have one row each.

    Attributes:
        ids: of the requests.
        kind: which of them are alike; see ``uellm.policy.columns.kind_of``.
        start: until the first token.
        finish: until the last one.
        drained: until the last one, if everybody else goes first.
        spread: of the logarithm of ``finish``.
        ttft: until the first token is needed; infinite: whenever.
        deadline: until the last one is needed; infinite: whenever.
        features: what the truth may depend on besides; logarithms, shape (requests, FEATURES).
    """

    ids: Sequence[str]
    kind: Floats
    start: Floats
    finish: Floats
    drained: Floats
    spread: Floats
    ttft: Floats
    deadline: Floats
    features: Floats

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def waits(self) -> Flags:
        """Who finds no slot free."""
        waits: Flags = self.features[:, WAIT] > 0
        return waits

    @property
    def group(self) -> Places:
        """Kinds, and who of them waits: those that do share more of their fate (Vovk, 2003)."""
        group: Places = 2 * self.kind.astype(np.intp) + self.waits
        return group

    def one(self, row: int) -> "Forecasts":
        """Of one of the requests; nothing is copied."""
        return self._at(slice(row, row + 1), self.ids[row : row + 1])

    def some(self, rows: Places) -> "Forecasts":
        """Of some of the requests."""
        return self._at(rows, [self.ids[row] for row in rows.tolist()])

    def _at(self, rows: Places | slice, ids: Sequence[str]) -> "Forecasts":
        return Forecasts(
            ids,
            self.kind[rows],
            self.start[rows],
            self.finish[rows],
            self.drained[rows],
            self.spread[rows],
            self.ttft[rows],
            self.deadline[rows],
            self.features[rows],
        )


@dataclass(frozen=True, slots=True)
class Prospects:
    """What can be promised to some requests, one row each.

    Attributes:
        times: of the first and the last token, at each of ``LEVELS``: shape (requests, 2, 2).
        p_meet: probability of being in time; nan where nothing is asked.
        said: the same before the track record of such probabilities corrected it.
        in_turn: the same if the policy's order were kept.
    """

    times: Floats
    p_meet: Floats
    said: Floats
    in_turn: Floats
