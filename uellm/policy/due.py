"""When a request is due, whether or not it says so."""

from uellm.core.request import Priority, Slo

PATIENCE_SECONDS = {Priority.INTERACTIVE: 60.0, Priority.NORMAL: 300.0, Priority.BATCH: 1800.0}
"""How long after its acceptance a request without a deadline is due.

The times are long beside usual deadlines, so that these requests yield, and finite, so that they
never starve: once due they come before every later deadline.
"""


def slo_seconds(slo: Slo) -> float:
    """Time allowed for the whole answer, from its acceptance."""
    if slo.deadline_at is None:
        return PATIENCE_SECONDS[slo.priority]
    return max(slo.deadline_at - slo.accepted_at, 0.0)


def due_at(slo: Slo, now: float, *, started: bool = False) -> float:
    """When a request is due: at its deadline, or when its first token is needed, if that is sooner.

    One without either is due after the patience of its priority. A first token that is there, or
    is late already, does not count any more.
    """
    due = slo.deadline_at
    if slo.ttft_at is not None and slo.ttft_at > now and not started:
        due = slo.ttft_at if due is None else min(due, slo.ttft_at)
    return slo.accepted_at + PATIENCE_SECONDS[slo.priority] if due is None else due
