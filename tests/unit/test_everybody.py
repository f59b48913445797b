"""Who waits and who was sent, as columns: the same whatever was seen before."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.dispatching import NOW, queued, replica
from uellm.policy import registry
from uellm.policy.columns import ColumnsCache
from uellm.policy.estimate import progress
from uellm.policy.everybody import SentCache, everybody
from uellm.policy.views import Answered, InFlightView, QueuedView, QueueView, ReplicaView


class Mesh:
    """A queue and two replicas, and what happens to them between two decisions."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._number = 0
        self.now = NOW
        self.waiting: list[QueuedView] = []
        self.sent: list[list[InFlightView]] = [[], []]
        self.answered: dict[str, Answered] = {}

    def go_on(self) -> None:
        """Some end, some begin, some are sent, some come."""
        random = self._random
        self.now += random.random()
        for sent in self.sent:
            sent[:] = [one for one in sent if random.random() < 0.8]
            for one in sent:
                if one.request is not None and random.random() < 0.3:
                    tokens = one.request.resume_tokens + random.randrange(1, 60)
                    self.answered[one.request_id] = Answered(tokens, self.now)
        for _ in range(min(random.randrange(4), len(self.waiting))):
            view = self.waiting.pop(random.randrange(len(self.waiting)))
            request = view if random.random() < 0.8 else None
            facts = (self.now, view.profile.prompt_tokens, 20.0, 28.0)
            self.sent[random.randrange(2)].append(
                InFlightView(view.request_id, *facts, request=request)
            )
        for _ in range(random.randrange(5)):
            self._number += 1
            deadline = random.choice([None, 60 * random.random()])
            tokens, refusable = 1 + 80 * random.random(), random.random() < 0.5
            self.waiting.append(
                queued(f"q{self._number}", deadline, tokens=tokens, refusable=refusable)
            )

    def replicas(self) -> list[ReplicaView]:
        """As a policy sees them."""
        return [
            replace(
                replica(f"r{i}", kv_tokens_total=400),
                in_flight=tuple(sent),
                answered={
                    one.request_id: self.answered[one.request_id]
                    for one in sent
                    if one.request_id in self.answered
                },
                answered_at=self.now - 0.1,
            )
            for i, sent in enumerate(self.sent)
        ]


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_columns_follow_what_replicas_were_sent(random: Random) -> None:
    mesh, cache = Mesh(random), SentCache()
    for _ in range(10):
        mesh.go_on()
        waiting, views = ColumnsCache().of(mesh.waiting), mesh.replicas()
        found, anew = everybody(waiting, views, cache), everybody(waiting, views, SentCache())
        assert list(found.columns.views) == list(anew.columns.views)
        assert found.waiting == len(mesh.waiting)
        assert np.array_equal(found.columns.numbers, anew.columns.numbers)
        for name in ("sent_at", "strangers", "begun"):
            assert np.array_equal(getattr(found, name), getattr(anew, name))
        sent = [(view, one) for view in views for one in view.in_flight]
        known = [one.request is not None for _, one in sent]
        assert found.strangers.tolist() == [False] * found.waiting + [not each for each in known]
        begun = [one.request_id in view.answered for view, one in sent]
        assert found.begun[found.waiting :].tolist() == begun


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["cslo-odbs", "edf"]), st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_those_before(name: str, random: Random) -> None:
    mesh, policy = Mesh(random), registry.dispatch_policy(name)
    for _ in range(8):
        mesh.go_on()
        queue = QueueView(
            tuple(mesh.waiting), unpromised=frozenset(view.request_id for view in mesh.waiting)
        )
        decision = policy.dispatch(queue, mesh.replicas(), mesh.now)
        fresh = registry.dispatch_policy(name)
        assert decision == fresh.dispatch(queue, mesh.replicas(), mesh.now)


def test_progress_is_told_or_goes_by_time() -> None:
    waited = queued("told", tokens=20.0)
    sent = [
        InFlightView("young", NOW - 0.11, 10, 20.0, 40.0),
        InFlightView("longer", NOW - 0.31, 10, 20.0, 40.0),
        InFlightView("endless", NOW - 9.0, 10, 20.0, 40.0),
        InFlightView("told", NOW - 9.0, 10, 20.0, 40.0, request=waited),
    ]
    view = replace(
        replica(), in_flight=sent, answered={"told": Answered(5, NOW - 1)}, answered_at=NOW - 0.02
    )
    came, left, most = progress(view, NOW)
    # Prompts of 10 ms, steps of 10 ms.
    assert came == pytest.approx([10.0, 30.0, 40.0, 7.0])
    assert left[:3] == pytest.approx([10.0, 5.0, 5.0])
    assert most[:3] == pytest.approx([30.0, 10.0, 5.0])
    # By now two more have come than when it was looked at.
    _, median, high = waited.profile.output_tokens.given(5)
    assert (left[3], most[3]) == pytest.approx((median - 7, high - 7))
