"""What a model's owner knows of its requests."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from uellm_scheduler.book import Book

from uellm.streams.messages import QueuedEntry
from uellm.v1 import common_pb2, queue_pb2

ENTRY = queue_pb2.RequestEntry()
ENTRY.profile.output_tokens.levels[:] = [0.5]
ENTRY.profile.output_tokens.values[:] = [10.0]


def queued(request_id: str, generation: int) -> QueuedEntry:
    entry = queue_pb2.RequestEntry()
    entry.CopyFrom(ENTRY)
    entry.request_id = request_id
    return QueuedEntry(entry, generation, 0, 0.0, 0, 0)


@given(st.randoms(use_true_random=False))
def test_those_are_unpromised_whose_ticket_has_no_promise(random: Random) -> None:
    book = Book()
    for step in range(30):
        name = f"q{random.randrange(5)}"
        match random.randrange(5):
            case 0:
                book.queue(queued(name, step))
            case 1:
                book.sent(name, "replica", 1, 0.0)
            case 2:
                book.promised(name, common_pb2.Promise(revision=step), 0.0)
            case 3:
                book.drop(name)
            case 4 if step % 5 == 0:
                book.end(name)
        tickets = [*book.waiting.values(), *book.in_flight.values()]
        assert set(book.unpromised()) == {t.request_id for t in tickets if t.promise is None}
