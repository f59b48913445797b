"""By priority, then arrival."""

from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.views import SequenceView


class PriorityStep(OrderedStep):
    """By priority, then arrival: as vLLM does it."""

    name = "priority"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """Urgent classes first."""
        del now
        return (-float(sequence.slo.priority),)
