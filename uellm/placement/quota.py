"""What steps take under a quota on processors. Pure.

A quota grants so much of a processor's time in every period. What always computes is slowed down by
its share. A step that comes now and then runs freely until that is used up, and then waits for
the next period: short steps are not slowed down at all.
"""

import math

_EXACT = 1e-9


def step_seconds(sustained: float, share: float, period: float, busy: float = 0.0) -> float:
    """What a step takes, on the average.

    Args:
        sustained: seconds if the device always computes.
        share: of the time that it may.
        period: of the quota, in seconds; 0: as short as can be.
        busy: share of what the quota grants that is used, this step counted.
    """
    free = sustained * share
    if share >= 1 or period <= 0:
        return sustained
    fresh = free + _waits(free, share * period, period)
    # The more steps there are, the less of the quota does one find.
    return min(fresh, sustained) + max(sustained - fresh, 0.0) * min(busy, 1.0) ** 2


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
