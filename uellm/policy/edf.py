"""Earliest deadline first."""

from uellm.policy.columns import Columns, Floats
from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.dispatching import Dispatcher, by_due
from uellm.policy.due import due_at
from uellm.policy.estimate import Speed
from uellm.policy.views import SequenceView


class EdfDispatch(Dispatcher):
    """Order by when a request is due; at equal times by priority, then arrival, then as queued.

    It is due at its deadline, or when its first token is needed, if that is sooner. One without
    either is due after the patience of its priority. So is one whose deadline is lost even if a
    short answer started now on the best replica: it runs after those that can still be in time,
    instead of taking their time from them, and still does not starve.
    """

    name = "edf"

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """By when they are due."""
        return (by_due(columns, fastest, now), -columns.priority, columns.accepted)


class EdfStep(OrderedStep):
    """Earliest deadline first."""

    name = "edf"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """By when it is due."""
        started = sequence.first_token_at is not None or sequence.output_tokens > 0
        return (due_at(sequence.slo, now, started=started),)
