from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.engine.capacity import Capacity, fit, fit_hybrid, fit_pages
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
        assert capacity.slots >= min(slots, room // max_tokens)
    if capacity.block_tokens == 1:
        assert capacity.kv_tokens == capacity.cache_slots * capacity.max_tokens
    else:
        assert capacity.slots == min(slots, capacity.kv_tokens // capacity.block_tokens)
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


@given(
    slots=st.integers(1, 20),
    max_tokens=st.integers(1, 300),
    kv_bytes=st.just(0) | st.integers(1, 20_000),
    bytes_per_token=st.integers(0, 8),
    block_tokens=st.sampled_from([1, 16, 64, 128]),
    state_bytes=st.integers(1, 500),
)
def test_states_and_tokens_share_what_was_granted(
    slots: int,
    max_tokens: int,
    kv_bytes: int,
    bytes_per_token: int,
    block_tokens: int,
    state_bytes: int,
) -> None:
    capacity = fit_hybrid(slots, max_tokens, kv_bytes, bytes_per_token, block_tokens, state_bytes)
    assert not capacity.sharing
    assert capacity.spare_slots == 0
    assert capacity.max_tokens <= max_tokens
    if not kv_bytes:
        assert (capacity.slots, capacity.max_tokens) == (slots, max_tokens)
    if capacity.max_tokens == 0:
        assert 0 < kv_bytes < state_bytes + max(bytes_per_token, 1)
        return
    if kv_bytes:
        used = capacity.kv_tokens * bytes_per_token + capacity.slots * state_bytes
        assert used <= kv_bytes
    wanted = slots * (max_tokens * bytes_per_token + state_bytes)
    if kv_bytes >= wanted:
        assert (capacity.slots, capacity.max_tokens) == (slots, max_tokens)


@given(
    slots=st.integers(1, 20),
    max_tokens=st.integers(1, 300),
    granted=st.booleans(),
    bytes_per_token=st.integers(1, 8),
    block_tokens=st.sampled_from([1, 16, 64, 128]),
    state_bytes=st.integers(1, 500),
)
def test_a_stage_without_attention_takes_nothing_from_the_others(
    slots: int,
    max_tokens: int,
    granted: bool,
    bytes_per_token: int,
    block_tokens: int,
    state_bytes: int,
) -> None:
    """Each was granted what a plan counts for it."""
    one, other = (
        fit_hybrid(
            slots,
            max_tokens,
            slots * (max_tokens * per_token + state_bytes) if granted else 0,
            per_token,
            block_tokens,
            state_bytes,
        )
        for per_token in (bytes_per_token, 0)
    )
    anything = Capacity(10**6, 10**9, 10**15)
    assert anything.at_most(other).at_most(one) == anything.at_most(one).at_most(other) == one


@given(st.integers(1, 20), st.integers(1, 3000), st.integers(2048, 200_000), st.integers(1, 4))
def test_pages_and_the_one_that_is_nobodys_fit_the_grant(
    slots: int, max_tokens: int, kv_bytes: int, per_token: int
) -> None:
    capacity = fit_pages(slots, max_tokens, kv_bytes, per_token, 256)
    page = -(-capacity.max_tokens // 256) * 256
    assert (capacity.cache_slots + 1) * page * per_token <= kv_bytes
    assert 1 <= capacity.slots <= slots
    assert 1 <= capacity.max_tokens <= max_tokens
    assert capacity.kv_tokens == capacity.cache_slots * capacity.max_tokens
    if capacity.max_tokens == max_tokens and capacity.cache_slots < 2 * slots:
        assert (capacity.cache_slots + 2) * page * per_token > kv_bytes
