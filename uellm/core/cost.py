"""What a step of an engine takes.

A step streams the weights once, however few tokens it computes; beyond a knee the arithmetic of
the tokens takes longer than that. On top come the KV cache that decodes read and the attention of
prefill chunks within their own sequence.
"""

import math
from dataclasses import dataclass

_MOST_TOKENS = 1 << 30
"""More than any step computes."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """The seconds of a step, by what it computes.

    Attributes:
        overhead: of any step.
        weights: to stream the weights.
        per_token: arithmetic of a token, prefilled or decoded.
        per_context: to read one cached token, for a sequence that decodes.
        per_pair: attention of one token of a prefill chunk to one token at or before it.
    """

    overhead: float
    weights: float
    per_token: float
    per_context: float = 0.0
    per_pair: float = 0.0

    def seconds(self, tokens: float, context: float = 0.0, pairs: float = 0.0) -> float:
        """What a step takes.

        Args:
            tokens: computed in it.
            context: cached tokens that its decodes attend to, over all of them.
            pairs: of its prefill chunks; see ``chunk_pairs``.
        """
        return (
            self.overhead
            + max(self.weights, self.per_token * tokens)
            + self.per_context * context
            + self.per_pair * pairs
        )

    @property
    def knee(self) -> int:
        """The least batch whose arithmetic takes as long as the weights do; at least 1.

        Where arithmetic takes no time, more than any batch.
        """
        return _least_batch(self.weights, self.per_token)

    @property
    def worthwhile(self) -> int:
        """The largest batch that pays: beyond it, steps take longer for everybody in it.

        The knee; or, where the overhead takes longer than the weights, that of the overhead.
        """
        return _least_batch(max(self.weights, self.overhead), self.per_token)

    @property
    def unloaded(self) -> float:
        """Seconds of a step that computes one token without context."""
        return self.seconds(1)

    def prefill(self, tokens: int, chunk_tokens: int) -> float:
        """Seconds to prefill a prompt alone, in chunks of ``chunk_tokens``."""
        if tokens <= 0:
            return 0.0
        whole, rest = divmod(tokens, max(chunk_tokens, 1))
        steps = whole * self.seconds(chunk_tokens) + (self.seconds(rest) if rest else 0.0)
        return steps + self.per_pair * chunk_pairs(0, tokens)

    def isolated(self, prompt_tokens: int, output_tokens: int, chunk_tokens: int) -> float:
        """Seconds from the first to the last token of a request that runs alone."""
        decodes = max(output_tokens - 1, 0)
        context = decodes * prompt_tokens + decodes * (decodes + 1) / 2
        return (
            self.prefill(prompt_tokens, chunk_tokens)
            + decodes * self.unloaded
            + self.per_context * context
        )


def _least_batch(seconds: float, per_token: float) -> int:
    """Tokens that take so long, rounded up; a rounding error does not count."""
    if per_token * _MOST_TOKENS <= seconds:
        return _MOST_TOKENS
    return max(1, math.ceil(seconds / per_token - 1e-9))


DEFAULT_COST = StepCost(0.005, 0.04, 0.001, 1e-6, 1e-7)
"""Assumed of an engine of which nothing is known."""


def chunk_pairs(start: int, count: int) -> float:
    """Pairs of tokens that attention forms in a chunk of ``count`` tokens behind ``start``."""
    return count * start + count * (count + 1) / 2
