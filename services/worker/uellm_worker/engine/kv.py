"""Who holds which part of the KV cache: slots, blocks, reservations, and prefixes used again.

The manager runs on stage 0 and touches no tensor. It decides, and what it decides reaches every
stage as *moves* in the plan of a step: releases and copies, to be carried out in their order before
the step computes. All stages take the steps in the same order, so that the account kept here is
exact for each of them, however many steps are under way.

What a slot holds lies contiguously in *virtual* memory, and takes real memory by blocks (Prabhu et
al., "vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention", arXiv
2405.04437).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from uellm_worker.engine.kv_usage import KvUsage
from uellm_worker.engine.plan import Copy, Move, Release
from uellm_worker.engine.prefixes import PIECE_TOKENS, PrefixIndex


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot given to a sequence.

    Attributes:
        slot: which.
        cached_tokens: so many of its tokens need not be computed.
    """

    slot: int
    cached_tokens: int


@dataclass(slots=True)
class _Slot:
    """What a slot takes.

    Attributes:
        committed: blocks in memory.
        reserved: blocks promised to its sequence.
        busy: it has a sequence.
        planned: tokens that the step being planned adds to its content.
    """

    committed: int = 0
    reserved: int = 0
    busy: bool = False
    planned: list[int] = field(default_factory=list)

    @property
    def charge(self) -> int:
        """Blocks that count against the budget while it is busy."""
        return max(self.committed, self.reserved)


class KvManager:
    """The account of the KV cache of all stages of a replica.

    A sequence is seated with a reservation. Within it, it always can grow; beyond it, as long as
    there is room that nobody has reserved. What a sequence leaves behind is kept as a prefix: where
    it is, or in another free slot when a new sequence comes; for these take the lowest slots, so
    that attention finds them side by side. Prefixes are lost from their ends, least recently used
    first, when sequences grow.

    Between two calls of ``flush`` lies the planning of one step. Its order is free: what the step
    is going to compute counts as content only after it.

    Args:
        slots: most sequences at once.
        max_tokens: per slot.
        kv_tokens: the budget of all slots together.
        block_tokens: memory comes in blocks of so many tokens; the budget is rounded down to them.
        spare_slots: further slots, numbered behind the others, that only keep prefixes.
        groups: the slots fall into so many ranges, one for each step that is under way at a time,
            so that what decodes together lies together; slot s is in ``s * groups // slots``.
        sharing: content can be used by another sequence; not so where a state covers all tokens.

    Raises:
        ValueError: if a number is below its least.
    """

    def __init__(
        self,
        slots: int,
        max_tokens: int,
        kv_tokens: int,
        block_tokens: int,
        *,
        spare_slots: int = 0,
        groups: int = 1,
        sharing: bool = True,
    ) -> None:
        if not 1 <= groups <= slots:
            raise ValueError(f"{groups} groups of {slots} slots: at least one, at most a slot each")
        if not 1 <= block_tokens <= kv_tokens:
            raise ValueError(f"kv_tokens {kv_tokens}: at least one block of {block_tokens} tokens")
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}: at least 1")
        self._max_tokens = max_tokens
        self._block_tokens = block_tokens
        self._budget = kv_tokens // block_tokens
        self._sharing = sharing
        self._slots = [_Slot() for _ in range(slots + spare_slots)]
        bounds = [-(-slots * group // groups) for group in range(groups + 1)]
        self._ranges = [range(first, end) for first, end in pairwise(bounds)]
        self._group_of = [group for group, slots in enumerate(self._ranges) for _ in slots]
        self._seated: set[int] = set()
        self._index = PrefixIndex(slots + spare_slots)
        # Least recently used first; in blocks: what busy slots are charged, what is in memory.
        self._cached: dict[int, None] = {}
        self._charged = 0
        self._committed = 0
        self._hit_tokens = 0
        self._grown: dict[int, None] = {}
        self._moves: list[Move] = []

    @property
    def total_tokens(self) -> int:
        """The budget, in whole blocks."""
        return self._budget * self._block_tokens

    @property
    def free_tokens(self) -> int:
        """Room for new reservations; cached prefixes give way to them."""
        return (self._budget - self._charged) * self._block_tokens

    @property
    def usage(self) -> KvUsage:
        """The account as it is now."""
        used = sum(map(self._length, self._seated))
        committed = sum(self._slots[number].committed for number in self._seated)
        return KvUsage(
            total_tokens=self.total_tokens,
            used_tokens=used,
            reserved_tokens=self._charged * self._block_tokens,
            cached_tokens=sum(map(self._index.length, self._cached)),
            committed_tokens=self._committed * self._block_tokens,
            fragmented_tokens=committed * self._block_tokens - used,
            hit_tokens=self._hit_tokens,
            block_tokens=self._block_tokens,
        )

    @property
    def block_tokens(self) -> int:
        """Room is given in blocks of so many tokens."""
        return self._block_tokens

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self._block_tokens)

    @property
    def groups(self) -> Sequence[range]:
        """The slots of each group."""
        return self._ranges

    def group(self, number: int) -> int:
        """The group of a slot that is not spare."""
        return self._group_of[number]

    def _length(self, number: int) -> int:
        """Tokens that a slot holds after the step being planned."""
        return self._index.length(number) + len(self._slots[number].planned)

    # ---- the life of a sequence ----------------------------------------------------------------

    def seat(
        self,
        tokens: Sequence[int],
        *,
        reserve_tokens: int,
        group: int | None = None,
        scope: str = "",
    ) -> Seat | None:
        """Give a sequence a slot, with the longest prefix of it that any slot holds.

        The last token is always left to be computed: the next one follows from it.

        Args:
            tokens: of the sequence, all that are known.
            reserve_tokens: what it is expected to come to, ``tokens`` included.
            group: the range its slot is to lie in; None for any.
            scope: prefixes are shared within it only, such as those of one adapter.

        Returns:
            None if every slot of the group is busy, or the reservation does not fit.

        Raises:
            ValueError: if there is no token, or more than a slot holds.
        """
        if not 0 < len(tokens) <= self._max_tokens:
            raise ValueError(f"{len(tokens)} tokens: at least one, at most {self._max_tokens}")
        slots = range(self._ranges[-1].stop) if group is None else self._ranges[group]
        free = [number for number in slots if not self._slots[number].busy]
        reserved = self.blocks(min(max(reserve_tokens, len(tokens)), self._max_tokens))
        if not free or reserved > self._budget - self._charged:
            return None
        # A state that covers all tokens fits no other sequence.
        cached, holders = self._index.longest(tokens[:-1], scope) if self._sharing else (0, [])
        number, source = self._choose(free, cached, holders)
        slot = self._slots[number]
        if number in self._cached and not (source == number and self._used_up(number, cached)):
            self._archive(number, source)
        self._cached.pop(number, None)
        stays = cached if source == number else 0
        self._index.truncate(number, stays)
        self._index.begin(number, scope)
        self._shrink(number, self.blocks(stays))
        slot.busy, slot.reserved = True, reserved
        self._seated.add(number)
        self._charged += slot.charge
        if source is not None and source != number:
            cached = self._copy(source, number, cached)
        if source in self._cached:
            self._cached[source] = self._cached.pop(source)
            if self._used_up(source, cached):
                self.discard(source)
        self._hit_tokens += cached
        return Seat(number, cached)

    def grow(self, number: int, tokens: Sequence[int]) -> bool:
        """The step being planned computes these tokens behind those that the slot holds.

        Returns:
            False if there is no room: somebody has to leave first.

        Raises:
            ValueError: if the slot is nobody's, or too short.
        """
        slot = self._slots[number]
        length = self._length(number) + len(tokens)
        if not slot.busy or length > self._max_tokens:
            raise ValueError(
                f"{length} tokens in slot {number}: at most {self._max_tokens}, of a sequence"
            )
        needed = self.blocks(length)
        beyond = needed - slot.charge
        if beyond > self._budget - self._charged:
            return False
        self._charged += max(beyond, 0)
        self._commit(number, needed)
        slot.planned += tokens
        self._grown[number] = None
        return True

    def leave(self, number: int, keep: bool = True) -> None:
        """A sequence is over, or loses its slot.

        Args:
            number: of its slot.
            keep: the content may serve as a prefix. A token that was chosen from it has shown it
                to be finite; else it is to be wiped out before anything more is computed.

        Raises:
            ValueError: if the slot is nobody's.
        """
        slot = self._slots[number]
        if not slot.busy:
            raise ValueError(f"slot {number} is nobody's")
        self._charged -= slot.charge
        slot.busy, slot.reserved = False, 0
        self._seated.discard(number)
        self._grown.pop(number, None)
        slot.planned.clear()
        length = self._index.length(number)
        if keep and self._sharing and length >= PIECE_TOKENS:
            self._shrink(number, self.blocks(length))
            self._cached[number] = None
        else:
            self.discard(number)

    def discard(self, number: int) -> None:
        """Wipe out what a slot has kept: it proved not to be finite after its sequence had left.

        Raises:
            ValueError: if the slot has a sequence again; that one has to leave.
        """
        if self._slots[number].busy:
            raise ValueError(f"slot {number} has a sequence")
        self._cached.pop(number, None)
        self._index.truncate(number, 0)
        self._shrink(number, 0)

    def flush(self) -> tuple[Move, ...]:
        """The step is planned.

        Returns:
            What every stage has to do, in this order, before it computes the step.
        """
        for number in self._grown:
            planned = self._slots[number].planned
            self._index.extend(number, planned)
            planned.clear()
        self._grown.clear()
        moves, self._moves = tuple(self._moves), []
        return moves

    def clear(self, scope: str | None = None) -> None:
        """Give back the memory of cached prefixes, of one scope or of all."""
        for number in list(self._cached):
            if scope is None or self._index.scope(number) == scope:
                self.discard(number)

    @property
    def num_slots(self) -> int:
        """All slots, spare ones included."""
        return len(self._slots)

    def reset(self, least: int = 0) -> None:
        """Begin anew with every slot empty, since plans were not carried out as they were made.

        All stages wipe all slots with the next plan, whatever they hold.

        Args:
            least: so many slots at least: what others had, to whom these belonged before.
        """
        for number, slot in enumerate(self._slots):
            if slot.busy:
                self.leave(number, keep=False)
            self.discard(number)
        wiped = max(len(self._slots), least)
        self._moves = [Release(number, 0) for number in range(wiped)]

    # ---- prefixes ------------------------------------------------------------------------------

    def _choose(self, free: list[int], cached: int, holders: list[int]) -> tuple[int, int | None]:
        """A slot, and where its prefix comes from: itself, another, or nowhere."""
        for number in free:
            if number in holders and self._used_up(number, cached):
                return number, number
        source = free[0] if free[0] in holders else next(iter(holders), None)
        return free[0], source

    def _used_up(self, number: int, cached: int) -> bool:
        """A prefix leaves so little of a slot's content that the rest is not worth keeping."""
        return self._index.length(number) <= 2 * cached

    def _archive(self, number: int, source: int | None) -> None:
        """Move what a slot keeps to another, unless that costs what was used later, or a source."""
        order = list(self._cached)
        older = [other for other in order[: order.index(number)] if other != source]
        idle = {other for other, slot in enumerate(self._slots) if not slot.busy}
        empty = sorted(idle - self._cached.keys())
        needed = self._slots[number].committed
        room = self._budget - self._committed + sum(self._slots[o].committed for o in older)
        if needed > room or not (empty or older):
            return
        target = empty[-1] if empty else older[0]
        if not empty:
            self.discard(target)
        self._commit(target, needed, kept=(number, source))
        length = self._index.length(number)
        self._moves.append(Copy(number, target, length))
        self._index.begin(target, self._index.scope(number))
        self._index.copy(number, target, length)
        self._cached = {target if other == number else other: None for other in self._cached}

    def _copy(self, source: int, number: int, cached: int) -> int:
        """Copy a prefix into a slot, or as much of it as there is memory for beside its source."""
        slot = self._slots[number]
        spare = sum(self._slots[other].committed for other in self._cached if other != source)
        room = slot.committed + self._budget - self._committed + spare
        cached = min(cached, room * self._block_tokens)
        if cached < PIECE_TOKENS:
            return 0
        self._commit(number, self.blocks(cached), kept=(source,))
        self._moves.append(Copy(source, number, cached))
        self._index.copy(source, number, cached)
        return cached

    # ---- memory --------------------------------------------------------------------------------

    def _commit(self, number: int, needed: int, kept: Collection[int | None] = ()) -> None:
        """Give a slot so many blocks; cached content of slots other than ``kept`` gives way."""
        slot = self._slots[number]
        more = needed - slot.committed
        if more <= 0:
            return
        while (lacking := self._committed + more - self._budget) > 0:
            oldest = next(other for other in self._cached if other not in kept)
            left = max(self._slots[oldest].committed - lacking, 0)
            length = min(left * self._block_tokens, self._index.length(oldest))
            if length < PIECE_TOKENS:
                self.discard(oldest)
            else:
                self._index.truncate(oldest, length)
                self._shrink(oldest, left)
        slot.committed = needed
        self._committed += more

    def _shrink(self, number: int, blocks: int) -> None:
        """Take the blocks of a slot from there on."""
        slot = self._slots[number]
        if slot.committed > blocks:
            self._moves.append(Release(number, blocks * self._block_tokens))
            self._committed -= slot.committed - blocks
            slot.committed = blocks
