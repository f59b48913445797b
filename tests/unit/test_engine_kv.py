"""The account of the KV cache, against a stage that believes nothing."""

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.kv import KvManager, Seat
from uellm_worker.engine.kv_usage import KvUsage
from uellm_worker.engine.plan import Copy, Move, Release
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


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=3)
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


# ---- single decisions --------------------------------------------------------------------------


def run_once(kv: KvManager, tokens: list[int], group: int | None = None, scope: str = "") -> int:
    """Seat a sequence, compute all of it, and let it leave; its slot."""
    seat = kv.seat(tokens, reserve_tokens=0, group=group, scope=scope)
    assert seat is not None
    assert kv.grow(seat.slot, tokens[seat.cached_tokens :])
    kv.flush()
    kv.leave(seat.slot)
    return seat.slot


def distinct(number: int, length: int) -> list[int]:
    return [1000 * number + i for i in range(length)]


def test_a_finished_sequence_is_continued_in_its_slot() -> None:
    kv = KvManager(4, 128, 256, 16)
    slot = run_once(kv, distinct(1, 40))
    seat = kv.seat([*distinct(1, 40), 7, 8], reserve_tokens=60)
    assert seat == Seat(slot, 40)
    assert kv.flush() == ()


def test_a_prompt_that_is_wholly_cached_computes_its_last_token() -> None:
    kv = KvManager(4, 128, 256, 16)
    run_once(kv, distinct(1, 33))
    seat = kv.seat(distinct(1, 33), reserve_tokens=40)
    assert seat is not None
    assert seat.cached_tokens == 32


def test_a_running_sequence_lends_its_prefix() -> None:
    kv = KvManager(4, 128, 256, 16)
    first = kv.seat(distinct(1, 50), reserve_tokens=60)
    assert first is not None
    assert kv.grow(first.slot, distinct(1, 50))
    in_same_step = kv.seat([*distinct(1, 40), 5], reserve_tokens=60)
    assert in_same_step is not None
    assert in_same_step.cached_tokens == 0, "nothing of it is computed yet"
    kv.flush()
    second = kv.seat([*distinct(1, 40), 5], reserve_tokens=60)
    assert second is not None
    assert second.cached_tokens == 40
    assert kv.flush() == (Copy(first.slot, second.slot, 40),)


def test_a_short_prefix_does_not_cost_a_long_one() -> None:
    kv = KvManager(4, 256, 512, 16, spare_slots=1)
    long = distinct(1, 60)
    slot = run_once(kv, long)
    short = kv.seat([*long[:20], 5], reserve_tokens=30)
    assert short == Seat(slot, 20)
    assert kv.flush() == (Copy(slot, 4, 60), Release(slot, 32))
    again = kv.seat([*long, 6], reserve_tokens=80)
    assert again == Seat(1, 60)
    assert kv.flush() == (Copy(4, 1, 60), Release(4, 0))


def test_prefixes_make_way_for_sequences_that_run() -> None:
    """Running sequences keep to the first slots; what was there is kept elsewhere."""
    kv = KvManager(2, 128, 512, 16, spare_slots=3)
    for number in range(5):
        assert run_once(kv, distinct(number, 40)) == 0
    assert kv.usage.cached_tokens == 5 * 40
    # There is one slot less for prefixes while a sequence runs: the oldest goes.
    for number in (1, 2, 3, 4):
        seat = kv.seat([*distinct(number, 40), 5], reserve_tokens=50)
        assert seat is not None
        assert seat.cached_tokens == 40
        kv.leave(seat.slot)
    seat = kv.seat(distinct(0, 40), reserve_tokens=50)
    assert seat is not None
    assert seat.cached_tokens == 0


def test_moving_one_prefix_away_spares_the_one_that_is_wanted() -> None:
    kv = KvManager(1, 128, 12 * 16, 16, spare_slots=3)
    for number, length in ((1, 64), (2, 48), (3, 64)):
        run_once(kv, distinct(number, length))
    kv.flush()
    seat = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert seat == Seat(0, 63)
    # The second gives way, though the first was not used for longer.
    assert kv.flush() == (
        Release(2, 0),
        Copy(0, 1, 64),
        Release(0, 0),
        Copy(3, 0, 63),
        Release(3, 0),
    )


def test_a_prefix_is_not_moved_at_the_cost_of_one_used_later() -> None:
    kv = KvManager(1, 128, 128, 16, spare_slots=1)
    run_once(kv, distinct(1, 64))
    run_once(kv, distinct(2, 48))
    # 64 tokens in the spare slot, 48 in the first: both fit, a third does not.
    assert kv.usage.cached_tokens == 112
    seat = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert seat == Seat(0, 63)
    kv.leave(seat.slot)
    assert kv.usage.committed_tokens <= 128


def test_equal_hashes_do_not_pass_for_equal_tokens() -> None:
    kv = KvManager(4, 128, 256, 16)
    same_hash = 2**61 - 1
    assert hash(same_hash) == hash(0)
    run_once(kv, [0] * 40)
    seat = kv.seat([same_hash] * 40, reserve_tokens=50)
    assert seat is not None
    assert seat.cached_tokens == 0


def test_a_prefix_that_was_copied_counts_as_used() -> None:
    kv = KvManager(4, 192, 384, 16, groups=2)
    first = run_once(kv, distinct(1, 150), group=0)
    second = run_once(kv, distinct(2, 64), group=1)
    assert [first, second] == [0, 2]
    seat = kv.seat(distinct(1, 64), reserve_tokens=128, group=1)
    assert seat is not None
    kv.flush()
    assert kv.grow(seat.slot, distinct(3, 128 - 63))
    rest = kv.seat(distinct(4, 50), reserve_tokens=50, group=1)
    assert rest is not None
    assert kv.grow(rest.slot, distinct(4, 50))
    assert [m.slot for m in kv.flush() if isinstance(m, Release) and not m.from_token] == [3]
    again = kv.seat(distinct(1, 150), reserve_tokens=150, group=0)
    assert again is not None
    assert again.cached_tokens == 149


def test_after_lost_plans_every_slot_is_wiped() -> None:
    kv = KvManager(3, 128, 256, 16)
    run_once(kv, distinct(1, 64))
    kv.seat(distinct(2, 64), reserve_tokens=64)
    kv.clear()
    kv.flush()  # Lost: no stage carries it out.
    kv.reset()
    assert kv.flush() == (Release(0, 0), Release(1, 0), Release(2, 0))
    assert kv.usage.free_tokens == 256
    assert kv.seat(distinct(1, 64), reserve_tokens=256) == Seat(0, 0)


def test_scopes_share_nothing() -> None:
    kv = KvManager(4, 128, 256, 16)
    run_once(kv, distinct(1, 40), scope="adapter")
    seat = kv.seat(distinct(1, 40), reserve_tokens=50)
    assert seat is not None
    assert seat.cached_tokens == 0


def test_what_was_only_planned_is_no_prefix() -> None:
    kv = KvManager(2, 128, 256, 16)
    seat = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert seat is not None
    kv.grow(seat.slot, distinct(1, 64)[:32])
    kv.flush()
    kv.grow(seat.slot, distinct(1, 64)[32:])
    kv.leave(seat.slot)
    again = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert again == Seat(seat.slot, 32)


def test_tainted_content_is_wiped_before_the_next_step() -> None:
    kv = KvManager(2, 128, 256, 16)
    seat = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert seat is not None
    kv.grow(seat.slot, distinct(1, 64))
    kv.flush()
    kv.leave(seat.slot, keep=False)
    assert kv.flush() == (Release(seat.slot, 0),)
    again = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert again is not None
    assert again.cached_tokens == 0


def test_what_proves_unsound_later_is_no_prefix_any_more() -> None:
    kv = KvManager(2, 128, 256, 16)
    slot = run_once(kv, distinct(1, 64))
    kv.discard(slot)
    assert kv.flush() == (Release(slot, 0),)
    seat = kv.seat(distinct(1, 64), reserve_tokens=64)
    assert seat is not None
    assert seat.cached_tokens == 0
    with pytest.raises(ValueError, match="has a sequence"):
        kv.discard(seat.slot)


@settings(deadline=None)
@given(
    st.lists(st.integers(17, 60), min_size=2, max_size=6),
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(16, 96),
)
def test_the_least_recently_used_gives_way_first_and_from_its_end(
    lengths: list[int], touched: list[int], wanted: int
) -> None:
    """Against a list: sequences in the order of their last use, with what is left of each."""
    kv = KvManager(12, 96, 400, 16, groups=12)
    order = list(range(len(lengths)))
    slots = [run_once(kv, distinct(n, length), group=n) for n, length in enumerate(lengths)]
    for number in touched:
        if number < len(lengths):
            # All of it again, but for the last token.
            assert run_once(kv, distinct(number, lengths[number]), group=number) == slots[number]
            order.remove(number)
            order.append(number)
    kv.flush()
    room = 25 - sum(-(-length // 16) for length in lengths)
    seat = kv.seat(distinct(9, wanted), reserve_tokens=wanted, group=11)
    assert seat is not None
    assert kv.grow(seat.slot, distinct(9, wanted))
    lacking = -(-wanted // 16) - room
    expected = []
    for number in order:
        if lacking <= 0:
            break
        blocks = -(-lengths[number] // 16)
        left = max(blocks - lacking, 0)
        expected.append(Release(slots[number], 16 * left))
        lacking -= blocks - left
    assert list(kv.flush()) == expected


def test_reservations_are_kept_and_what_exceeds_them_takes_what_is_free() -> None:
    kv = KvManager(4, 128, 128, 16)
    first = kv.seat(distinct(1, 10), reserve_tokens=32)
    second = kv.seat(distinct(2, 10), reserve_tokens=70)
    assert first is not None
    assert second is not None
    assert kv.usage.free_tokens == 128 - 32 - 80
    assert kv.seat(distinct(3, 10), reserve_tokens=17) is None
    assert kv.grow(first.slot, distinct(1, 48)), "16 tokens are nobody's"
    assert not kv.grow(first.slot, [1])
    assert kv.grow(second.slot, distinct(2, 80)), "it was promised"
    kv.leave(second.slot)
    assert kv.grow(first.slot, [1])


def test_prefixes_give_way_to_reservations_only_when_these_are_used() -> None:
    kv = KvManager(4, 128, 128, 16, groups=2)
    slot = run_once(kv, distinct(1, 64), group=1)
    seat = kv.seat(distinct(2, 10), reserve_tokens=128, group=0)
    assert seat is not None
    assert kv.grow(seat.slot, distinct(2, 64))
    assert kv.flush() == ()
    assert kv.grow(seat.slot, distinct(2, 16))
    assert kv.flush() == (Release(slot, 48),)


def test_a_copy_shrinks_to_the_memory_beside_its_source() -> None:
    kv = KvManager(4, 128, 96, 16, groups=2)
    assert run_once(kv, distinct(1, 64)) == 0
    seat = kv.seat(distinct(1, 64), reserve_tokens=96, group=1)
    assert seat == Seat(2, 32)
    # What is left of the source beside them is not worth keeping.
    assert kv.flush() == (Copy(0, 2, 32), Release(0, 0))


def test_usage_adds_up() -> None:
    kv = KvManager(4, 128, 256, 16)
    assert run_once(kv, distinct(1, 40)) == 0
    seat = kv.seat(distinct(2, 20), reserve_tokens=50)
    assert seat == Seat(0, 0)
    kv.grow(seat.slot, distinct(2, 20))
    assert kv.usage == KvUsage(
        total_tokens=256,
        used_tokens=20,
        reserved_tokens=64,
        cached_tokens=40,
        committed_tokens=48 + 32,
        fragmented_tokens=12,
        hit_tokens=0,
        block_tokens=16,
    )


def test_groups_are_ranges() -> None:
    kv = KvManager(7, 64, 640, 16, groups=3)
    got: list[list[int]] = []
    for group in range(3):
        got.append([])
        while (seat := kv.seat([1], reserve_tokens=2, group=group)) is not None:
            got[-1].append(seat.slot)
    assert [sorted(slots) for slots in got] == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("arguments", "field_name"),
    [
        ((0, 8, 64, 16), "slots"),
        ((4, 8, 15, 16), "kv_tokens"),
        ((4, 0, 64, 16), "max_tokens"),
    ],
)
def test_impossible_caches_are_refused(
    arguments: tuple[int, int, int, int], field_name: str
) -> None:
    with pytest.raises(ValueError, match=field_name):
        KvManager(*arguments)
    with pytest.raises(ValueError, match="5 groups"):
        KvManager(4, 8, 64, 16, groups=5)


def test_misuse_is_refused() -> None:
    kv = KvManager(2, 8, 64, 16)
    with pytest.raises(ValueError, match="at most 8"):
        kv.seat([1] * 9, reserve_tokens=1)
    with pytest.raises(ValueError, match="at least one"):
        kv.seat([], reserve_tokens=1)
    with pytest.raises(ValueError, match="nobody"):
        kv.leave(0)
    with pytest.raises(ValueError, match="of a sequence"):
        kv.grow(0, [1])
