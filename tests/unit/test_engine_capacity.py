from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.engine.capacity import Capacity, fit
from uellm_worker.engine.kv import KvManager

FITS = st.builds(
    lambda slots, max_tokens, kv_bytes, per_token, block: (
        fit(slots, max_tokens, kv_bytes, per_token, block),
        (slots, max_tokens, kv_bytes // per_token),
    ),
    st.integers(1, 20),
    st.integers(1, 300),
    st.just(0) | st.integers(1, 20_000),
    st.integers(1, 8),
    st.sampled_from([1, 16, 64, 128]),
)


@given(FITS)
def test_a_capacity_keeps_to_what_was_granted_and_asked(
    made: tuple[Capacity, tuple[int, int, int]],
) -> None:
    capacity, (slots, max_tokens, room) = made
    if capacity.max_tokens == 0:
        return
    assert 1 <= capacity.slots <= slots
    assert capacity.slots <= capacity.cache_slots <= 2 * slots
    assert capacity.max_tokens <= min(max_tokens, capacity.kv_tokens)
    assert capacity.kv_tokens % capacity.block_tokens == 0
    if room:
        assert capacity.kv_tokens <= room
    if capacity.block_tokens == 1:
        assert capacity.kv_tokens == capacity.cache_slots * capacity.max_tokens
    else:
        assert capacity.slots == slots
        blocks = -(-capacity.max_tokens // capacity.block_tokens)
        assert not room or capacity.kv_tokens + capacity.block_tokens > min(
            room, capacity.cache_slots * blocks * capacity.block_tokens
        )


@given(FITS, FITS)
def test_what_both_can_hold_is_no_more_than_either_can(
    one: tuple[Capacity, object], other: tuple[Capacity, object]
) -> None:
    first, second = one[0], other[0]
    both = first.at_most(second)
    assert both == second.at_most(first)
    for single in (first, second):
        assert both.slots <= single.slots
        assert both.cache_slots <= single.cache_slots
        assert both.max_tokens <= single.max_tokens
        assert both.kv_tokens <= single.kv_tokens
        assert both.block_tokens % single.block_tokens == 0
    assert both.max_tokens <= both.kv_tokens or both.kv_tokens == 0
    if both.kv_tokens:
        KvManager(both.cache_slots, both.max_tokens, both.kv_tokens, both.block_tokens)


@given(FITS)
def test_equal_stages_lose_nothing(made: tuple[Capacity, object]) -> None:
    capacity = made[0]
    assert capacity.at_most(capacity) == capacity
