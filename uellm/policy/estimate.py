"""How fast replicas are, and what a request takes of one at least.

A request takes ``prefill + tokens · step`` seconds. How long it waits for that is another matter:
``uellm.policy.forecast``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from operator import attrgetter

import numpy as np

from uellm.policy.remaining import left_of
from uellm.policy.rows import Floats
from uellm.policy.views import QueuedView, ReplicaView

DEFAULT_PREFILL_SECONDS_PER_TOKEN = 0.001
"""Assumed until a replica or its deployer says otherwise."""
DEFAULT_STEP_SECONDS = 0.05
"""Assumed until a replica or its deployer says otherwise."""
Z90 = 1.2816
"""The standard normal's 90 % quantile."""


_SENT = attrgetter("dispatched_at", "prompt_tokens", "output_p50", "output_p90")


@dataclass(frozen=True, slots=True)
class Speed:
    """A replica's pace, in seconds."""

    prefill_per_token: float
    step: float
    epoch: int = 0


def speed_of(replica: ReplicaView) -> Speed:
    """A replica's pace; the stated defaults for what it does not know yet."""
    return Speed(
        replica.prefill_seconds_per_token or DEFAULT_PREFILL_SECONDS_PER_TOKEN,
        replica.decode_step_seconds or DEFAULT_STEP_SECONDS,
        replica.epoch,
    )


def peak_tokens(request: QueuedView) -> float:
    """KV room a request will probably not exceed, in tokens."""
    length = request.profile.output_tokens.low_median_high[2]
    if request.max_tokens:
        length = min(length, float(request.max_tokens))
    return request.profile.prompt_tokens + max(length, request.resume_tokens + 1.0)


def shortest_seconds(request: QueuedView, fastest: Speed) -> float:
    """What a request takes if it starts at once, alone, and stays short (10 % quantile)."""
    low = request.profile.output_tokens.low_median_high[0]
    return (
        _prefill_tokens(request) * fastest.prefill_per_token
        + max(low - request.resume_tokens, 1.0) * fastest.step
    )


def first_token_seconds(request: QueuedView, fastest: Speed) -> float:
    """Until the first token of a request that starts at once, alone."""
    return _prefill_tokens(request) * fastest.prefill_per_token + fastest.step


def fastest_of(replicas: Sequence[ReplicaView]) -> Speed | None:
    """The best pace of any replica, for optimistic tests; None without replicas."""
    speeds = [speed_of(replica) for replica in replicas]
    if not speeds:
        return None
    return Speed(min(s.prefill_per_token for s in speeds), min(s.step for s in speeds))


def _prefill_tokens(request: QueuedView) -> int:
    return request.profile.prompt_tokens + request.resume_tokens


def progress(view: ReplicaView, now: float) -> Floats:
    """How far those are that a replica was sent: since then, and what is left of each.

    From how far it was when that was last looked at, or else from its time.

    Returns:
        Tokens that came; tokens that are to come, median and 90 % quantile; shape (3, in flight).
    """
    speed, sent = speed_of(view), view.in_flight
    facts = np.fromiter(chain.from_iterable(map(_SENT, sent)), np.float64, 4 * len(sent))
    at, prompt, median, most = facts.reshape(-1, 4).T
    came = np.maximum(now - at - prompt * speed.prefill_per_token, 0.0) / speed.step
    left = np.where(came < most, (most - came) / 2, most / 8)
    left = np.maximum(np.where(came < median, median - came, left), 1.0)
    found = np.stack([np.minimum(came, most), left, np.maximum(most - came, left)])
    if view.answered:
        since = max(now - view.answered_at, 0.0) / speed.step
        for place, request in enumerate(sent):
            answered = view.answered.get(request.request_id)
            if answered is not None and request.request is not None:
                lengths, before = request.request.profile.output_tokens, request.request
                _, soon, late = left_of(lengths, answered.tokens, inf)
                soon = max(soon - since, 1.0)
                came_since = answered.tokens - before.resume_tokens + since
                found[:, place] = came_since, soon, max(late - since, soon)
    return found
