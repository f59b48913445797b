"""Who waits, as columns that follow: the same as if it were looked at anew."""

from random import Random
from typing import Any
from weakref import ref

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.dispatching import NOW, queued, replica
from uellm.policy import registry
from uellm.policy.columns import ColumnsCache, Line
from uellm.policy.views import QueuedView, QueueView
from uellm.policy.waiting import SPARE, Waiting, line_of


class Crowd:
    """What waits, in a list and in what follows it."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._number = 0
        self.views: list[QueuedView] = []
        self.waiting = Waiting()

    def come(self) -> None:
        """Some come; one that waits may come once more."""
        for _ in range(self._random.choice([0, 1, 3, 20])):
            self._number += 1
            again = self.views and self._random.random() < 0.1
            name = self._random.choice(self.views).request_id if again else f"q{self._number}"
            facts: dict[str, Any] = {"tokens": 1 + 80 * self._random.random()}
            facts |= {"refusable": self._random.random() < 0.5, "accepted": NOW - 1}
            view = queued(name, self._random.choice([None, 60 * self._random.random()]), **facts)
            self.views = [each for each in self.views if each.request_id != name] + [view]
            self.waiting.add(view)

    def go(self) -> None:
        """Some go, and some that do not wait."""
        for _ in range(min(self._random.choice([0, 1, 3, 20]), len(self.views))):
            view = self.views.pop(self._random.randrange(len(self.views)))
            self.waiting.remove(view.request_id)
        self.waiting.remove("nobody")


def same(line: Line, views: list[QueuedView]) -> bool:
    anew = ColumnsCache().of(views)
    return (
        len(line) == len(views)
        and all(one is other for one, other in zip(line, views, strict=True))
        and all(line[place] is view for place, view in enumerate(views))
        and all(line[place - len(views)] is view for place, view in enumerate(views))
        and list(line[-2:]) == views[-2:]
        and np.array_equal(line.columns.numbers, anew.numbers)
        and np.array_equal(line.columns.tags, anew.tags)
    )


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_lines_follow_who_comes_and_goes_and_stay_as_they_are(random: Random) -> None:
    crowd, lines = Crowd(random), []
    for _ in range(8):
        for what in random.choices([crowd.come, crowd.go], k=random.randrange(4)):
            what()
        assert len(crowd.waiting) == len(crowd.views)
        lines.append((crowd.waiting.line(), list(crowd.views)))
        assert all(same(line, views) for line, views in lines)
        behind = [queued(f"behind-{i}") for i in range(random.randrange(3))]
        assert same(line_of(lines[-1][0], behind), [*crowd.views, *behind])


class Seen(QueuedView):
    """A view that can be watched."""


def test_those_that_are_gone_are_let_go_of() -> None:
    crowd, gone = Waiting(), []
    first = queued("first")
    crowd.add(first)
    for number in range(3 * SPARE):
        view = Seen(f"q{number}", first.slo, first.profile)
        crowd.add(view)
        assert [each.request_id for each in crowd.line()] == ["first", f"q{number}"]
        crowd.remove(f"q{number}")
        gone.append(ref(view))
        del view
    assert sum(each() is not None for each in gone) <= SPARE + 4
    assert same(crowd.line(), [first])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["cslo-odbs", "edf", "fcfs", "slo-odbs"]), st.randoms(use_true_random=False))
def test_decisions_are_those_of_a_plain_list(name: str, random: Random) -> None:
    crowd, policy = Crowd(random), registry.dispatch_policy(name)
    for _ in range(6):
        crowd.come()
        crowd.go()
        new = frozenset(view.request_id for view in crowd.views if random.random() < 0.5)
        promised = {view.request_id: NOW for view in crowd.views if view.request_id not in new}
        facts: dict[str, Any] = {"unpromised": new, "promised": promised, "horizon": 5}
        views = [replica(f"r{i}", in_flight=i + 2, kv_tokens_total=600 * i) for i in range(2)]
        decision = policy.dispatch(QueueView(crowd.waiting.line(), **facts), views, NOW)
        fresh = registry.dispatch_policy(name)
        assert decision == fresh.dispatch(QueueView(list(crowd.views), **facts), views, NOW)
