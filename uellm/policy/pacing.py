"""How much of a step is left to prefill, by the time that those have that decode, and whose."""

from collections.abc import Sequence
from math import inf

import numpy as np

from uellm.policy.latest_start import Outlook, Pace


def paced_chunk(running: Outlook, most: int, pace: Pace, least: int, now: float) -> int:
    """The largest prefill of a step that keeps all in time that decode and can still be.

    What the step computes while it streams the weights costs nothing, and is always allowed.

    Args:
        running: what is expected of those with a slot.
        most: tokens that a step may compute.
        pace: of the engine.
        least: tokens, however short of time they are.
        now: in seconds.
    """
    decoding, cost = running.decoding, pace.cost
    if cost.per_token <= 0 or not decoding.any():
        return most
    due = np.fmax(
        running.tpot, running.first_token_at + running.tpot * (running.answered + 1) - now
    )
    each = np.minimum(due, (running.deadline - now) / running.median)
    allowed = float(each[decoding & ~running.lost].min(initial=inf))
    if allowed == inf:
        return most
    decodes = int(decoding.sum())
    context = float(running.computed[decoding].sum())
    tokens = (allowed - cost.overhead - cost.per_context * context) / cost.per_token - decodes
    return int(min(max(tokens, least, cost.knee - decodes), most))


def prefill_order(
    running: Outlook, waiting: Outlook | None = None, admitted: Sequence[int] = ()
) -> tuple[str, ...]:
    """Whose prompts are computed first: those that need their first token first, the lost last.

    On one machine no order has fewer delays beyond the largest (Jackson, 1955): a long prompt that
    has time does not keep short ones from theirs.

    Args:
        running: what is expected of those with a slot.
        waiting: what is expected of those without.
        admitted: places of those of them that get one now.
    """
    line = _by_need(running, np.flatnonzero(~running.decoding).tolist())
    if waiting is not None:
        line += _by_need(waiting, admitted)
    return tuple(request_id for *_, request_id in sorted(line))


def _by_need(those: Outlook, places: Sequence[int]) -> list[tuple[bool, float, str]]:
    """Whether some are lost, by when they need their first token, and their ids."""
    return [
        (
            bool(those.lost[i]),
            float(those.latest_start[i] + those.prefill[i]),
            those.sequences[i].request_id,
        )
        for i in places
    ]
