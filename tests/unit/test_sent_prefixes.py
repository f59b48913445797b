"""Which replica may hold the beginning of a prompt already."""

from hypothesis import given
from hypothesis import strategies as st
from uellm_scheduler.sent_prefixes import SentPrefixes

from uellm.prefixes import MOST_MARKS, PIECE_TOKENS, prefix_marks

TOKENS = st.integers(0, 3)
PROMPTS = st.lists(TOKENS, max_size=5).map(lambda kinds: [k for k in kinds for _ in range(50)])


def common(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


@given(PROMPTS, PROMPTS)
def test_prompts_have_as_many_equal_marks_as_pieces_in_common(
    one: list[int], other: list[int]
) -> None:
    first, second = prefix_marks(one, ""), prefix_marks(other, "")
    assert len(first) == len(one) // PIECE_TOKENS
    equal = common(first, second)
    assert equal == common(one, other) // PIECE_TOKENS
    assert not set(first[equal:]) & set(second[equal:])


def test_scopes_have_nothing_in_common_and_marks_are_bounded() -> None:
    prompt = list(range(PIECE_TOKENS * (MOST_MARKS + 5)))
    marks = prefix_marks(prompt, "")
    assert len(marks) == MOST_MARKS
    assert not set(marks) & set(prefix_marks(prompt, "adapter"))
    assert all(0 <= mark < 2**64 for mark in marks)


def test_a_replica_is_known_to_hold_what_it_was_sent() -> None:
    sent = SentPrefixes()
    sent.keep({"a": (1, 1000), "b": (1, 1000)})
    sent.sent("a", [1, 2, 3])
    assert sent.tokens("a", [1, 2, 9]) == 2 * PIECE_TOKENS
    assert sent.tokens("a", [9, 2, 3]) == 0
    assert sent.tokens("b", [1, 2, 3]) == sent.tokens("unknown", [1, 2, 3]) == 0
    # A replica that is not there is not remembered for when it is.
    sent.sent("unknown", [1])
    sent.keep({"a": (2, 1000), "unknown": (1, 1000)})
    assert sent.tokens("a", [1, 2, 3]) == sent.tokens("unknown", [1]) == 0


def test_what_has_no_room_is_forgotten_from_the_ends_of_the_oldest() -> None:
    sent, room = SentPrefixes(), {"a": (1, 4 * PIECE_TOKENS)}
    sent.keep(room)
    sent.sent("a", [1, 2, 3])
    sent.sent("a", [7, 8])
    sent.keep(room)
    assert sent.tokens("a", [1, 2, 3]) == 2 * PIECE_TOKENS
    assert sent.tokens("a", [7, 8]) == 2 * PIECE_TOKENS
    sent.sent("a", [1])
    sent.sent("a", [9])
    sent.keep(room)
    assert sent.tokens("a", [1, 2, 3]) == PIECE_TOKENS
    assert sent.tokens("a", [7, 8]) == 2 * PIECE_TOKENS
