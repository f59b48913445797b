"""Who is let in of those that would rather be refused than late, and what is learnt of it."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.dispatching import NOW, queued, replica
from tests.support.room import room
from uellm.core.cost import StepCost
from uellm.core.request import Priority
from uellm.policy import registry
from uellm.policy.admissions import Admissions
from uellm.policy.admitting import AT_ONCE, LISTED, starts
from uellm.policy.cslo_dispatch import CsloOdbsDispatch
from uellm.policy.cslo_odbs import CsloOdbsStep
from uellm.policy.dispatching import OLDEST
from uellm.policy.edf import EdfDispatch
from uellm.policy.fcfs import FcfsDispatch
from uellm.policy.margin import FIRST, KEPT, LEAST, MOST, Margin
from uellm.policy.price import Price, passes
from uellm.policy.selection import Fluid, Job, late_ones
from uellm.policy.shedding import CHOICE, WINDOW_SECONDS, Shedding, shed
from uellm.policy.views import DispatchDecision, DispatchPolicy, QueuedView, QueueView, ReplicaView
from uellm.simulator.mesh import Mesh, MeshSettings, Outcome, Record
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import profiler
from uellm.simulator.requests import Request

SLOTS = 2


def decide(
    *requests: QueuedView, new: str, price: float = inf, slots: int = SLOTS
) -> DispatchDecision:
    """A decision on the request ``new``; the others were let in before."""
    queue = QueueView(requests, unpromised=frozenset({new}), price=price)
    return EdfDispatch().dispatch(queue, [replica(slots=slots)], NOW)


def asked(name: str, deadline: float, tokens: float = 100.0) -> QueuedView:
    """A request that takes about ``tokens`` steps of 10 ms."""
    return queued(name, deadline, refusable=True, tokens=tokens)


@given(st.lists(st.floats(0.1, 10.0), max_size=40), st.integers(1, 6))
def test_each_starts_where_a_place_is_free_first(busy: list[float], places: int) -> None:
    found = starts(np.array(busy), places)
    free = [0.0] * places
    for seconds, start in zip(busy, found, strict=False):
        place = free.index(min(free))
        assert start == pytest.approx(free[place])
        free[place] += seconds
    assert found[-1] == pytest.approx(min(free))


def test_behind_a_long_line_work_runs_off_like_water() -> None:
    busy = np.ones(2 * LISTED)
    found = starts(busy, 4)
    assert len(found) == len(busy) + 1
    assert (np.diff(found) >= 0).all()
    assert found[-1] == pytest.approx(len(busy) / 4, rel=0.01)


def test_a_newcomer_that_would_make_another_late_is_refused_with_a_time_to_try_again() -> None:
    # Three before it have just time enough on two slots; its own deadline is earlier than theirs.
    before = [asked(f"q{i}", 3.2) for i in range(3)]
    decision = decide(*before, asked("new", 2.0), new="new")
    (refusal,) = decision.refusals
    assert (refusal.request_id, refusal.expired) == ("new", False)
    assert refusal.retry_after_seconds is not None and refusal.retry_after_seconds > 0
    assert ": it would make requests late that were let in before;" in refusal.message
    assert "try again in" in refusal.message
    assert decision.crowded.keys() == {"new"}
    # Those before are untouched, and without them it is let in.
    assert set(decision.order) | {i for d in decision.dispatches for i in d.request_ids} == {
        "q0",
        "q1",
        "q2",
    }
    assert not decide(asked("new", 2.0), new="new").refusals


def test_who_asks_for_best_effort_is_never_kept_out() -> None:
    before = [asked(f"q{i}", 3.2) for i in range(8)]
    assert not decide(*before, queued("new", 1.0, tokens=100.0), new="new").refusals


def test_who_needs_nothing_by_any_time_is_never_kept_out() -> None:
    before = [asked(f"q{i}", 3.2) for i in range(8)]
    unhurried = queued("new", None, refusable=True, tokens=100.0, accepted=NOW - 1e4)
    assert not decide(*before, unhurried, new="new").refusals


def test_a_place_that_is_free_is_taken_whatever_the_price() -> None:
    decision = decide(asked("q0", 3.0), asked("new", 3.0), new="new", price=1e-9)
    assert not decision.refusals
    assert not decision.let_in
    decision = decide(asked("q0", 3.0), asked("q1", 3.0), asked("new", 9.0), new="new", price=1e-9)
    (refusal,) = decision.refusals
    assert refusal.retry_after_seconds is not None and refusal.retry_after_seconds > 0
    assert not decision.crowded, "it was too dear, not crowded out"
    assert "take more time than each is given under this load" in refusal.message


def test_newcomers_are_let_in_one_after_the_other_as_far_as_time_goes() -> None:
    crowd = [asked(f"q{i}", 3.3) for i in range(20)]
    queue = QueueView(crowd, unpromised=frozenset(view.request_id for view in crowd))
    decision = CsloOdbsDispatch().dispatch(queue, [replica(slots=SLOTS)], NOW)
    stay = len(crowd) - len(decision.refusals)
    # Each takes about 1.4 s cautiously, and 3.3 s are enough for two turns of two.
    assert SLOTS < stay <= 2 * SLOTS
    assert [r.request_id for r in decision.refusals] == [f"q{i}" for i in range(stay, 20)]


def test_a_crowd_is_decided_on_by_and_by() -> None:
    crowd = {f"q{i}": asked(f"q{i}", 3.3) for i in range(int(2.5 * AT_ONCE))}
    unpromised, rounds = set(crowd), 0
    while unpromised:
        rounds += 1
        queue = QueueView(list(crowd.values()), unpromised=frozenset(unpromised))
        decision = CsloOdbsDispatch().dispatch(queue, [replica(slots=SLOTS)], NOW)
        decided = {r.request_id for r in decision.refusals} | decision.promises.keys()
        assert len(decided) == min(AT_ONCE, len(unpromised))
        # The oldest first; nothing is decided of the others, and they are looked at at once.
        assert decided == set(sorted(unpromised, key=lambda i: int(i[1:]))[:AT_ONCE])
        assert (decision.reconsider_at == NOW) == (len(unpromised) > AT_ONCE)
        unpromised -= decided
        for refusal in decision.refusals:
            del crowd[refusal.request_id]
    assert rounds == 3
    assert SLOTS < len(crowd) <= 2 * SLOTS


def test_a_crowd_is_promised_by_and_by_in_the_order() -> None:
    crowd = [queued(f"q{i}", 30.0 - i) for i in range(10)]
    waits, told, policy = {view.request_id for view in crowd}, [], EdfDispatch()
    while waits:
        queue = QueueView(crowd, unpromised=frozenset(waits), horizon=4)
        decision = policy.dispatch(queue, [replica(slots=0, in_flight=4)], NOW)
        told.append(sorted(decision.promises))
        waits -= decision.promises.keys()
        # The others are not left until something happens.
        assert (decision.reconsider_at == NOW) == bool(waits)
    assert told == [["q6", "q7", "q8", "q9"], ["q2", "q3", "q4", "q5"], ["q0", "q1"]]


def test_who_is_refused_is_not_told_that_it_would_have_been_in_time() -> None:
    crowd = [queued(f"q{i}") for i in range(6)]
    refused = []
    for tenths in range(5, 60):
        queue = QueueView(
            [*crowd, asked("asks", tenths / 10)], unpromised=frozenset({"asks"}), margin=0.5
        )
        decision = FcfsDispatch().dispatch(queue, [replica(slots=SLOTS)], NOW)
        for refusal in decision.refusals:
            assert refusal.promise is not None
            feasible = refusal.promise.earliest_feasible_finish
            assert feasible is not None and feasible > NOW + tenths / 10
        refused.append(bool(decision.refusals))
    assert sorted(refused, reverse=True) == refused
    assert {*refused} == {True, False}


@pytest.mark.parametrize("name", ["cslo-odbs", "edf", "fcfs", "priority", "sjf"])
def test_nobody_waits_for_a_promise_for_ever_while_others_come(name: str) -> None:
    policy, turns = registry.dispatch_policy(name), 0
    crowd = [queued(f"old{i}", tokens=500.0, priority=Priority.BATCH) for i in range(20)]
    waits = {view.request_id for view in crowd}
    while any(view.request_id in waits for view in crowd[:20]):
        # More come, and go before these, than are told in each decision.
        come = [
            queued(f"new{turns}-{i}", 20.0, tokens=5.0, priority=Priority.INTERACTIVE)
            for i in range(60)
        ]
        crowd, turns = [*crowd, *come], turns + 1
        waits |= {view.request_id for view in come}
        queue = QueueView(crowd, unpromised=frozenset(waits), horizon=5 * OLDEST)
        decision = policy.dispatch(queue, [replica(slots=1, in_flight=1)], NOW)
        assert decision.reconsider_at == NOW
        assert len(decision.promises) <= 5 * OLDEST + 5
        waits -= decision.promises.keys()
        assert turns <= 4


def test_promises_are_revised_however_many_have_none() -> None:
    crowd = [queued(f"q{i}", 30.0 + i) for i in range(10)]
    queue = QueueView(
        crowd,
        unpromised=frozenset(view.request_id for view in crowd[:9]),
        promised={"q9": NOW + 1e6},
        horizon=4,
    )
    decision = EdfDispatch().dispatch(queue, [replica(slots=0, in_flight=4)], NOW)
    assert set(decision.promises) == {"q0", "q1", "q2", "q3", "q9"}


def test_who_was_let_in_is_told_however_far_behind_it_is() -> None:
    crowd = [asked(f"q{i}", 30.0) for i in range(20)]
    queue = QueueView(crowd, unpromised=frozenset(v.request_id for v in crowd), horizon=4)
    decision = EdfDispatch().dispatch(queue, [replica(slots=SLOTS)], NOW)
    assert len(decision.let_in) > 4
    # Without a promise it would be a newcomer once more, and could be refused after all.
    assert decision.let_in.keys() <= decision.promises.keys()
    assert decision.promises["q19"].queue_position == 19


def test_whom_nobody_is_committed_to_yields_first() -> None:
    def job(committed: bool, seconds: float) -> Job:
        return Job(NOW + 1.5, seconds, 0.0, 0.0, 0.0, committed)

    jobs = [job(True, 2.0), job(False, 1.0), job(True, 0.1)]
    assert late_ones(jobs, Fluid(1, 0.0, 0, inf), NOW) >= {1}
    assert 0 not in late_ones(jobs[:2], Fluid(1, 0.0, 0, inf), NOW)


# ---- what is learnt ----------------------------------------------------------------------------


def test_the_margin_grows_with_who_is_late_and_shrinks_with_who_is_not() -> None:
    margin = Margin()
    margin.let_in([asked("late", 1.0)])
    margin.advance(NOW + 0.5)
    assert margin.value == FIRST
    margin.advance(NOW + 1.5)
    late = margin.value
    assert late > FIRST
    margin.finished("late", NOW + 2)
    assert margin.value == late, "it has been counted"
    margin.let_in([asked("kept", 9.0)])
    margin.finished("kept", NOW + 5)
    assert FIRST < margin.value < late


def test_a_first_token_that_comes_too_late_is_late() -> None:
    margin = Margin()
    margin.let_in([queued("q", 9.0, ttft_at=NOW + 1, refusable=True)])
    margin.began("q", NOW + 1.2)
    assert margin.value > FIRST
    margin = Margin()
    margin.let_in([queued("q", 9.0, ttft_at=NOW + 1, refusable=True)])
    margin.began("q", NOW + 0.8)
    margin.advance(NOW + 5)
    assert margin.value == FIRST, "the deadline is still to come"
    margin.finished("q", NOW + 6)
    assert margin.value < FIRST


def test_the_margin_comes_to_rest_where_enough_are_in_time() -> None:
    rng = np.random.default_rng(0)
    margin, kept = Margin(), []
    for i in range(6000):
        # A forecast that is short by some, and by much now and then.
        in_time = rng.exponential(0.15) < margin.value
        margin.let_in([asked(f"q{i}", 1.0)])
        margin.finished(f"q{i}", NOW + (0.5 if in_time else 2.0))
        kept.append(in_time)
    assert np.mean(kept[1000:]) == pytest.approx(KEPT, abs=0.01)
    assert LEAST <= margin.value <= MOST


def test_the_price_falls_when_time_is_taken_and_goes_when_it_is_not() -> None:
    price = Price()
    price.learn([1.0] * 10, [])
    assert price.value == inf
    for _ in range(300):
        price.learn([], [1.0, 3.0])
    fallen = price.value
    assert fallen < 1.0
    names = [f"r{i}" for i in range(1000)]
    cheap, dear = (sum(passes(n, cost, fallen) for n in names) for cost in (0.1, 1.0))
    assert dear < cheap
    assert all(passes(name, 100.0, inf) for name in names)
    for _ in range(5000):
        price.learn([], [], easy=1)
    assert price.value == inf


@pytest.mark.parametrize("factor", [2, 40])
def test_enough_pass_the_door_to_choose_from(factor: float) -> None:
    door, passed, now = Shedding(), 0, 0.0
    for _ in range(60):
        # 50 are let in in each window, whoever they are.
        passed = sum(not shed(f"{now}-{i}", door.share) for i in range(int(50 * factor)))
        now += WINDOW_SECONDS
        door.learn(passed, min(passed, 50), now)
    assert passed / 50 == pytest.approx(min(factor, CHOICE), rel=0.4)
    for _ in range(20):
        now += WINDOW_SECONDS
        door.learn(10, 10, now)
    assert door.share == 1.0


def overloaded(admissions: Admissions, now: float) -> None:
    """A hundred newcomers, most of whom would be late behind the others."""
    crowd = [asked(f"{now}-{i}", 3.3) for i in range(100)]
    learn(admissions, crowd, now)


def learn(admissions: Admissions, newcomers: list[QueuedView], now: float) -> None:
    """What comes of a decision on newcomers alone."""
    queue = QueueView(newcomers, unpromised=frozenset(each.request_id for each in newcomers))
    decision = EdfDispatch().dispatch(queue, [replica(slots=SLOTS)], NOW)
    known = {each.request_id: each for each in newcomers}
    admissions.decided(queue, decision, known.get, now)


@pytest.mark.parametrize("put_back", [0.0, 3600.0])
def test_a_door_opens_again_when_nobody_comes_any_more(put_back: float) -> None:
    """Also where another Redis took over, whose clock is behind."""
    admissions = Admissions()
    for window in range(10):
        overloaded(admissions, NOW + window * WINDOW_SECONDS)
    narrow = admissions.shedding.share
    assert narrow < 0.5
    for window in range(10, 30):
        admissions.advance(NOW - put_back + window * WINDOW_SECONDS)
    assert admissions.shedding.share == 1.0


def test_others_are_told_by_when_nine_in_ten_of_the_refused_could_have_been_answered() -> None:
    admissions = Admissions()
    assert admissions.feasible_seconds is None
    crowd = [asked(f"{i}", 3.3, tokens=50.0 + i) for i in range(40)]
    queue = QueueView(crowd, unpromised=frozenset(each.request_id for each in crowd))
    decision = EdfDispatch().dispatch(queue, [replica(slots=SLOTS)], NOW)
    admissions.decided(queue, decision, {each.request_id: each for each in crowd}.get, NOW)
    finishes = [each.promise.earliest_feasible_finish for each in decision.refusals if each.promise]
    within = sorted(finish - NOW for finish in finishes if finish is not None)
    assert len(within) > 30
    feasible = admissions.feasible_seconds
    assert feasible is not None
    assert within[int(0.85 * len(within))] < feasible < within[-1]


def test_who_never_had_a_chance_does_not_narrow_the_door_for_others() -> None:
    admissions = Admissions()
    for window in range(10):
        hopeless = [queued(f"{window}-{i}", 0.01, refusable=True, accepted=NOW) for i in range(100)]
        learn(admissions, hopeless, NOW + window * WINDOW_SECONDS)
    assert admissions.shedding.share == 1.0


def test_who_lost_its_time_before_it_was_looked_at_may_try_again() -> None:
    # Accepted two seconds ago, with time for more than a short answer then.
    (refusal,) = decide(
        queued("new", 0.01, refusable=True, tokens=100.0, accepted=NOW - 2), new="new"
    ).refusals
    assert refusal.retry_after_seconds == pytest.approx(2.0)
    assert "2 s passed before the request was looked at" in refusal.message
    (refusal,) = decide(queued("new", 0.01, refusable=True, accepted=NOW), new="new").refusals
    assert refusal.retry_after_seconds is None
    assert "is too short" in refusal.message


# ---- all of it, on the simulator ---------------------------------------------------------------

PACED = Platform("paced", StepCost(0.0, 0.02, 1e-6), kv_tokens=4096, slots=16, chunk_tokens=2048)
CAPACITY = 16 / (24 * 0.02)


def served(load: float, seconds: float) -> list[Record]:
    """What becomes of requests of 8 to 40 tokens that have four times as long as they take."""
    rng = np.random.default_rng(1)
    at = np.cumsum(rng.exponential(1 / (load * CAPACITY), int(1.3 * load * CAPACITY * seconds)))
    requests = [
        Request(f"r{i:05d}", float(t), 13, int(n), "any", int(n), deadline=0.08 * int(n))
        for i, (t, n) in enumerate(zip(at, rng.integers(8, 41, len(at)), strict=True))
        if t < seconds
    ]
    return simulated(requests)


def simulated(
    requests: list[Request], platform: Platform = PACED, policy: DispatchPolicy | None = None
) -> list[Record]:
    """What becomes of requests that are to be refused rather than late."""
    decides = policy or CsloOdbsDispatch()
    mesh = Mesh(platform, decides, CsloOdbsStep, MeshSettings(refusable=True))
    known = profiler("oracle", requests, np.random.default_rng(1))
    return list(mesh.run(requests, known).records)


def test_what_is_let_in_is_in_time_and_as_much_as_ever_under_overload() -> None:
    below = [record for record in served(1.0, 8.0) if record.request.arrival > 2]
    assert sum(record.met for record in below) > 0.97 * len(below)
    over = [record for record in served(8.0, 20.0) if record.request.arrival > 5]
    let_in = [record for record in over if record.outcome is not Outcome.REFUSED]
    assert sum(record.met for record in let_in) >= 0.95 * len(let_in)
    assert sum(record.met for record in over) / 15 >= CAPACITY
    # Each try is a lot of its own: whoever tries again is served in the end, however long.
    for fewest in range(8, 40, 8):
        alike = [r for r in over if fewest <= r.request.output_tokens < fewest + 8]
        assert sum(record.met for record in alike) >= 0.05 * len(alike)


class Noting(CsloOdbsDispatch):
    """The default policy; notes the margins that it is to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[float] = []

    def dispatch(
        self, queue: QueueView, replicas: Sequence[ReplicaView], now: float
    ) -> DispatchDecision:
        """See DispatchPolicy."""
        self.margins.append(queue.margin)
        return super().dispatch(queue, replicas, now)


def test_while_all_are_in_time_the_margin_does_not_grow_however_many_are_shed() -> None:
    # Long answers in few slots, and first tokens that are wanted soon: a request has begun long
    # before the scheduler, which nobody waits for, looks at its replica again. Those who are
    # refused at the door meanwhile are no occasion to call it late.
    rng = np.random.default_rng(1)
    platform = replace(PACED, slots=2)
    requests = [
        Request(f"r{i:05d}", 0.07 * i, 13, int(n), "any", int(n), ttft=0.1)
        for i, n in enumerate(rng.integers(50, 101, 400))
    ]
    policy = Noting()
    records = simulated(requests, platform, policy)
    let_in = [record for record in records if record.outcome is not Outcome.REFUSED]
    assert len(let_in) > 20
    assert len(let_in) < len(records) / 2
    assert all(record.met for record in let_in)
    assert max(policy.margins) <= FIRST


def test_whose_first_token_came_still_takes_its_slot() -> None:
    # Arithmetic sets the pace, so that hardly anybody is preempted. A request that wished for its
    # first token only has no wish left once that is there, but its answer goes on.
    rng = np.random.default_rng(1)
    cost = StepCost(0.0, 0.02, 0.02 / 64)
    platform = replace(PACED, cost=cost, slots=64, kv_tokens=65536)
    requests = [
        Request(f"r{i:05d}", 0.01 * i, 13, int(n), "any", int(n), ttft=1.0)
        for i, n in enumerate(rng.integers(100, 111, 1000))
    ]
    policy = Noting()
    let_in = [r for r in simulated(requests, platform, policy) if r.outcome is not Outcome.REFUSED]
    assert len(let_in) > 200
    assert sum(record.met for record in let_in) >= 0.95 * len(let_in)
    assert max(policy.margins) < MOST / 2


def test_after_a_crowd_and_a_pause_nobody_is_refused() -> None:
    crowd = served(8.0, 4.0)
    later = [
        Request(f"l{i:02d}", 9.0 + 0.05 * i, 13, 16, "any", 16, deadline=1.28) for i in range(40)
    ]
    records = simulated([record.request for record in crowd] + later)[len(crowd) :]
    assert all(record.met for record in records)


def test_a_crowd_that_finds_places_free_makes_nothing_dear() -> None:
    price = Price()
    price.learn([1.0], [2.0] * 50)
    assert price.value < inf
    price.learn([1.0], [], easy=10_000_000)
    assert price.value == inf


def test_who_had_a_day_and_has_ended_takes_no_room() -> None:
    margin, most = Margin(), [0, 0]
    for i in range(6000):
        margin.advance(NOW + i)
        margin.let_in([asked(f"q{i}", 86_400.0 + i)])
        margin.finished(f"q{i}", NOW + i + 1)
        most[i // 3000] = max(most[i // 3000], room(margin))
    assert most[1] < 1.1 * most[0]
