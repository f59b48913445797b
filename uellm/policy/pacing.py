"""How much of a step is left to prefill, by the time that those have that decode."""

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
