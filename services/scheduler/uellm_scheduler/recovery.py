"""Learning what there is, when a scheduler becomes a model's owner or Redis was away."""

from uellm.streams.scheduler_queue import SchedulerQueue
from uellm_scheduler.book import Book

AT_ONCE = 500


async def recover(queue: SchedulerQueue, token: int, consumer: str) -> tuple[Book, str]:
    """A book of all waiting and sent requests, and the completions' place that it is current to.

    Nothing is lost between the two: the place is read first, and an end that is read twice is
    found to be known.

    Raises:
        AbortedError: if the model has another owner.
    """
    await queue.ensure_requests_group()
    place = await queue.completions_place()
    book = Book()
    for entry in await queue.read_requests(consumer, AT_ONCE, None, pending=True):
        book.queue(entry)
    await claim(queue, token, consumer, book)
    # What nobody has read yet takes part in the first decision too.
    while entries := await queue.read_requests(consumer, AT_ONCE, None):
        for entry in entries:
            book.queue(entry)
    sent = await queue.dispatched()
    held = []
    for i in range(0, len(sent), AT_ONCE):
        records = await queue.records(sent[i : i + AT_ONCE])
        held += [each for each in records if each and each.state in {"LEASED", "RUNNING"}]
    for record in sorted(held, key=lambda each: each.dispatched_at or each.accepted_at):
        book.restore(record)
    await _remember_promises(queue, book)
    return book, place


async def claim(queue: SchedulerQueue, token: int, consumer: str, book: Book) -> int:
    """Take over what other schedulers read and did not dispatch; returns how many."""
    taken = 0
    while entries := await queue.claim(token, consumer, AT_ONCE):
        taken += sum(book.queue(entry) for entry in entries)
    return taken


async def _remember_promises(queue: SchedulerQueue, book: Book) -> None:
    """Take promises from their records alone: one that was made and not recorded was not given."""
    unknown = book.unpromised()
    for i in range(0, len(unknown), AT_ONCE):
        chunk = unknown[i : i + AT_ONCE]
        for request_id, promise in zip(chunk, await queue.promises(chunk), strict=True):
            if promise is not None:
                book.promised(request_id, promise)
