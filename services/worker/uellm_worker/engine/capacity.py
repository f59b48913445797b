"""What a prepared stage can hold."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much a stage, or a whole replica, can hold.

    Attributes:
        slots: most sequences that run at once.
        max_tokens: longest context of one sequence.
        kv_tokens: KV room in all, in tokens.
    """

    slots: int
    max_tokens: int
    kv_tokens: int

    def at_most(self, other: "Capacity") -> "Capacity":
        """What both can hold."""
        slots = min(self.slots, other.slots)
        max_tokens = min(self.max_tokens, other.max_tokens)
        kv_tokens = min(self.kv_tokens, other.kv_tokens, slots * max_tokens)
        return Capacity(slots, max_tokens, kv_tokens)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the loop has to know of a model's tokens.

    Attributes:
        size: ids run from 0 to size - 1.
        eos_ids: ids that end an answer.
    """

    size: int
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stage whose weights are there.

    Attributes:
        capacity: room for sequences.
        vocabulary: the model's.
        device: "cpu", or "cuda:" and something that no other device in the world has.
        kept_bytes: weights that an earlier generation had left.
        total_bytes: weights in all.
    """

    capacity: Capacity
    vocabulary: Vocabulary
    device: str = "cpu"
    kept_bytes: int = 0
    total_bytes: int = 0
