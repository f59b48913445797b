"""Any history of the KV cache's account, against a stage that believes nothing."""

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.kv import KvManager, Seat
from uellm_worker.engine.plan import Copy, Move
from uellm_worker.engine.prefixes import PIECE_TOKENS

Cell = tuple[str, tuple[int, ...]]
"""Stands for one token's keys and values: they depend on all tokens up to it, and the scope."""


def cell(scope: str, tokens: list[int], position: int) -> Cell:
    return scope, tuple(tokens[: position + 1])


class Memory:
    """What a stage does with its cache, cell by cell and block by block."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.cells: dict[int, dict[int, Cell]] = {}
        self.blocks: set[tuple[int, int]] = set()
        self.most = 0

    def write(self, slot: int, position: int, content: Cell) -> None:
        self.cells.setdefault(slot, {})[position] = content
        self.blocks.add((slot, position // self.block_tokens))
        self.most = max(self.most, len(self.blocks))

    def carry_out(self, moves: tuple[Move, ...]) -> None:
        for move in moves:
            if isinstance(move, Copy):
                assert move.source != move.slot
                for position in range(move.tokens):
                    self.write(move.slot, position, self.cells[move.source][position])
            else:
                assert move.from_token % self.block_tokens == 0
                cells = self.cells.get(move.slot, {})
                for position in [p for p in cells if p >= move.from_token]:
                    del cells[position]
                first = move.from_token // self.block_tokens
                self.blocks = {b for b in self.blocks if b[0] != move.slot or b[1] < first}

    def prefix(self, slot: int, scope: str, tokens: list[int]) -> int:
        """How many leading tokens of a sequence truly lie in a slot."""
        cells = self.cells.get(slot, {})
        for position in range(len(tokens)):
            if cells.get(position) != cell(scope, tokens, position):
                return position
        return len(tokens)


@dataclass
class Running:
    slot: int
    scope: str
    tokens: list[int]
    computed: int
    group: int | None
    reserve: int
    planned: int = 0


@dataclass
class World:
    """A manager, a stage and the sequences that run, checked after each action."""

    slots: int
    max_tokens: int
    kv_tokens: int
    block_tokens: int
    groups: int = 1
    sharing: bool = True
    spare_slots: int = 0
    running: list[Running] = field(default_factory=list)
    left: list[list[int]] = field(default_factory=list)
    left_in: dict[int, int] = field(default_factory=dict)
    log: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kv = KvManager(
            self.slots,
            self.max_tokens,
            self.kv_tokens,
            self.block_tokens,
            spare_slots=self.spare_slots,
            groups=self.groups,
            sharing=self.sharing,
        )
        self.memory = Memory(self.block_tokens)
        self.hits = 0

    def seat(self, tokens: list[int], reserve: int, group: int | None, scope: str) -> Seat | None:
        before = self.kv.usage
        seat = self.kv.seat(tokens, reserve_tokens=reserve, group=group, scope=scope)
        self.log.append(seat)
        block = self.block_tokens
        asked = -(-min(max(reserve, len(tokens)), self.max_tokens) // block) * block
        in_range = [
            number
            for number in range(self.slots)
            if group in (None, number * self.groups // self.slots)
        ]
        busy = {sequence.slot for sequence in self.running}
        if seat is None:
            assert asked > before.free_tokens or busy.issuperset(in_range)
        else:
            assert asked <= before.free_tokens
            assert seat.slot not in busy
            assert seat.slot in in_range
            assert seat.cached_tokens < len(tokens)
            if not self.sharing:
                assert seat.cached_tokens == 0
            self.hits += seat.cached_tokens
            self.running.append(Running(seat.slot, scope, tokens, seat.cached_tokens, group, asked))
        return seat

    def grow(self, which: int, tokens: list[int]) -> bool:
        """Plan the next tokens of a sequence: those it has left, else these new ones."""
        sequence = self.running[which % len(self.running)]
        start = sequence.computed + sequence.planned
        if start == len(sequence.tokens):
            sequence.tokens = sequence.tokens + tokens[: self.max_tokens - start]
        count = min(len(tokens), len(sequence.tokens) - start)
        grown = self.kv.grow(sequence.slot, sequence.tokens[start : start + count])
        self.log.append(grown)
        if grown:
            sequence.planned += count
        else:
            assert start + count > sequence.reserve
            assert self.kv.usage.free_tokens < start + count - sequence.reserve
        return grown

    def leave(self, which: int, keep: bool) -> None:
        sequence = self.running.pop(which % len(self.running))
        self.kv.leave(sequence.slot, keep)
        self.left.append(sequence.tokens)
        self.left_in[sequence.slot] = sequence.computed

    def reset(self) -> None:
        """A plan is lost: the memory is left as it was before, but for some of its moves."""
        moves = self.kv.flush()
        self.memory.carry_out(moves[: len(moves) // 2])
        self.kv.reset()
        self.running.clear()
        self.flush()
        assert not self.memory.blocks
        assert self.kv.usage.committed_tokens == 0

    def flush(self) -> None:
        """Compute a step: nobody may build on what is not there."""
        moves = self.kv.flush()
        self.log.append(moves)
        self.memory.carry_out(moves)
        for sequence in self.running:
            held = self.memory.prefix(sequence.slot, sequence.scope, sequence.tokens)
            assert held >= sequence.computed
            for position in range(sequence.computed, sequence.computed + sequence.planned):
                content = cell(sequence.scope, sequence.tokens, position)
                self.memory.write(sequence.slot, position, content)
            sequence.computed += sequence.planned
            sequence.planned = 0

    def check(self) -> None:
        usage = self.kv.usage
        budget = self.kv_tokens // self.block_tokens * self.block_tokens
        assert usage.total_tokens == budget
        assert usage.used_tokens == sum(s.computed + s.planned for s in self.running)
        assert usage.used_tokens <= usage.reserved_tokens <= budget
        assert usage.used_tokens + usage.cached_tokens <= usage.committed_tokens <= budget
        assert usage.fragmented_tokens >= 0
        assert usage.hit_tokens == self.hits
        assert self.memory.most * self.block_tokens <= budget

    def settled(self) -> None:
        """After a step, the account is that of the memory."""
        committed = len(self.memory.blocks) * self.block_tokens
        assert committed == self.kv.usage.committed_tokens


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["seat", "seat", "grow", "grow", "leave", "flush", "taint", "clear", "reset"]
        ),
        st.integers(0, 7),
        st.integers(1, 40),
        st.integers(0, 100),
    ),
    max_size=60,
)


def sequence_of(world: World, number: int, length: int) -> list[int]:
    """Often the beginning of what was there before, then something else."""
    known = world.left + [sequence.tokens for sequence in world.running]
    start = known[number % len(known)][: number % 7 * 11] if known and number % 3 else []
    tokens = start + [(number + i) % 2 for i in range(length)]
    return tokens[: world.max_tokens]


def act(world: World, action: tuple[str, int, int, int]) -> None:
    what, number, length, extra = action
    if what == "seat":
        tokens = sequence_of(world, number, length)
        group = number % world.groups if number % 2 else None
        world.seat(tokens, len(tokens) + extra, group, "ab"[number % 5 == 0])
    elif what == "grow" and world.running:
        world.grow(number, [extra % 2] * length)
    elif what in ("leave", "taint") and world.running:
        world.leave(number, keep=what == "leave")
    elif what == "flush":
        world.flush()
        world.settled()
    elif what == "clear":
        world.kv.clear("a" if number % 2 else None)
    elif what == "reset":
        world.reset()
    world.check()


WORLDS = st.builds(
    World,
    slots=st.integers(3, 6),
    max_tokens=st.integers(40, 100),
    kv_tokens=st.integers(20, 400),
    block_tokens=st.sampled_from([1, 16, 20]),
    groups=st.integers(1, 3),
    sharing=st.sampled_from([True, True, False]),
    spare_slots=st.integers(0, 4),
)


@settings(deadline=None, max_examples=300)
@given(WORLDS, ACTIONS)
def test_any_history_keeps_to_the_budget_and_to_the_truth(
    world: World, actions: list[tuple[str, int, int, int]]
) -> None:
    for action in actions:
        act(world, action)
    while world.running:
        world.leave(0, keep=True)
    world.kv.clear()
    world.flush()
    usage = world.kv.usage
    assert (usage.free_tokens, usage.committed_tokens) == (usage.total_tokens, 0)
    assert not world.memory.blocks


KINDS = {
    "calm": ["seat", "grow", "grow", "leave", "flush"],
    "rough": ["seat", "seat", "grow", "grow", "grow", "leave", "flush", "flush", "taint", "clear"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_long_histories_keep_to_the_budget_and_to_the_truth(kind: str) -> None:
    """Longer than hypothesis likes them, so that caches are full and prefixes meet."""
    hits = copies = refusals = 0
    for seed in range(150):
        random = Random(seed)  # noqa: S311
        world = World(
            slots=random.randint(3, 6),
            max_tokens=random.randint(40, 100),
            kv_tokens=random.randint(20, 400),
            block_tokens=random.choice([1, 16, 20]),
            groups=random.randint(1, 3),
            sharing=random.random() < 0.8,
            spare_slots=random.randint(0, 4),
        )
        for _ in range(80):
            numbers = random.randint(0, 7), random.randint(1, 40), random.randint(0, 60)
            act(world, (random.choice(KINDS[kind]), *numbers))
        hits += world.hits > 0
        copies += any(isinstance(move, Copy) for moves in world.log for move in moves_in(moves))
        refusals += any(entry is False for entry in world.log)
    assert min(hits, copies, refusals) > 15, "the histories are too tame"


def moves_in(entry: object) -> tuple[Move, ...]:
    return entry if isinstance(entry, tuple) else ()


@settings(deadline=None, max_examples=50)
@given(st.data(), ACTIONS)
def test_the_same_history_leads_to_the_same_decisions(
    data: st.DataObject, actions: list[tuple[str, int, int, int]]
) -> None:
    first = data.draw(WORLDS)
    second = World(
        first.slots,
        first.max_tokens,
        first.kv_tokens,
        first.block_tokens,
        first.groups,
        first.sharing,
        first.spare_slots,
    )
    for action in actions:
        act(first, action)
        act(second, action)
    assert first.log == second.log


@settings(deadline=None, max_examples=200)
@given(ACTIONS, st.integers(0, 7), st.integers(1, 40))
def test_the_longest_prefix_is_found_wherever_it_lies(
    actions: list[tuple[str, int, int, int]], number: int, length: int
) -> None:
    world = World(slots=3, max_tokens=90, kv_tokens=6 * 96, block_tokens=16, spare_slots=2)
    for action in actions:
        act(world, action)
    world.flush()
    tokens = sequence_of(world, number, length)
    known = world.left_in | {sequence.slot: sequence.computed for sequence in world.running}
    longest = max(
        (min(world.memory.prefix(slot, "a", tokens[:-1]), known[slot]) for slot in known), default=0
    )
    # Besides those that were left there, slots have what was saved from others that were taken.
    there = max(world.memory.prefix(slot, "a", tokens[:-1]) for slot in range(3 + 2))
    seat = world.seat(tokens, len(tokens), None, "a")
    if seat is not None:
        assert seat.cached_tokens >= (longest if longest >= PIECE_TOKENS else 0)
        assert seat.cached_tokens <= there
