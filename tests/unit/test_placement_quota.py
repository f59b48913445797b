"""What steps take under a quota on processors, against a processor that is played."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.clusters import small_model
from uellm.placement.costs import costs_of
from uellm.placement.prediction import Layout, planned
from uellm.placement.quota import step_seconds, sustained_seconds
from uellm.placement.topology import Device, Link, Topology
from uellm.placement.views import LayerTimes, PlanRequest, Workload

PERIOD = 0.01


def played(free: float, share: float, steps: int = 4000) -> float:
    """Mean seconds of a step that begins at any time of a period, nothing of which is used."""
    rng = random.Random(0)  # noqa: S311 - repeatable
    total = 0.0
    for _ in range(steps):
        at, left, granted = rng.random() * PERIOD, free, share * PERIOD
        while True:
            run = min(left, granted, PERIOD - at)
            left, granted, at, total = left - run, granted - run, at + run, total + run
            if left <= 1e-12:
                break
            total += PERIOD - at
            at, granted = 0.0, share * PERIOD
    return total / steps


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("free", [0.0004, 0.002, 0.003, 0.006, 0.02, 0.1])
def test_a_step_now_and_then_takes_what_a_played_processor_says(free: float, share: float) -> None:
    found = step_seconds(free / share, share, PERIOD)
    assert found == pytest.approx(played(free, share), rel=0.02)


def ticked(free: float, share: float, every: float, steps: int = 400) -> float:
    """Mean seconds of steps that begin every so often, on a processor that is played in ticks."""
    tick = PERIOD / 500
    rng = random.Random(0)  # noqa: S311 - repeatable
    now, granted, period, total = 0.0, share * PERIOD, 0, 0.0
    due = rng.random() * PERIOD
    for _ in range(steps):
        begun = max(now, due)
        now, left = begun, free
        while left > tick / 2:
            if now // PERIOD > period:
                granted, period = share * PERIOD, now // PERIOD
            if granted >= tick:
                granted, left = granted - tick, left - tick
            now += tick
        total += now - begun
        # Others take now a little more, now a little less.
        due += every * rng.uniform(0.8, 1.2)
    return total / steps


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("free", [0.0009, 0.002, 0.004, 0.015])
@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_steps_that_follow_each_other_take_what_a_played_processor_says(
    share: float, free: float, busy: float
) -> None:
    sustained = free / share
    found = step_seconds(sustained, share, PERIOD, busy)
    assert found == pytest.approx(ticked(free, share, sustained / busy), rel=0.25)


@settings(max_examples=200, deadline=None)
@given(sustained=st.floats(1e-5, 10.0), share=st.floats(0.01, 1.0), busy=st.floats(0.0, 1.0))
def test_it_is_between_free_and_always_held_back(
    sustained: float, share: float, busy: float
) -> None:
    found = step_seconds(sustained, share, PERIOD, busy)
    assert sustained * share * (1 - 1e-9) <= found <= sustained * (1 + 1e-9)
    assert step_seconds(sustained, share, PERIOD, 1.0) == pytest.approx(sustained)
    assert step_seconds(sustained, 1.0, PERIOD, busy) == sustained


@settings(max_examples=100, deadline=None)
@given(sustained=st.floats(1e-4, 1.0), share=st.floats(0.05, 1.0), busy=st.floats(0.0, 1.0))
def test_what_took_so_long_would_take_so_long_again(
    sustained: float, share: float, busy: float
) -> None:
    took = step_seconds(sustained, share, PERIOD, busy)
    found = sustained_seconds(took, share, PERIOD, busy)
    assert took * (1 - 1e-9) <= found <= took / share * (1 + 1e-9)
    again = step_seconds(found, share, PERIOD, busy)
    # Where a step just lasts its quota, a little more takes much longer.
    assert again <= took * (1 + 1e-6)
    assert step_seconds(found * 1.02 + 1e-5, share, PERIOD, busy) >= took * 0.97


def test_a_stage_that_waits_for_others_is_not_held_back_and_a_busy_one_is() -> None:
    devices = tuple(Device(f"w{n}/cpu:0", f"w{n}", f"h{n}", "cpu", 1 << 34) for n in range(2))
    held = LayerTimes(
        ((16.0, 0.004),), ((1.0, 0.004),), ends=((1.0, 1e-6),), share=0.25, period=PERIOD
    )
    free = replace(held, share=1.0, period=0.0)
    request = PlanRequest(
        Topology(devices),
        small_model(layers=8),
        Workload(batch=1, prompt_tokens=16, output_tokens=100),
        layer_times={devices[0].id: held, devices[1].id: free},
    )
    one, other = planned(costs_of(request), Layout((0, 1), (1, 7))).stages
    assert one.decode_seconds == pytest.approx(0.001, rel=0.1)
    assert other.decode_seconds == pytest.approx(7 * 0.004, rel=0.01)
    # With more under way it is the one that the others wait for.
    full = replace(request, workload=replace(request.workload, in_flight=2))
    replica = planned(costs_of(full), Layout((0, 1), (7, 1)))
    assert replica.stages[0].decode_seconds == pytest.approx(7 * 0.004, rel=0.05)
    assert replica.prediction is not None
    assert replica.prediction.bottleneck_seconds == pytest.approx(100 * 7 * 0.004, rel=0.05)


def test_what_a_leader_does_besides_takes_of_the_same_quota() -> None:
    devices = tuple(Device(f"w{n}/cpu:0", f"w{n}", f"h{n}", "cpu", 1 << 34) for n in range(2))
    held = LayerTimes(
        ((16.0, 0.004),), ((1.0, 0.004),), ends=((1.0, 1e-6),), share=0.25, period=PERIOD
    )
    request = PlanRequest(
        Topology(devices),
        small_model(layers=8),
        Workload(batch=1, prompt_tokens=16, output_tokens=100),
    )
    found = []
    for leader in (0.0, 0.004):
        times = {device.id: replace(held, leader=leader) for device in devices}
        times[devices[1].id] = replace(held, share=1.0, period=0.0)
        measured = replace(request, layer_times=times)
        found.append(planned(costs_of(measured), Layout((0, 1), (2, 6))).stages[0].decode_seconds)
    assert found[0] == pytest.approx(0.002, rel=0.3)
    assert found[1] > 2 * found[0]


def test_what_else_a_host_does_for_a_step_makes_steps_follow_later_and_none_longer() -> None:
    """Where no quota holds it back: nobody waits for an agent, but the next step does."""
    devices = tuple(Device(f"w{n}/cpu:0", f"w{n}", f"h{n}", "cpu", 1 << 34) for n in range(2))
    ways = ((0, 1), (1, 0))
    found = []
    for agent, passing in ((0.0, 0.0), (0.003, 0.001)):
        times = LayerTimes(((16.0, 0.004),), ((1.0, 0.004),), ends=((1.0, 1e-6),), agent=agent)
        links = tuple(
            Link(devices[a].id, devices[b].id, 1e-4, 1e9, "probe", 1.0, passing_seconds=passing)
            for a, b in ways
        )
        request = PlanRequest(
            Topology(devices, links),
            small_model(layers=8),
            Workload(batch=1, prompt_tokens=16, output_tokens=100, in_flight=2),
            layer_times=dict.fromkeys((device.id for device in devices), times),
        )
        found.append(planned(costs_of(request), Layout((0, 1), (4, 4))).prediction)
    without, with_others = found
    assert without is not None
    assert with_others is not None
    assert with_others.total_seconds == pytest.approx(without.total_seconds)
    longer = with_others.bottleneck_seconds - without.bottleneck_seconds
    assert longer == pytest.approx(100 * (0.003 + 0.001), rel=0.05)
    assert with_others.tokens_per_second < 0.9 * without.tokens_per_second


def test_other_work_leaves_less_of_a_quota_to_steps_and_delays_rare_ones_little() -> None:
    """A leader's agent has done its work long before a lone request's next step begins."""
    free, share = 0.002, 0.25
    alone = step_seconds(free / share, share, PERIOD, 0.2)
    beside = step_seconds(free / share, share, PERIOD, 0.2, 0.15)
    assert alone == pytest.approx(free, rel=0.02)
    assert beside == pytest.approx(free, rel=0.3)
    assert step_seconds(free / share, share, PERIOD, 0.6, 0.3) > 1.2 * beside
    assert step_seconds(free / share, share, PERIOD, 0.7, 0.3) == pytest.approx(free / share)
