"""Where the room of the KV cache went."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvUsage:
    """An account of the KV cache, in tokens; it is the same on every stage.

    Attributes:
        total_tokens: the budget.
        used_tokens: held for sequences that run.
        reserved_tokens: what these may come to without asking; at least what they hold, in whole
            blocks.
        cached_tokens: held of sequences that are over, until the room is needed.
        committed_tokens: in blocks that are in memory; never more than the budget.
        fragmented_tokens: in blocks in memory of sequences that run, and not held by them.
        hit_tokens: taken from the cache instead of being computed, since the start.
        block_tokens: room is given in blocks of so many.
    """

    total_tokens: int
    used_tokens: int
    reserved_tokens: int
    cached_tokens: int
    committed_tokens: int
    fragmented_tokens: int
    hit_tokens: int
    block_tokens: int

    @property
    def free_tokens(self) -> int:
        """Room for new reservations; cached prefixes give way to them."""
        return self.total_tokens - self.reserved_tokens
