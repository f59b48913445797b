"""An engine's pace as it reports it: smoothed over its steps, like the worker's meter."""

from dataclasses import dataclass

_WEIGHT = 0.1
"""Share of the newest step in a smoothed value, as in the worker."""


@dataclass(slots=True)
class Meter:
    """Smoothed seconds.

    Attributes:
        prefill_seconds_per_token: 0 until known.
        decode_step_seconds: of a step that only decodes; 0 until known.
    """

    prefill_seconds_per_token: float = 0.0
    decode_step_seconds: float = 0.0

    def add(self, seconds: float, steps: int, prefill_tokens: int, decodes: int) -> None:
        """Take in steps that took about as long as the last of them, ``seconds``."""
        if prefill_tokens == 0:
            self.decode_step_seconds = _smoothed(self.decode_step_seconds, seconds, steps)
            return
        # What the decodes of a mixed step would have taken alone is not the prompt's.
        theirs = self.decode_step_seconds if decodes else 0.0
        per_token = max(seconds - theirs, 0.0) / prefill_tokens
        self.prefill_seconds_per_token = _smoothed(self.prefill_seconds_per_token, per_token, steps)


def _smoothed(old: float, new: float, steps: int) -> float:
    """Exponential smoothing over equal values, that starts at the first one."""
    return new if old == 0 else new + (1 - _WEIGHT) ** steps * (old - new)
