"""The simulated mesh: nothing is lost, no room is exceeded, and simple cases come out exactly."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.simulated import AT_ONCE, TINY, UNBOUND, simulate
from uellm.core.cost import StepCost
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import Priority
from uellm.policy.edf import EdfDispatch
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    EngineView,
    QueueView,
    ReplicaView,
    StepDecision,
)
from uellm.simulator.mesh import Execution, MeshSettings, Outcome, Run
from uellm.simulator.platforms import PLATFORMS, Platform
from uellm.simulator.requests import Request

BLOCKS = replace(TINY, block_tokens=8)


class Careless:
    """Reserves nothing, admits what it can, and at first gives back or takes away now and then."""

    name = "careless"

    def __init__(self, hand_back: bool, pace: int) -> None:
        self._hand_back = hand_back
        self._pace = pace
        self._asked = 0

    def step(self, engine: EngineView, now: float) -> StepDecision:
        self._asked += 1
        odd = self._asked % 3 == 0 and self._asked < 60
        back = odd and self._hand_back and len(engine.waiting) > 1
        ids = [sequence.request_id for sequence in engine.waiting]
        return StepDecision(
            admit=tuple(ids[1:] if back else ids),
            hand_back=(ids[0],) if back else (),
            preempt=(engine.running[0].request_id,) if odd and len(engine.running) > 2 else (),
            chunk_tokens=self._pace,
            reserve=dict.fromkeys(ids, 1),
            reconsider_at=now + 0.02 if ids else None,
        )


def request(number: int, prompt: int, output: int, arrival: float = 0.0) -> Request:
    return Request(f"r{number:04d}", arrival, prompt, output, "all", 60)


REQUESTS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 60), st.floats(0, 0.5)), min_size=1, max_size=25
).map(
    lambda facts: [
        request(i, *lengths, arrival)
        for i, (*lengths, arrival) in enumerate(sorted(facts, key=lambda fact: fact[2]))
    ]
)


def check(run: Run, requests: list[Request], platform: Platform = TINY) -> None:
    """What holds of every run."""
    assert [record.request for record in run.records] == requests
    for record in run.records:
        assert record.outcome is Outcome.FINISHED
        assert record.first_token_at is not None
        assert record.dispatched_at is not None
        facts = record.request
        cost = platform.cost
        shortest = cost.per_token * facts.prompt_tokens + cost.weights * (facts.output_tokens - 1)
        assert record.finished_at - facts.arrival >= shortest - 1e-9
        assert facts.arrival <= record.dispatched_at <= record.first_token_at
        assert record.first_token_at <= record.finished_at
    assert all(engine.peak <= platform.kv_tokens for engine in run.engines)
    useful = sum(r.prompt_tokens + r.output_tokens - 1 for r in requests)
    assert sum(engine.computed - engine.wasted for engine in run.engines) == useful
    assert sum(engine.preemptions for engine in run.engines) == sum(
        record.preemptions for record in run.records
    )


@settings(max_examples=150, deadline=None)
@given(
    REQUESTS,
    st.sampled_from(["oracle", "b80", "noise:3"]),
    st.integers(1, 3),
    st.sampled_from(Execution),
    st.booleans(),
    st.sampled_from([TINY, BLOCKS]),
)
def test_every_request_ends_once_and_no_token_is_lost(
    requests: list[Request],
    predictor: str,
    replicas: int,
    execution: Execution,
    delay: bool,
    platform: Platform,
) -> None:
    mesh = MeshSettings(replicas, execution) if delay else replace(AT_ONCE, replicas=replicas)
    mesh = replace(mesh, execution=execution)
    for dispatch in (EdfDispatch(), FcfsDispatch(UNBOUND)):
        run = simulate(requests, platform, mesh, predictor=predictor, dispatch=dispatch)
        check(run, requests, platform)


@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.booleans(), st.integers(1, 16), st.sampled_from([TINY, BLOCKS]))
def test_nothing_is_lost_by_a_policy_that_preempts_and_hands_back(
    requests: list[Request], hand_back: bool, pace: int, platform: Platform
) -> None:
    run = simulate(requests, platform, step=Careless(hand_back, pace))
    check(run, requests, platform)


@given(REQUESTS, st.sampled_from(Execution))
@settings(max_examples=20, deadline=None)
def test_a_run_is_a_function_of_its_arguments(
    requests: list[Request], execution: Execution
) -> None:
    mesh = MeshSettings(2, execution)
    assert simulate(requests, mesh=mesh) == simulate(requests, mesh=mesh)


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda platform: platform.name)
@given(prompt=st.integers(1, 3000), output=st.integers(1, 2000))
@settings(max_examples=25, deadline=None)
def test_one_request_alone_takes_its_isolated_latency(
    platform: Platform, prompt: int, output: int
) -> None:
    alone = replace(request(0, prompt, output), max_tokens=2048)
    (record,) = simulate([alone], platform).records
    expected = platform.cost.isolated(prompt, output, platform.chunk_tokens)
    assert record.finished_at == pytest.approx(expected)
    assert record.first_token_at == pytest.approx(
        platform.cost.prefill(prompt, platform.chunk_tokens)
    )
    static = replace(AT_ONCE, execution=Execution.STATIC)
    (padded,) = simulate([alone], platform, static).records
    assert padded.finished_at == padded.first_token_at == pytest.approx(expected)


def test_what_comes_during_a_long_stretch_joins_at_the_next_step() -> None:
    cost = TINY.cost
    long, late = request(0, 1, 60), request(1, 1, 2, arrival=0.0333)
    first, second = simulate([long, late]).records
    # Step i of the first request, counted from 0, reads i tokens behind its prompt.
    ends = [cost.seconds(1, 0, 1.0)]
    while ends[-1] < late.arrival:
        ends.append(ends[-1] + cost.seconds(1, len(ends) + 1))
    mixed = ends[-1] + cost.seconds(2, len(ends) + 1, 1.0)
    assert second.first_token_at == pytest.approx(mixed)
    assert second.finished_at == pytest.approx(mixed + cost.seconds(2, len(ends) + 2 + 2))
    assert first.finished_at > second.finished_at


def test_room_is_taken_in_whole_blocks() -> None:
    """Four of 9 tokens each fit into 40, but not into five blocks of 8."""

    class Eager:
        name = "eager"

        def step(self, engine: EngineView, now: float) -> StepDecision:
            assert engine.block_tokens == platform.block_tokens
            ids = [sequence.request_id for sequence in engine.waiting]
            return StepDecision(tuple(ids), chunk_tokens=64, reserve=dict.fromkeys(ids, 9))

    requests = [request(i, 8, 2) for i in range(4)]
    for block, at_once in ((1, 4), (8, 2), (20, 2), (40, 1)):
        platform = replace(TINY, kv_tokens=40, chunk_tokens=64, block_tokens=block)
        records = simulate(requests, platform, step=Eager()).records
        ends = [record.finished_at for record in records]
        assert ends.count(ends[0]) == at_once


def test_a_block_more_is_taken_when_the_last_one_is_full() -> None:
    """Two that reserve nothing grow until one has to give way."""
    requests = [request(0, 7, 30), request(1, 5, 30)]
    platform = replace(TINY, kv_tokens=56, block_tokens=8)
    run = simulate(requests, platform, step=Careless(hand_back=False, pace=16))
    check(run, requests, platform)
    # The seventh block was the first one's; the other had filled its third.
    assert (run.engines[0].preemptions, run.engines[0].wasted) == (1, 24)


def test_what_a_request_takes_on_its_way_is_added_at_both_ends() -> None:
    alone = request(0, 10, 20, arrival=1.0)
    (near,) = simulate([alone]).records
    way = MeshSettings(
        accept_seconds=0.02,
        dispatch_seconds=0.003,
        completion_seconds=0.0,
        delivery_seconds=0.1,
    )
    (far,) = simulate([alone], mesh=way).records
    assert near.first_token_at is not None
    assert near.dispatched_at is not None
    assert far.dispatched_at == pytest.approx(near.dispatched_at + 0.02)
    assert far.first_token_at == pytest.approx(near.first_token_at + 0.123)
    assert far.finished_at == pytest.approx(near.finished_at + 0.123)
    assert far.request == alone


def test_prompts_are_computed_in_the_order_that_was_decided() -> None:
    class LastFirst(FcfsStep):
        def step(self, engine: EngineView, now: float) -> StepDecision:
            ids = [sequence.request_id for sequence in (*engine.running, *engine.waiting)]
            return replace(super().step(engine, now), prefill=tuple(sorted(ids, reverse=True)[:1]))

    requests = [request(i, 20, 2) for i in range(3)]
    first_tokens = [
        [record.first_token_at for record in simulate(requests, step=step).records]
        for step in (FcfsStep(), LastFirst())
    ]
    in_order, last_first = first_tokens
    assert in_order == sorted(in_order)
    # Who is not named follows by admission.
    assert last_first.index(min(last_first)) == 2
    assert last_first[0] < last_first[1]


@given(requests=REQUESTS, replicas=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_policies_decide_the_same_whether_or_not_promises_are_made(
    requests: list[Request], replicas: int
) -> None:
    def ends(*, promises: bool) -> list[float]:
        mesh = replace(AT_ONCE, replicas=replicas, promises=promises)
        dispatch = EdfDispatch(DispatchSettings())
        run = simulate(requests, mesh=mesh, dispatch=dispatch)
        assert all((record.promise is not None) == promises for record in run.records)
        return [record.finished_at for record in run.records]

    assert ends(promises=True) == ends(promises=False)


def test_a_padded_batch_runs_to_its_longest() -> None:
    requests = [request(0, 4, 3), request(1, 10, 9), request(2, 2, 1)]
    run = simulate(requests, mesh=replace(AT_ONCE, execution=Execution.STATIC), predictor="oracle")
    cost = TINY.cost
    seconds = 3 * 55e-6 + cost.seconds(16) + cost.seconds(14)
    seconds += sum(cost.seconds(3, 3 * (10 + i)) for i in range(1, 9))
    assert [record.finished_at for record in run.records] == pytest.approx([seconds] * 3)
    assert run.engines[0].padding == 3 * (10 + 8) - (4 + 2) - (10 + 8) - 2
    assert run.engines[0].busy == pytest.approx(seconds)


def test_one_slot_is_the_queue_that_theory_knows() -> None:
    """Pollaczek and Khinchine: with equal services the mean wait is rho·s / (2·(1 - rho))."""
    platform = replace(TINY, slots=1, cost=StepCost(0.0, 0.01, 0.001))
    service = platform.cost.isolated(10, 11, 16)
    rng = np.random.default_rng(5)
    for load in (0.5, 0.8):
        at = np.cumsum(rng.exponential(service / load, 20_000))
        requests = [request(i, 10, 11, float(at[i])) for i in range(len(at))]
        run = simulate(requests, platform, predictor="oracle")
        waits = [r.finished_at - r.request.arrival - service for r in run.records]
        expected = load * service / (2 * (1 - load))
        assert np.mean(waits) == pytest.approx(expected, rel=0.08)


def test_asking_at_events_is_asking_before_every_step() -> None:
    """The policy of the worker, asked at each step, decides nothing else."""

    class Restless(FcfsStep):
        """Wants to be asked again at once, which is before the next step."""

        def step(self, engine: EngineView, now: float) -> StepDecision:
            return replace(super().step(engine, now), reconsider_at=now + 1e-9)

    rng = np.random.default_rng(3)
    requests = [
        request(i, int(rng.integers(1, 40)), int(rng.integers(1, 60)), 0.02 * i) for i in range(60)
    ]
    for predictor in ("oracle", "b80", "noise:2"):
        lazy = simulate(requests, predictor=predictor)
        eager = simulate(requests, predictor=predictor, step=Restless())
        assert eager.engines[0].asked > 3 * lazy.engines[0].asked
        for one, other in zip(lazy.records, eager.records, strict=True):
            assert one.finished_at == pytest.approx(other.finished_at)
            assert one.preemptions == other.preemptions


def test_requests_are_refused_without_a_chance_or_without_time_as_their_callers_asked() -> None:
    mesh = replace(AT_ONCE, refusable=True)
    hopeless = replace(request(0, 10, 50), deadline=0.01)
    long = request(1, 10, 60)
    patient = replace(request(2, 10, 5), deadline=0.1, priority=Priority.BATCH)
    one_slot = replace(TINY, slots=1)
    policy = FcfsDispatch(DispatchSettings(lookahead_requests=0))
    run = simulate([hopeless, long, patient], one_slot, mesh, predictor="oracle", dispatch=policy)
    assert [record.outcome for record in run.records] == [
        Outcome.REFUSED,
        Outcome.FINISHED,
        Outcome.REFUSED,
    ]
    assert run.records[2].finished_at == 0
    assert [record.met for record in run.records] == [False, True, False]


def test_what_fits_nowhere_and_what_nobody_sends_are_errors() -> None:
    with pytest.raises(InvalidArgumentError, match="tiny holds 120"):
        simulate([request(0, 100, 21)])

    class Idle:
        name = "idle"

        def dispatch(
            self, queue: QueueView, replicas: list[ReplicaView], now: float
        ) -> DispatchDecision:
            return DispatchDecision()

    with pytest.raises(InvalidArgumentError, match="left 1 of 1 requests"):
        simulate([request(0, 10, 10)], dispatch=Idle())
