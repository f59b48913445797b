"""Columns of a queue: the same whatever was seen before."""

from random import Random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.dispatching import NOW, queued
from uellm.policy.columns import Columns, ColumnsCache
from uellm.policy.due import due_at
from uellm.policy.views import QueuedView


def same(one: Columns, other: Columns) -> bool:
    return list(one.views) == list(other.views) and np.array_equal(one.numbers, other.numbers)


@settings(max_examples=60, deadline=None)
@given(st.randoms(), st.integers(0, 400))
def test_columns_follow_a_queue_that_changes(random: Random, size: int) -> None:
    cache = ColumnsCache()
    number = iter(range(10**6))

    def new() -> QueuedView:
        facts: dict[str, Any] = {"accepted": NOW - random.random(), "tokens": random.random() * 90}
        return queued(f"q{next(number)}", random.choice([None, 5.0, random.random()]), **facts)

    waiting = [new() for _ in range(size)]
    for _ in range(8):
        assert same(cache.of(waiting), ColumnsCache().of(waiting))
        change = random.randrange(6)
        if change == 0:
            random.shuffle(waiting)
        elif change == 1:
            waiting = waiting[random.randrange(5) :]
        elif change == 2 and waiting:
            waiting[random.randrange(len(waiting))] = new()
        for _ in range(min(random.randrange(6), len(waiting))):
            del waiting[random.randrange(len(waiting))]
        waiting += [new() for _ in range(random.randrange(4))]


@given(st.integers(0, 300), st.sets(st.integers(-5, 400)), st.integers(0, 300))
def test_some_are_found_by_their_ids_whoever_waits(count: int, wanted: set[int], sent: int) -> None:
    waiting = [queued(f"q{number}", 5.0) for number in range(count)]
    behind = ColumnsCache().of([queued(f"q{count + number}", 5.0) for number in range(sent)])
    everybody = ColumnsCache().of(waiting).joined(behind)
    ids = {f"q{number}" for number in wanted}
    found = everybody.among(ids).tolist()
    assert found == [i for i, view in enumerate(everybody.views) if view.request_id in ids]
    assert len(everybody.views) == everybody.numbers.shape[1] == count + sent


@given(st.one_of(st.none(), st.floats(-5, 50)), st.one_of(st.none(), st.floats(NOW - 5, NOW + 50)))
def test_columns_say_what_the_requests_say(deadline: float | None, ttft_at: float | None) -> None:
    request = queued("q", deadline, ttft_at=ttft_at, resume_tokens=0, refusable=True, prompt=7)
    columns = ColumnsCache().of([request])
    assert columns.due(NOW)[0] == due_at(request.slo, NOW)
    assert (columns.low[0], columns.median[0], columns.high[0]) == (12.0, 20.0, 28.0)
    assert (columns.prefill[0], columns.refusable[0]) == (7, True)
    resumed = ColumnsCache().of([queued("q", deadline, ttft_at=ttft_at, resume_tokens=15)])
    assert (resumed.prefill[0], resumed.median[0], resumed.low[0]) == (25, 5.0, 1.0)
    assert resumed.first_token[0] == np.inf
