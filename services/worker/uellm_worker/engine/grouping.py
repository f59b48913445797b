"""Which neighbouring sequences are attended to in one call, when the shorter are padded."""

from collections.abc import Sequence

_LARGEST = 32
"""Sequences of a group: more save little, and the search grows with it."""


def group_lengths(lengths: Sequence[int], call_tokens: int) -> list[int]:
    """Cut a row of sequences into groups that cost least.

    A group costs as many tokens as its longest has, times its sequences, and a call.

    Args:
        lengths: tokens of each sequence.
        call_tokens: tokens that could be read in the time that one more call takes.

    Returns:
        Sizes of the groups, in order.
    """
    costs, sizes = [0], [0]
    for end in range(1, len(lengths) + 1):
        longest, best, best_size = 0, -1, 0
        for size in range(1, min(end, _LARGEST) + 1):
            longest = max(longest, lengths[end - size])
            cost = costs[end - size] + call_tokens + size * longest
            if best < 0 or cost <= best:
                best, best_size = cost, size
        costs.append(best)
        sizes.append(best_size)
    groups = []
    end = len(lengths)
    while end:
        groups.append(sizes[end])
        end -= sizes[end]
    return groups[::-1]
