"""What a prepared stage can hold."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much a stage, or a whole replica, can hold.

    Attributes:
        slots: most sequences that run at once.
        max_tokens: longest context of one sequence.
        kv_tokens: KV room in all, in tokens: whole blocks.
        spare_slots: slots of the cache beyond these, for the prefixes of sequences that are over.
        block_tokens: memory is committed by so many tokens; 1: all of it is, from the start.
        sharing: what was computed of a prompt may serve others that begin like it.
    """

    slots: int
    max_tokens: int
    kv_tokens: int
    spare_slots: int = 0
    block_tokens: int = 1
    sharing: bool = True

    @property
    def cache_slots(self) -> int:
        """Slots of the cache."""
        return self.slots + self.spare_slots

    def at_most(self, other: "Capacity") -> "Capacity":
        """What both can hold."""
        slots = min(self.slots, other.slots)
        sharing = self.sharing and other.sharing
        cache_slots = min(self.cache_slots, other.cache_slots) if sharing else slots
        block = math.lcm(self.block_tokens, other.block_tokens)
        longest = min(self.max_tokens, other.max_tokens)
        room = cache_slots * _whole(longest + block - 1, block)
        kv_tokens = _whole(min(self.kv_tokens, other.kv_tokens, room), block)
        longest = min(longest, kv_tokens)
        return Capacity(slots, longest, kv_tokens, cache_slots - slots, block, sharing)


def fit(
    slots: int, max_tokens: int, kv_bytes: int, bytes_per_token: int, block_tokens: int
) -> Capacity:
    """What fits the memory that was granted.

    Where memory can be committed by blocks, the grant is the budget of all slots together, each of
    them has virtual room for the longest context, and there are as many slots again for prefixes;
    no more than there are blocks. Otherwise every slot takes the memory of the longest context;
    where not even one fits, the context is shortened.

    Args:
        slots: most sequences that are to run at once.
        max_tokens: longest context wanted.
        kv_bytes: granted; 0: as much as it takes.
        bytes_per_token: of keys and values, in all layers.
        block_tokens: memory can be committed by so many tokens; 1: it cannot.

    Returns:
        The capacity; ``max_tokens`` is 0 if nothing fits.
    """
    room = kv_bytes // bytes_per_token if kv_bytes else None
    longest = _whole(max_tokens + block_tokens - 1, block_tokens)
    if block_tokens > 1 and (room is None or _in_blocks(slots, max_tokens, room, block_tokens)):
        whole = slots * longest
        kv_tokens = whole if room is None else min(_whole(room, block_tokens), 2 * whole)
        # Every sequence takes a block at least.
        slots = min(slots, kv_tokens // block_tokens)
        return Capacity(slots, min(max_tokens, kv_tokens), kv_tokens, slots, block_tokens)
    if room is None:
        return Capacity(slots, max_tokens, slots * max_tokens)
    max_tokens = min(max_tokens, room)
    cache_slots = min(2 * slots, room // max(max_tokens, 1))
    slots = min(slots, cache_slots)
    return Capacity(slots, max_tokens, cache_slots * max_tokens, cache_slots - slots)


def fit_pages(
    slots: int, max_tokens: int, kv_bytes: int, bytes_per_token: int, page_tokens: int
) -> Capacity:
    """What fits where each slot is a page of a kernel's, and one more is nobody's.

    Args:
        slots: as of ``fit``.
        max_tokens: as of ``fit``.
        kv_bytes: as of ``fit``.
        bytes_per_token: as of ``fit``.
        page_tokens: pages are as long as multiples of this.

    Returns:
        As ``fit``.
    """
    page = _whole(max_tokens + page_tokens - 1, page_tokens)
    if not kv_bytes:
        return fit(slots, max_tokens, 0, bytes_per_token, 1)
    pages = kv_bytes // (page * bytes_per_token)
    if pages < 2:
        # One sequence at a time, as long as half of what there is.
        page = _whole(kv_bytes // (2 * bytes_per_token), page_tokens)
        pages = 2
    longest = min(max_tokens, page)
    cache_slots = min(2 * slots, pages - 1)
    slots = min(slots, cache_slots)
    return Capacity(slots, longest, cache_slots * longest, cache_slots - slots)


def fit_hybrid(
    slots: int,
    max_tokens: int,
    kv_bytes: int,
    bytes_per_token: int,
    block_tokens: int,
    state_bytes: int,
) -> Capacity:
    """What fits where sequences have a recurrent state, and share no prefixes.

    A state is there from the start, for every slot; keys and values have the rest.

    Args:
        slots: as of ``fit``.
        max_tokens: as of ``fit``.
        kv_bytes: granted for both.
        bytes_per_token: as of ``fit``; 0 in a stage without attention.
        block_tokens: as of ``fit``.
        state_bytes: of one sequence, in all layers.

    Returns:
        As ``fit``.
    """
    granted = bool(kv_bytes)
    if granted:
        # Plans grant the longest context to every slot.
        slots = min(slots, max(kv_bytes // (state_bytes + max_tokens * bytes_per_token), 1))
        kv_bytes -= slots * state_bytes
        if kv_bytes < bytes_per_token:
            return Capacity(slots, 0, 0, sharing=False)
    if not bytes_per_token:
        # As the stages that have attention find it, of which nothing may be taken away.
        blocks = not granted or _in_blocks(slots, max_tokens, slots * max_tokens, block_tokens)
        block = block_tokens if blocks else 1
        room = slots * _whole(max_tokens + block - 1, block)
        return Capacity(slots, max_tokens, room, 0, block, sharing=False)
    found = fit(slots, max_tokens, kv_bytes, bytes_per_token, block_tokens)
    block = found.block_tokens
    most = found.slots * _whole(found.max_tokens + block - 1, block)
    return replace(found, kv_tokens=min(found.kv_tokens, most), spare_slots=0, sharing=False)


def _in_blocks(slots: int, max_tokens: int, room: int, block_tokens: int) -> bool:
    """Whether whole blocks hold as much of what is wanted as single tokens would.

    Short contexts may be more in number where each takes no more than it can fill, and the longest
    may fit to the token only.
    """
    if max_tokens < block_tokens:
        return room >= slots * block_tokens
    return _whole(room, block_tokens) >= max_tokens


def _whole(tokens: int, block_tokens: int) -> int:
    """Rounded down to whole blocks."""
    return tokens // block_tokens * block_tokens


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
        device: where activations come in: "cpu", or the kind of another and something that no
            other device in the world has.
        kept_bytes: weights that an earlier generation had left.
        total_bytes: weights in all.
        held: weights and KV cache on each device, by id, in layer order.
    """

    capacity: Capacity
    vocabulary: Vocabulary
    device: str = "cpu"
    kept_bytes: int = 0
    total_bytes: int = 0
    held: tuple[tuple[str, int], ...] = ()
