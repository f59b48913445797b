"""How many tokens a step may compute where memory is short."""

_CALM_STEPS = 32
"""Steps that must fit, after one that did not, before a larger one is tried."""


class RowLimit:
    """Halved when a step does not fit into memory; tried again, one more at a time, ever later.

    Each step that does not fit costs the work of all sequences. So twice as many steps must fit
    after it than after the one before, and the cost of trying stays a bounded share.

    Args:
        most: tokens of a step while memory suffices.

    Attributes:
        rows: most tokens of the next step.
    """

    def __init__(self, most: int) -> None:
        self.rows = most
        self._most = most
        self._calm_steps = _CALM_STEPS
        self._calm_left = 0

    def fitted(self) -> None:
        """A step went well."""
        if self.rows == self._most:
            return
        self._calm_left -= 1
        if self._calm_left <= 0:
            self.rows += 1

    def exceeded(self, rows: int) -> None:
        """A step of so many tokens did not fit.

        Raises:
            MemoryError: if it cannot be smaller.
        """
        if rows == 1:
            raise MemoryError("the memory that is left is too small to compute a single token")
        self.rows = rows // 2
        self._calm_left = self._calm_steps
        self._calm_steps *= 2
