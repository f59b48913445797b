"""What steps take under a quota on processors. Pure.

A quota grants so much of a processor's time in every period. What always computes is slowed down by
its share. A step that comes now and then runs freely until that is used up, and then waits for
the next period: short steps are not slowed down at all.
"""

import math

_EXACT = 1e-9
_HALVINGS = 30
_OFFSETS, _STEPS = 5, 16
"""Of steps within a period, and how many of them are played."""


def step_seconds(
    sustained: float, share: float, period: float, busy: float = 0.0, others: float = 0.0
) -> float:
    """What a step takes, on the average.

    Args:
        sustained: seconds if the device always computes.
        share: of the time that it may.
        period: of the quota, in seconds; 0: as short as can be.
        busy: share of what the quota grants that such steps use; one comes as often as that says.
        others: share of it that other work uses.
    """
    free = sustained * share
    if share >= 1 or period <= 0 or busy + others >= 1 or sustained <= 0:
        return sustained
    granted = share * period * (1 - others)
    if sustained * (1 - busy) >= busy * period:
        # Behind each step there is a period that nothing is used of.
        took = free + _waits(free, granted, period)
    else:
        took = _played(free, granted, period, sustained / busy)
    return min(max(took, free), sustained)


def _played(free: float, granted: float, period: float, every: float) -> float:
    """Mean seconds of steps that begin every so many seconds, or when the one before is over."""
    total = 0.0
    for offset in range(_OFFSETS):
        at = spent = 0.0
        number = 0
        for step in range(_STEPS):
            begun = max(offset / _OFFSETS * period + step * every, at)
            if begun // period > number:
                number, spent = int(begun // period), 0.0
            run = min(free, granted - spent, (number + 1) * period - begun)
            at, spent = begun + run, spent + run
            if (left := free - run) > _EXACT * free:
                whole = math.ceil(left / granted - _EXACT) - 1
                number += 1 + whole
                spent = left - whole * granted
                at = number * period + spent
            total += at - begun
    return total / (_OFFSETS * _STEPS)


def sustained_seconds(
    took: float, share: float, period: float, busy: float = 0.0, others: float = 0.0
) -> float:
    """What a step would take if the device always computed, that took so long; see above.

    Where several would, as a step that just lasts or does not last its quota: about the longest.
    """
    if share >= 1 or period <= 0:
        return took
    least, most = took, took / share
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if step_seconds(middle, share, period, busy, others) <= took:
            least = middle
        else:
            most = middle
    return least


def _waits(free: float, granted: float, period: float) -> float:
    """Seconds that a step waits which begins at any time of a period of which nothing is used.

    With ``free`` seconds of work and ``granted`` of each period: where more than ``granted`` are
    left of the first period, it waits for the rest of that; else for none of it. Behind that it
    waits in every period but the last.
    """
    if free <= granted:
        return 0.0
    idle, beyond = period - granted, free - granted
    later = math.ceil(beyond / granted - _EXACT) - 1
    return idle / period * (idle * (0.5 + later) + beyond)
