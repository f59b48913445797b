"""First come, first served: the order every other policy is measured against."""

from uellm.policy.columns import Columns, Floats
from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.dispatching import Dispatcher
from uellm.policy.estimate import Speed
from uellm.policy.views import SequenceView


class FcfsDispatch(Dispatcher):
    """Order by arrival; a request that was given back keeps the place of its first arrival."""

    name = "fcfs"

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """By when they were accepted."""
        del fastest, now
        return (columns.accepted,)


class FcfsStep(OrderedStep):
    """First come, first served: as vLLM does it."""

    name = "fcfs"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """By arrival."""
        del sequence, now
        return ()
