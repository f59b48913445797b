"""Who holds which part of the KV cache: slots, blocks, reservations, and prefixes used again.

The manager runs on stage 0 and touches no tensor. It decides, and what it decides reaches every
stage as *moves* in the plan of a step: releases and copies, to be carried out in their order before
the step computes. All stages take the steps in the same order, so that the account kept here is
exact for each of them, however many steps are under way.

Prefixes are found by a chain of hashes over pieces of tokens (Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023, and vLLM's automatic
prefix caching); the content of a slot stays contiguous in *virtual* memory, and what it takes of
real memory grows and shrinks by blocks (Prabhu et al., "vAttention", arXiv 2405.04437).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from uellm_worker.engine.plan import Copy, Move, Release

PIECE_TOKENS = 16
"""Tokens behind one link of the hash chain; shorter common prefixes are not looked for."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot given to a sequence.

    Attributes:
        slot: which.
        cached_tokens: so many of its tokens need not be computed.
    """

    slot: int
    cached_tokens: int


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
    """

    total_tokens: int
    used_tokens: int
    reserved_tokens: int
    cached_tokens: int
    committed_tokens: int
    fragmented_tokens: int
    hit_tokens: int

    @property
    def free_tokens(self) -> int:
        """Room for new reservations; cached prefixes give way to them."""
        return self.total_tokens - self.reserved_tokens


@dataclass(slots=True)
class _Slot:
    """What a slot holds.

    Attributes:
        tokens: whose keys and values lie here once the steps planned so far are computed.
        ready: how many of them the steps before the next one compute.
        chain: a hash per whole piece of the ready tokens, each including all before it.
        committed: blocks in memory.
        reserved: blocks promised to its sequence.
        busy: it has a sequence.
        scope: number of the scope of its content.
    """

    tokens: list[int] = field(default_factory=list)
    ready: int = 0
    chain: list[int] = field(default_factory=list)
    committed: int = 0
    reserved: int = 0
    busy: bool = False
    scope: int = 0

    @property
    def charge(self) -> int:
        """Blocks that count against the budget while it is busy."""
        return max(self.committed, self.reserved)


class KvManager:
    """The account of the KV cache of all stages of a replica.

    A sequence is seated with a reservation. Within it, it always can grow; beyond it, as long as
    there is room that nobody has reserved. Slots whose sequences are over keep their content as
    cached prefixes, and lose it from the end, least recently used first, when others grow.

    Between two calls of ``flush`` lies the planning of one step. Its order is free: what the step
    is going to compute counts as content only after it.

    Args:
        slots: of the cache's tensors; more than sequences run at once leaves room for prefixes.
        max_tokens: per slot.
        kv_tokens: the budget of all slots together.
        block_tokens: memory comes in blocks of so many tokens; the budget is rounded down to them.
        groups: the slots fall into so many ranges, one for each step that is under way at a time,
            so that what decodes together lies together.
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
        self._slots = [_Slot() for _ in range(slots)]
        self._ranges = [
            range(slots * group // groups, slots * (group + 1) // groups) for group in range(groups)
        ]
        self._scopes: dict[str, int] = {}
        self._holders: dict[int, dict[int, None]] = {}
        # Least recently used first; in blocks: what busy slots are charged, what is in memory.
        self._cached: dict[int, None] = {}
        self._charged = 0
        self._committed = 0
        self._hit_tokens = 0
        self._grown: dict[int, None] = {}
        self._moves: list[Move] = []

    @property
    def usage(self) -> KvUsage:
        """The account as it is now."""
        busy = [slot for slot in self._slots if slot.busy]
        used = sum(len(slot.tokens) for slot in busy)
        return KvUsage(
            total_tokens=self._budget * self._block_tokens,
            used_tokens=used,
            reserved_tokens=self._charged * self._block_tokens,
            cached_tokens=sum(self._slots[slot].ready for slot in self._cached),
            committed_tokens=self._committed * self._block_tokens,
            fragmented_tokens=sum(slot.committed for slot in busy) * self._block_tokens - used,
            hit_tokens=self._hit_tokens,
        )

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self._block_tokens)

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
            None if every slot is busy, or the reservation does not fit beside the others.

        Raises:
            ValueError: if there is no token, or more than a slot holds.
        """
        if not 0 < len(tokens) <= self._max_tokens:
            raise ValueError(f"{len(tokens)} tokens: at least one, at most {self._max_tokens}")
        slots = range(len(self._slots)) if group is None else self._ranges[group]
        free = [number for number in slots if not self._slots[number].busy]
        reserved = self.blocks(min(max(reserve_tokens, len(tokens)), self._max_tokens))
        if not free or reserved > self._budget - self._charged:
            return None
        scope_id = self._scopes.setdefault(scope, len(self._scopes))
        cached, holders = self._longest(tokens, scope_id)
        number, source = self._choose(free, cached, holders)
        slot = self._slots[number]
        self._cached.pop(number, None)
        self._truncate(number, cached if source == number else 0)
        # Pages within the reservation stay: the sequence is going to fill them.
        self._shrink(number, reserved)
        slot.busy, slot.reserved, slot.scope = True, reserved, scope_id
        self._charged += slot.charge
        if source is not None and source != number:
            cached = self._copy(source, number, cached)
        if source in self._cached:
            self._cached[source] = self._cached.pop(source)
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
        length = len(slot.tokens) + len(tokens)
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
        slot.tokens += tokens
        self._grown[number] = None
        return True

    def leave(self, number: int, keep: bool = True) -> None:
        """A sequence is over, or loses its slot.

        Args:
            number: of its slot.
            keep: the content is sound, and may serve as a prefix; else it is wiped out before
                anything else is computed.
        """
        slot = self._slots[number]
        if not slot.busy:
            raise ValueError(f"slot {number} is nobody's")
        self._charged -= slot.charge
        slot.busy, slot.reserved = False, 0
        self._grown.pop(number, None)
        # What was only planned has not been computed.
        useful = keep and self._sharing and slot.ready >= PIECE_TOKENS
        self._truncate(number, slot.ready if useful else 0)
        if useful:
            self._shrink(number, self.blocks(slot.ready))
            self._cached[number] = None
        else:
            self._shrink(number, 0)

    def flush(self) -> tuple[Move, ...]:
        """The step is planned.

        Returns:
            What every stage has to do, in this order, before it computes the step.
        """
        for number in self._grown:
            self._note(number)
        self._grown.clear()
        moves, self._moves = tuple(self._moves), []
        return moves

    def clear(self, scope: str | None = None) -> None:
        """Give back the memory of cached prefixes, of one scope or of all."""
        scope_id = None if scope is None else self._scopes.get(scope, -1)
        for number in list(self._cached):
            if scope_id in (None, self._slots[number].scope):
                del self._cached[number]
                self._truncate(number, 0)
                self._shrink(number, 0)

    # ---- prefixes ------------------------------------------------------------------------------

    def _longest(self, tokens: Sequence[int], scope: int) -> tuple[int, list[int]]:
        """Length of the longest prefix that a slot holds, and the slots that do, ascending."""
        limit = len(tokens) - 1
        depth, holders = 0, dict[int, None]()
        for end, key in _links(tokens[:limit], scope):
            if key not in self._holders:
                break
            depth, holders = end, self._holders[key]
        # Hashes may collide, tokens do not.
        known = list(tokens[:depth])
        lengths = {
            number: self._common(number, tokens, depth, limit)
            for number in sorted(holders)
            if self._slots[number].tokens[:depth] == known
        }
        longest = max(lengths.values(), default=0)
        return longest, [number for number, length in lengths.items() if length == longest]

    def _common(self, number: int, tokens: Sequence[int], start: int, limit: int) -> int:
        """How many tokens agree with what a slot holds, if the first ``start`` do."""
        slot = self._slots[number]
        length = start
        limit = min(limit, slot.ready)
        while length < limit and slot.tokens[length] == tokens[length]:
            length += 1
        return length

    def _choose(self, free: list[int], cached: int, holders: list[int]) -> tuple[int, int | None]:
        """A slot, and where its prefix comes from: itself, another, or nowhere.

        A cached slot is taken over where it stands, unless more would be lost by that than used.
        Otherwise an empty slot, else the cached one that was not used for the longest time.
        """
        near = set(free).intersection(holders)
        for number in sorted(near):
            if len(self._slots[number].tokens) <= 2 * cached:
                return number, number
        if any(number not in self._cached for number in free):
            target = min(free, key=self._reluctance)
        else:
            target = next(number for number in self._cached if number in free)
        if target in near:
            return target, target
        return target, next(iter(holders), None)

    def _reluctance(self, number: int) -> tuple[bool, int, int]:
        """Orders free slots: empty before cached ones, those beside busy ones first."""
        sides = self._slots[max(number - 1, 0) : number + 2]
        return number in self._cached, -sum(slot.busy for slot in sides), number

    def _copy(self, source: int, number: int, cached: int) -> int:
        """Copy a prefix into a slot, or as much of it as there is memory for beside its source."""
        slot = self._slots[number]
        spare = sum(self._slots[other].committed for other in self._cached if other != source)
        room = slot.committed + self._budget - self._committed + spare
        cached = min(cached, room * self._block_tokens)
        if cached < PIECE_TOKENS:
            return 0
        self._commit(number, self.blocks(cached), source)
        self._moves.append(Copy(source, number, cached))
        slot.tokens = self._slots[source].tokens[:cached]
        self._note(number)
        return cached

    def _note(self, number: int) -> None:
        """Put what a slot holds by now into the index."""
        slot = self._slots[number]
        slot.ready = len(slot.tokens)
        if not self._sharing:
            return
        start = len(slot.chain) * PIECE_TOKENS
        last = slot.chain[-1] if slot.chain else slot.scope
        for _, key in _links(slot.tokens[start:], last):
            slot.chain.append(key)
            self._holders.setdefault(key, {})[number] = None

    def _truncate(self, number: int, length: int) -> None:
        """Forget the content of a slot from there on; its memory stays."""
        slot = self._slots[number]
        del slot.tokens[length:]
        slot.ready = min(slot.ready, length)
        for key in slot.chain[length // PIECE_TOKENS :]:
            holders = self._holders[key]
            del holders[number]
            if not holders:
                del self._holders[key]
        del slot.chain[length // PIECE_TOKENS :]

    # ---- memory --------------------------------------------------------------------------------

    def _commit(self, number: int, needed: int, source: int | None = None) -> None:
        """Give a slot so many blocks; cached content other than that of ``source`` gives way."""
        slot = self._slots[number]
        more = needed - slot.committed
        if more <= 0:
            return
        while (lacking := self._committed + more - self._budget) > 0:
            oldest = next(other for other in self._cached if other != source)
            left = max(self._slots[oldest].committed - lacking, 0)
            self._truncate(oldest, min(left * self._block_tokens, self._slots[oldest].ready))
            if self._slots[oldest].ready < PIECE_TOKENS:
                del self._cached[oldest]
                self._truncate(oldest, 0)
                left = 0
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


def _links(tokens: Sequence[int], last: int) -> Iterator[tuple[int, int]]:
    """The hash chain over whole pieces: where each ends, and its hash with all before it."""
    for end in range(PIECE_TOKENS, len(tokens) + 1, PIECE_TOKENS):
        last = hash((last, *tokens[end - PIECE_TOKENS : end]))
        yield end, last
