"""Which sequences are attended to in one call."""

from itertools import accumulate, combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.engine.grouping import group_lengths


def cost(lengths: list[int], sizes: list[int], call_tokens: int) -> int:
    bounds = pairwise([0, *accumulate(sizes)])
    groups = [lengths[start:end] for start, end in bounds]
    return sum(call_tokens + len(group) * max(group) for group in groups)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 400))
def test_no_other_cut_costs_less(lengths: list[int], call_tokens: int) -> None:
    sizes = group_lengths(lengths, call_tokens)
    assert sum(sizes) == len(lengths)
    assert min(sizes) > 0
    inner = range(1, len(lengths))
    cuts = (cut for n in range(len(lengths)) for cut in combinations(inner, n))
    every = ([b - a for a, b in pairwise([0, *cut, len(lengths)])] for cut in cuts)
    assert cost(lengths, sizes, call_tokens) == min(
        cost(lengths, other, call_tokens) for other in every
    )


def test_equal_sequences_share_a_call_and_long_rows_are_cut() -> None:
    assert group_lengths([50] * 20, 1) == [20]
    assert sum(group_lengths([50] * 100, 10)) == 100
    assert group_lengths([10, 10, 900, 10], 64) == [2, 1, 1]
