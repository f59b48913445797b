"""How much KV room a sequence is given in advance."""

import math

from uellm.core.request import ResourceProfile

_OUTGROWN_SHARE = 8
"""An answer beyond its 90 % quantile is expected to go on for this part of it; see ``estimate``."""


def reserve_tokens(
    profile: ResourceProfile, *, prompt_tokens: int, known_tokens: int, limit_tokens: int
) -> int:
    """KV room that a sequence will probably not exceed, in tokens: preemption is the exception.

    Args:
        profile: predicts the whole answer; its 90 % quantile is reserved.
        prompt_tokens: of the prompt.
        known_tokens: of the prompt, and of the answer so far.
        limit_tokens: most that both may come to.

    Returns:
        At least one token more than are known, if the limit allows it.
    """
    high = max(math.ceil(profile.output_tokens.low_median_high[2]), 1)
    if known_tokens < prompt_tokens + high:
        return min(prompt_tokens + high, limit_tokens)
    return min(known_tokens + math.ceil(high / _OUTGROWN_SHARE), limit_tokens)
