"""Single decisions of the KV cache's account."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.kv import KvManager, Seat
from uellm_worker.engine.kv_usage import KvUsage
from uellm_worker.engine.plan import Copy, Release


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
