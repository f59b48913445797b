"""Tenants take turns, by tokens, among requests that are about equally urgent."""

from collections.abc import Iterable, Sequence
from math import frexp
from typing import NamedTuple


class Turn(NamedTuple):
    """What counts of a request.

    Attributes:
        tenant: whose it is.
        priority: its class.
        tokens: that it takes, prompt and answer.
        seconds: until it is due.
    """

    tenant: str
    priority: int
    tokens: float
    seconds: float


def in_turns(
    order: Sequence[Turn], given: Iterable[tuple[str, int, float]], step: float
) -> Sequence[int]:
    """The order, with tenants taking turns among requests of one class.

    A class is a priority, and a time left until the request is due: from one power of two of
    steps to the next. Within it, a request comes after those of other tenants before which less
    was given to its own, counted in tokens, those of what runs included (start-time fair queueing:
    Goyal, Vin and Cheng, 1996). With one tenant nothing changes.

    Args:
        order: of the requests.
        given: tenant, priority and tokens of what runs.
        step: seconds of a step.

    Returns:
        Places in ``order``.
    """
    if len({turn.tenant for turn in order}) < 2:
        return range(len(order))
    sums: dict[tuple[str, int], float] = {}
    for tenant, priority, tokens in given:
        sums[tenant, priority] = sums.get((tenant, priority), 0.0) + tokens
    keyed = []
    for place, turn in enumerate(order):
        key = (turn.tenant, turn.priority)
        tag = sums.get(key, 0.0)
        sums[key] = tag + turn.tokens
        keyed.append((frexp(max(turn.seconds / step, 1.0))[1], tag, place))
    keyed.sort()
    return [place for _, _, place in keyed]
