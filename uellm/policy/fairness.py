"""Tenants take turns, by tokens, among requests that are about equally urgent."""

from collections.abc import Iterable, Sequence
from math import frexp

from uellm.policy.latest_start import Outlook
from uellm.policy.views import SequenceView


def in_turns(
    order: Sequence[Outlook], running: Iterable[SequenceView], step: float, now: float
) -> list[Outlook]:
    """The order, with tenants taking turns among requests of one class.

    A class is a priority, and a time left until the request is due: from one power of two of
    steps to the next. Within it, a request comes after those of other tenants before which less
    was given to its own, counted in tokens, those of what runs included (start-time fair queueing:
    Goyal, Vin and Cheng, 1996). With one tenant nothing changes.
    """
    if len({each.sequence.tenant for each in order}) < 2:
        return list(order)
    given: dict[tuple[str, int], float] = {}
    for sequence in running:
        key = (sequence.tenant, sequence.slo.priority)
        given[key] = given.get(key, 0.0) + sequence.prompt_tokens + sequence.output_tokens
    keyed = []
    for place, each in enumerate(order):
        sequence = each.sequence
        key = (sequence.tenant, sequence.slo.priority)
        tag = given.get(key, 0.0)
        given[key] = tag + sequence.prompt_tokens + each.median
        urgency = frexp(max((each.due - now) / step, 1.0))[1]
        keyed.append((urgency, tag, place))
    keyed.sort()
    return [order[place] for _, _, place in keyed]
