"""How much of a step is left to prefill, by the time that those have that decode."""

from collections.abc import Iterable
from math import inf

from uellm.policy.latest_start import Outlook, Pace
from uellm.policy.remaining import answered_tokens
from uellm.policy.views import EngineView


def paced_chunk(
    running: Iterable[Outlook], engine: EngineView, pace: Pace, least: int, now: float
) -> int:
    """The largest prefill of a step that keeps all in time that decode and can still be.

    What the step computes while it streams the weights costs nothing, and is always allowed.

    Args:
        running: what is expected of those with a slot.
        engine: theirs.
        pace: of its steps.
        least: tokens, however short of time they are.
        now: in seconds.
    """
    allowed, decodes, context = inf, 0, 0
    for each in running:
        sequence = each.sequence
        if sequence.computed_tokens < sequence.prompt_tokens:
            continue
        decodes += 1
        context += sequence.computed_tokens
        if each.lost:
            continue
        slo = sequence.slo
        if slo.tpot_seconds is not None:
            first = sequence.first_token_at
            ahead = (
                0.0
                if first is None
                else first + slo.tpot_seconds * (answered_tokens(sequence) + 1) - now
            )
            allowed = min(allowed, max(slo.tpot_seconds, ahead))
        if slo.deadline_at is not None:
            allowed = min(allowed, (slo.deadline_at - now) / each.median)
    most = engine.max_chunk_tokens
    cost = pace.cost
    if allowed == inf or cost.per_token <= 0:
        return most
    tokens = (allowed - cost.overhead - cost.per_context * context) / cost.per_token - decodes
    least = max(least, cost.knee - decodes)
    return int(min(max(tokens, least), most))
