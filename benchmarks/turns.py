"""What a scheduler's turn takes of its CPU with many waiting, part by part; Redis aside.

    python -m benchmarks.turns [--waiting 100000] [--turns 60] [--json]

Four replicas of 256 slots; between two turns 20 requests end and 20 come. First nobody has a
promise, as where a crowd came at once: ``crowd``. Then all have one: ``calm``. Every tenth turn may
revise promises.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from uellm_scheduler.book import Book
from uellm_scheduler.model_scheduler import HORIZON

from benchmarks.arguments import count, parser_of
from uellm.convert import duration, promise_to_proto
from uellm.core.request import LEVELS
from uellm.heap import keep_freed_memory
from uellm.policy.admissions import Admissions
from uellm.policy.registry import DEFAULT_POLICY, dispatch_policy
from uellm.policy.track_records import TrackRecords
from uellm.streams.messages import QueuedEntry, ReplicaRoute
from uellm.v1 import common_pb2, queue_pb2

NOW = 1e6
COMING = 20
UNCOUNTED = 3
"""First turns of each kind, in which replicas fill up."""
Made = TypeVar("Made")


class Turns:
    """The turns of one scheduler.

    Args:
        waiting: requests that wait at first.
    """

    def __init__(self, waiting: int) -> None:
        self.now, self.came, self.book = NOW, 0, Book()
        self.parts: dict[str, float] = {}
        self._policy = dispatch_policy(DEFAULT_POLICY)
        self._record, self._admissions = TrackRecords(2.0), Admissions(2.0)
        report = queue_pb2.ReplicaReport(
            epoch=1, slots=256, prefill_seconds_per_token=1e-4, decode_step_seconds=0.04
        )
        names = [f"replica-{number}" for number in range(4)]
        self._routes = {name: ReplicaRoute(name, 1, "READY", report, NOW) for name in names}
        self._come(waiting)

    def turn(self, *, revise: bool) -> dict[str, float]:
        """One turn; CPU milliseconds by part."""
        self.now += 0.1
        self.parts = {}
        book, now = self.book, self.now
        self._come(COMING)
        for request_id in list(book.in_flight)[:COMING]:
            book.end(request_id)
            self._record.finished(request_id, now)
        near = book.unpromised(HORIZON)
        views = self._part("replicas", lambda: book.replica_views(self._routes, 4, near))
        room = sum(max(0, view.slots - len(view.in_flight)) for view in views)
        facts = {"horizon": max(HORIZON, 2 * room), "experience": self._record}
        self._part("learning", lambda: self._record.advance(now))
        view = self._part("queue", lambda: book.queue_view(now, revise=revise, **facts))  # type: ignore[arg-type]
        name = "decision, revising" if revise else "decision"
        decision = self._part(name, lambda: self._policy.dispatch(view, views, now))
        new = [name for name in decision.promises if name in view.unpromised]
        self._part("following", lambda: self._follow(new))
        self._part(
            "admission", lambda: self._admissions.decided(view, decision, book.waiting_view, now)
        )
        for request_id, promise in decision.promises.items():
            book.promised(request_id, promise_to_proto(promise, 1), now)
        for batch in decision.dispatches:
            for request_id in batch.request_ids:
                book.sent(request_id, batch.replica, 1, now)
        return self.parts

    def calm(self) -> None:
        """Give everybody a promise."""
        promise = common_pb2.Promise(revision=1)
        for request_id in self.book.unpromised():
            self.book.promised(request_id, promise, self.now)

    def _follow(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._record.promised(request_id, self.now)

    def _come(self, count: int) -> None:
        for number in range(self.came, self.came + count):
            median = 50 + number % 200
            lengths = common_pb2.QuantileFunction(
                levels=LEVELS, values=[median * (0.5 + level) for level in LEVELS]
            )
            entry = queue_pb2.RequestEntry(
                request_id=f"request-{number}",
                slo=common_pb2.Slo(deadline=duration(600 + number % 600)),
                profile=common_pb2.ResourceProfile(prompt_tokens=100, output_tokens=lengths),
                max_tokens=1000,
            )
            self.book.queue(QueuedEntry(entry, 0, 0, self.now, 0, 0))
        self.came += count

    def _part(self, name: str, make: Callable[[], Made]) -> Made:
        began = time.thread_time()
        made = make()
        self.parts[name] = 1e3 * (time.thread_time() - began)
        return made


def measure(waiting: int, turns: int) -> dict[str, dict[str, dict[str, float]]]:
    """Median and longest CPU milliseconds of each part, and of all, by kind of turn."""
    scheduler, found = Turns(waiting), {}
    for kind in ("crowd", "calm"):
        if kind == "calm":
            scheduler.calm()
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(UNCOUNTED + turns):
            parts = scheduler.turn(revise=number % 10 == 0)
            for name, milliseconds in [*parts.items(), ("all", sum(parts.values()))]:
                if number >= UNCOUNTED:
                    times[name].append(milliseconds)
        found[kind] = {
            name: {"median_ms": sorted(each)[len(each) // 2], "most_ms": max(each)}
            for name, each in times.items()
        }
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = parser_of("turns", __doc__)
    parser.add_argument("--waiting", type=count, default=100_000, help="requests that wait")
    parser.add_argument("--turns", type=count, default=60, help="measured; of each kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    keep_freed_memory()  # As a scheduler does.
    found = measure(options.waiting, options.turns)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for kind, parts in found.items():
        print(f"{kind:20} {'median ms':>10} {'most ms':>10}")
        for name, each in sorted(parts.items(), key=lambda item: -item[1]["median_ms"]):
            print(f"  {name:18} {each['median_ms']:10.2f} {each['most_ms']:10.2f}")


if __name__ == "__main__":
    main()
