"""What a scheduler knows of its requests: who waits, and who has no promise yet."""

from hypothesis import given
from hypothesis import strategies as st
from uellm_scheduler.book import REVISED_AT_ONCE, Book

from uellm.core.request import LEVELS
from uellm.streams.messages import QueuedEntry
from uellm.v1 import common_pb2, queue_pb2


def entry(name: str, generation: int) -> QueuedEntry:
    message = queue_pb2.RequestEntry(request_id=name)
    message.profile.output_tokens.levels.extend(LEVELS)
    message.profile.output_tokens.values.extend([5.0] * len(LEVELS))
    return QueuedEntry(message, generation, 0, 1.0, generation, 0)


NAMES = st.sampled_from("abcdef")
WHAT = st.sampled_from(["queue", "sent", "promised", "drop", "end"])
STEPS = st.lists(st.tuples(WHAT, NAMES), max_size=40)


@given(STEPS)
def test_policies_see_who_waits_and_who_has_no_promise(steps: list[tuple[str, str]]) -> None:
    book = Book()
    for turn, (what, name) in enumerate(steps):
        if what == "queue":
            book.queue(entry(name, turn))
        elif what == "sent":
            book.sent(name, "r0", 1, 2.0)
        elif what == "promised":
            book.promised(name, common_pb2.Promise(revision=turn + 1), 2.0)
        elif what == "drop":
            book.drop(name)
        else:
            book.end(name)
        seen = book.queue_view(3.0, revise=False, horizon=None).waiting
        assert [view.request_id for view in seen] == list(book.waiting)
        assert all(view is book.waiting[view.request_id].view for view in seen)
        assert not book.waiting.keys() & book.in_flight.keys()
        tickets = [*book.waiting.values(), *book.in_flight.values()]
        assert set(book.unpromised()) == {t.request_id for t in tickets if t.promise is None}


def test_promises_of_a_crowd_are_revised_in_turns() -> None:
    book, crowd = Book(), [f"q{i}" for i in range(int(2.5 * REVISED_AT_ONCE))]
    for name in [*crowd, "sent"]:
        book.queue(entry(name, 0))
        book.promised(name, common_pb2.Promise(revision=1), 1.0)
    book.sent("sent", "r0", 1, 2.0)
    left, turns = set(crowd), 0
    while left:
        turns += 1
        gone, *rest = sorted(left)
        book.drop(gone)
        left = set(rest)
        promised = book.queue_view(3.0, revise=True, horizon=None).promised
        assert len(promised) == min(REVISED_AT_ONCE, len(book.waiting)) + 1
        assert "sent" in promised
        assert promised.keys() <= {*book.waiting, "sent"}
        left -= promised.keys()
    assert turns == 3
    # Whose promise was revised just now has time.
    book.promised("sent", common_pb2.Promise(revision=2), 2.5)
    assert "sent" not in book.queue_view(3.0, revise=True, horizon=None).promised
