"""Shortest job first, by predicted length."""

from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.remaining import remaining_tokens
from uellm.policy.views import SequenceView


class SjfStep(OrderedStep):
    """Shortest job first: by the tokens still to be generated, at the median."""

    name = "sjf"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """Short ones first."""
        del now
        return (remaining_tokens(sequence)[1],)
