"""Shortest job first, by predicted length."""

from uellm.policy.columns import Columns, Floats
from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.dispatching import Dispatcher, WaitSettings, overdue_first
from uellm.policy.estimate import Speed
from uellm.policy.remaining import remaining_tokens
from uellm.policy.views import SequenceView


class SjfDispatch(Dispatcher):
    """Short answers first, by the median of what is still to come; then by arrival."""

    name = "sjf"
    settings_type = WaitSettings

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """By length, then arrival."""
        del fastest
        keys = (columns.median, columns.accepted)
        return overdue_first(keys, columns, now, self._options.max_wait_seconds)


class SjfStep(OrderedStep):
    """Shortest job first: by the tokens still to be generated, at the median."""

    name = "sjf"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """Short ones first."""
        del now
        return (remaining_tokens(sequence)[1],)
