"""Which replica may hold the beginning of a prompt already."""

from hypothesis import given
from hypothesis import strategies as st
from uellm_scheduler.book import Book
from uellm_scheduler.sent_prefixes import SentPrefixes

from uellm.prefixes import MOST_MARKS, PIECE_TOKENS, prefix_marks
from uellm.streams.messages import QueuedEntry, ReplicaRoute, parse_record
from uellm.v1 import queue_pb2

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
    sent.sent("a", 1, [1, 2, 3])
    sent.keep({"a": (1, 1000), "b": (1, 1000)})
    assert sent.tokens("a", [1, 2, 9]) == 2 * PIECE_TOKENS
    assert sent.tokens("a", [9, 2, 3]) == 0
    assert sent.tokens("b", [1, 2, 3]) == sent.tokens("unknown", [1, 2, 3]) == 0
    # What a replica held under another placement is gone.
    sent.sent("unknown", 1, [1])
    sent.keep({"a": (2, 1000)})
    assert sent.tokens("a", [1, 2, 3]) == sent.tokens("unknown", [1]) == 0
    sent.sent("a", 2, [1])
    sent.sent("a", 3, [2])
    sent.sent("a", 2, [2, 3])
    assert sent.tokens("a", [1]) == 0
    assert sent.tokens("a", [2, 3]) == PIECE_TOKENS


def test_what_has_no_room_is_forgotten_from_the_ends_of_the_oldest() -> None:
    sent, room = SentPrefixes(), {"a": (1, 4 * PIECE_TOKENS)}
    sent.sent("a", 1, [1, 2, 3])
    sent.sent("a", 1, [7, 8])
    sent.keep(room)
    assert sent.tokens("a", [1, 2, 3]) == 2 * PIECE_TOKENS
    assert sent.tokens("a", [7, 8]) == 2 * PIECE_TOKENS
    sent.sent("a", 1, [1])
    sent.sent("a", 1, [9])
    sent.keep(room)
    assert sent.tokens("a", [1, 2, 3]) == PIECE_TOKENS
    assert sent.tokens("a", [7, 8]) == 2 * PIECE_TOKENS


def entry(name: str) -> queue_pb2.RequestEntry:
    entry = queue_pb2.RequestEntry(request_id=name, prefix_marks=[1, 2])
    entry.profile.output_tokens.levels[:] = [0.5]
    entry.profile.output_tokens.values[:] = [10.0]
    return entry


def cached(book: Book, state: str = "READY", epoch: int = 1) -> list[dict[str, int]]:
    """Of the next request, where replica a has a state, and b and c are ready."""
    report = queue_pb2.ReplicaReport(slots=4, kv_tokens_total=10_000)
    routes = {
        name: ReplicaRoute(name, epoch, state if name == "a" else "READY", report, 0.0)
        for name in ("a", "b", "c")
    }
    return [dict(view.cached) for view in book.replica_views(routes, near=["next"])]


def test_a_replica_that_takes_no_requests_for_a_moment_keeps_its_cache() -> None:
    book = Book()
    for name in ("first", "next"):
        book.queue(QueuedEntry(entry(name), 0, 0, 0.0, 0, 0))
    book.sent("first", "a", 1, 0.0)
    assert cached(book) == [{"next": 2 * PIECE_TOKENS}, {}, {}]
    assert cached(book, "FORMING") == [{}, {}]
    assert cached(book) == [{"next": 2 * PIECE_TOKENS}, {}, {}]
    assert cached(book, epoch=2) == [{}, {}, {}]


def test_the_next_owner_knows_what_the_one_before_had_sent() -> None:
    raw = {"state": "RUNNING", "generation": "1", "tokens": "0", "accepted_ms": "0"}
    raw |= {"dispatched_ms": "1", "attempts": "1", "replica": "a", "epoch": "1"}
    record = {name.encode(): value.encode() for name, value in raw.items()}
    record[b"entry"] = entry("first").SerializeToString()
    book = Book()
    book.restore(parse_record("first", record))
    book.queue(QueuedEntry(entry("next"), 0, 0, 0.0, 0, 0))
    # Before any replica was looked at, none is known to be gone.
    assert book.replica_views({}) == []
    assert cached(book) == [{"next": 2 * PIECE_TOKENS}, {}, {}]
