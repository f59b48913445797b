"""By priority, then arrival."""

from uellm.policy.columns import Columns, Floats
from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.dispatching import Dispatcher, WaitSettings, overdue_first
from uellm.policy.estimate import Speed
from uellm.policy.views import SequenceView


class PriorityDispatch(Dispatcher):
    """Urgent classes first, by arrival within each."""

    name = "priority"
    settings_type = WaitSettings

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """By priority, then arrival."""
        del fastest
        keys = (-columns.priority, columns.accepted)
        return overdue_first(keys, columns, now, self._options.max_wait_seconds)


class PriorityStep(OrderedStep):
    """By priority, then arrival: as vLLM does it."""

    name = "priority"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """Urgent classes first."""
        del now
        return (-float(sequence.slo.priority),)
