"""Who can still be in time together: Moore and Hodgson's selection, on a fluid engine."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Job(NamedTuple):
    """A request that waits, as far as the selection is concerned.

    Attributes:
        latest_start: it is in time if it starts by then.
        slot_seconds: how long it takes a slot.
        kv_token_seconds: KV room that it takes, times how long.
        prefill_seconds: how long its prefill keeps others from theirs.
        kv_tokens: KV room that it takes at its peak.
        committed: it is left out only where nobody else is to blame.
    """

    latest_start: float
    slot_seconds: float
    kv_token_seconds: float
    prefill_seconds: float
    kv_tokens: float
    committed: bool = False


@dataclass(frozen=True, slots=True)
class Fluid:
    """An engine as a fluid: it works off slot and KV time at a constant rate.

    Attributes:
        slots: sequences at once.
        kv_tokens: KV room; 0 if it sets no limit.
        free_slots: of them, those that are free now.
        free_kv_tokens: of it, what is free now.
    """

    slots: int
    kv_tokens: float
    free_slots: int
    free_kv_tokens: float


def late_ones(jobs: Iterable[Job], engine: Fluid, now: float) -> set[int]:
    """Jobs to put behind the others, so that as many as possible of these are in time.

    Jobs that find a free slot and KV room start at once, but for the prefills ahead of them; each
    other one when the engine has worked off those between. Where one would start too late, the
    job that takes the most of the engine so far is left out (Moore 1968, Hodgson's algorithm),
    first of those that nobody is committed to. On
    one slot, with jobs in the order of ``latest_start + slot_seconds``, no choice has fewer late.

    Args:
        jobs: in the order in which they would start.
        engine: what they start on.
        now: in seconds.

    Returns:
        Their places in ``jobs``.
    """
    slots = max(engine.slots, 1)
    kept: list[tuple[bool, float, int, Job]] = []
    late: set[int] = set()
    count, kv_tokens, work, prefill = 0, 0.0, 0.0, 0.0
    for place, job in enumerate(jobs):
        share = _share(job, slots, engine.kv_tokens)
        heapq.heappush(kept, (job.committed, -share, place, job))
        count += 1
        kv_tokens += job.kv_tokens
        at_once = count <= engine.free_slots and kv_tokens <= engine.free_kv_tokens
        start = now + (prefill if at_once else max(work, prefill))
        work += share
        prefill += job.prefill_seconds
        if start > job.latest_start:
            _, negative, dropped, largest = heapq.heappop(kept)
            late.add(dropped)
            count -= 1
            kv_tokens -= largest.kv_tokens
            work += negative
            prefill -= largest.prefill_seconds
    return late


def _share(job: Job, slots: int, kv_tokens: float) -> float:
    """Seconds of the whole engine that a job takes."""
    share = job.slot_seconds / slots
    return max(share, job.kv_token_seconds / kv_tokens) if kv_tokens else share
