"""How many tokens a sequence will still generate, from what was predicted and what came already."""

from uellm.core.request import QuantileFunction
from uellm.policy.views import SequenceView

LEAST_OUTGROWN = 16.0
"""An answer beyond all that was predicted goes on for so many tokens, or half of itself."""


def answered_tokens(sequence: SequenceView) -> int:
    """Tokens of the answer that are there, those of earlier replicas included."""
    known = max(sequence.prompt_tokens, sequence.computed_tokens)
    return max(known - sequence.profile.prompt_tokens, sequence.output_tokens, 0)


def remaining_tokens(sequence: SequenceView) -> tuple[float, float, float]:
    """Quantiles of what is still to come, given what came: 10 %, 50 % and 90 %; at least 1."""
    most = max(sequence.max_output_tokens - sequence.output_tokens, 1)
    return left_of(sequence.profile.output_tokens, answered_tokens(sequence), most)


def left_of(lengths: QuantileFunction, answered: int, most: float) -> tuple[float, float, float]:
    """Quantiles of what is still to come of an answer: 10 %, 50 % and 90 %; at least 1.

    Args:
        lengths: of whole answers, as predicted.
        answered: tokens that came.
        most: that may still come.
    """
    if answered >= lengths.values[-1]:
        low = high = max(LEAST_OUTGROWN, answered / 2)
        median = low
    else:
        low, median, high = lengths.given(answered) if answered else lengths.low_median_high
        low, median, high = low - answered, median - answered, high - answered
    return (
        1.0 if low < 1 else min(low, most),
        1.0 if median < 1 else min(median, most),
        1.0 if high < 1 else min(high, most),
    )
