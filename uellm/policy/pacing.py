"""How much of a step is left to prefill, by the time that those have that decode, and whose."""

from collections.abc import Sequence
from math import inf

import numpy as np

from uellm.policy.latest_start import Outlook, Pace


def paced_tokens(running: Outlook, pace: Pace, now: float) -> tuple[float, float]:
    """Most tokens of a step that keeps in time who decodes and can still be.

    Args:
        running: what is expected of those with a slot.
        pace: of the engine.
        now: in seconds.

    Returns:
        For all to be in time, and for nine in ten; decodes included, infinite where nobody minds.
    """
    decoding, cost = running.decoding, pace.cost
    if cost.per_token <= 0 or not decoding.any():
        return inf, inf
    due = np.fmax(
        running.tpot, running.first_token_at + running.tpot * (running.answered + 1) - now
    )
    each = np.minimum(due, (running.deadline - now) / running.median)[decoding & ~running.lost]
    if not len(each):
        return inf, inf
    each.sort()
    tightest, most = float(each[0]), float(each[len(each) // 10])
    fixed = cost.overhead + cost.per_context * float(running.computed[decoding].sum())
    return (tightest - fixed) / cost.per_token, (most - fixed) / cost.per_token


def paced_chunk(running: Outlook, paced: float, most: int, pace: Pace, least: int) -> int:
    """Prompt tokens of a step.

    What the step computes while it streams the weights costs nothing, and is always allowed.

    Args:
        running: what is expected of those with a slot.
        paced: tokens that keep them in time; see ``paced_tokens``.
        most: tokens that a step may compute.
        pace: of the engine.
        least: tokens, however short of time they are.
    """
    if paced == inf:
        return most
    decodes = int(running.decoding.sum())
    return int(min(max(paced - decodes, least, pace.cost.knee - decodes), most))


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
