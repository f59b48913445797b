"""What the engine's policies reserve, whom they admit, and whom they preempt."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.policies import COST, NOW, admitted, decoding, engine, engines, sequence
from uellm.core.request import Priority, QuantileFunction, ResourceProfile
from uellm.policy.latest_start import facts_of
from uellm.policy.occupancy import held_by, held_tokens
from uellm.policy.peak import peak_room
from uellm.policy.registry import step_policy
from uellm.policy.remaining import remaining_tokens
from uellm.policy.reserving import reserve_tokens
from uellm.policy.running_facts import RunningFacts
from uellm.policy.selection import Fluid, Job, late_ones
from uellm.policy.views import EngineView, StepDecision

CONTINUOUS = ["cslo-odbs", "edf", "fcfs", "past-future", "priority", "sjf"]


COUNT = st.integers(1, 500)


def profile(median: float, high: float) -> ResourceProfile:
    lengths = QuantileFunction((0.5, 0.9), (median, max(median, high)))
    return ResourceProfile(prompt_tokens=1, output_tokens=lengths)


@given(COUNT, COUNT, COUNT, COUNT, COUNT)
def test_a_reservation_holds_the_next_token_and_keeps_to_the_limit(
    median: int, high: int, prompt: int, answered: int, more: int
) -> None:
    known = prompt + answered - 1
    limit = known + more
    reserved = reserve_tokens(
        profile(median, high), prompt_tokens=prompt, known_tokens=known, limit_tokens=limit
    )
    assert known < reserved <= limit
    if known < prompt + max(median, high) <= limit:
        assert reserved == prompt + max(median, high)


def test_an_answer_that_outgrew_its_prediction_reserves_a_little_more_each_time() -> None:
    reserved = reserve_tokens(profile(10, 80), prompt_tokens=7, known_tokens=87, limit_tokens=999)
    assert reserved == 87 + 10


@pytest.mark.parametrize("name", CONTINUOUS)
@settings(max_examples=150, deadline=None)
@given(view=engines())
def test_a_decision_is_one_that_an_engine_can_carry_out(name: str, view: EngineView) -> None:
    decision = step_policy(name).step(view, NOW)
    assert decision == step_policy(name).step(view, NOW)
    running = {s.request_id: s for s in view.running}
    waiting = {s.request_id: s for s in view.waiting}
    admitted, preempted = set(decision.admit), set(decision.preempt)
    assert len(admitted) == len(decision.admit)
    assert admitted <= waiting.keys()
    assert len(preempted) == len(decision.preempt)
    assert preempted <= running.keys()
    assert decision.hand_back == ()
    assert 1 <= decision.chunk_tokens <= view.max_chunk_tokens
    stay = [s for name, s in running.items() if name not in preempted]
    assert len(stay) + len(admitted) <= view.slots
    assert decision.reconsider_at is None or decision.reconsider_at > NOW
    assert set(decision.prefill) <= {*running, *admitted}
    assert len(set(decision.prefill)) == len(decision.prefill)
    for request_id in admitted:
        assert decision.reserve[request_id] >= waiting[request_id].prompt_tokens
    # Whoever stays has room for its next token, and admissions fit beside it.
    together = [*stay, *(waiting[request_id] for request_id in admitted)]
    if len(together) > 1:
        assert held_by(together, view.block_tokens) <= view.kv_tokens_total
    if view.waiting and not view.running:
        assert admitted
    if held_by(running.values(), view.block_tokens) > view.kv_tokens_total:
        assert not admitted
    else:
        assert name == "cslo-odbs" or not preempted


@pytest.mark.parametrize("name", CONTINUOUS)
@settings(max_examples=60, deadline=None)
@given(view=engines(), random=st.randoms())
def test_only_what_is_seen_counts_not_in_which_order(
    name: str, view: EngineView, random: object
) -> None:
    waiting = [replace(s, arrived_at=s.arrived_at + i / 64) for i, s in enumerate(view.waiting)]
    shuffled = list(waiting)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    policy = step_policy(name)
    one = policy.step(replace(view, waiting=waiting), NOW)
    assert one == policy.step(replace(view, waiting=shuffled), NOW)


def carried_out(decision: StepDecision, view: EngineView, now: float, finished: int) -> EngineView:
    """Carry a decision out, and let the first ``finished`` that run end."""
    by_id = {s.request_id: s for s in (*view.running, *view.waiting)}
    gone = {*decision.preempt, *decision.admit}
    running = [s for s in view.running if s.request_id not in gone]
    for request_id in decision.admit:
        found = by_id[request_id]
        running.append(
            replace(
                found,
                computed_tokens=found.prompt_tokens,
                output_tokens=1,
                first_token_at=now,
            )
        )
    back = [
        replace(
            by_id[request_id],
            computed_tokens=0,
            prompt_tokens=by_id[request_id].computed_tokens + 1,
            preemptions=by_id[request_id].preemptions + 1,
        )
        for request_id in decision.preempt
    ]
    waiting = [s for s in view.waiting if s.request_id not in gone]
    running = running[finished:]
    return replace(
        view,
        running=running,
        waiting=[*waiting, *back],
        kv_tokens_free=view.kv_tokens_total - sum(s.computed_tokens for s in running),
    )


@pytest.mark.parametrize("name", ["cslo-odbs", "edf", "fcfs", "priority", "sjf"])
def test_nobody_waits_for_ever_however_many_others_come(name: str) -> None:
    """A long request of no class, without a chance, against a flood of better ones."""
    poor = sequence(
        "poor",
        tokens=400,
        prompt=200,
        deadline_at=NOW + 0.5,
        priority=Priority.BATCH,
        accepted=NOW,
    )
    view = engine([], [poor])
    now = NOW
    for turn in range(200):
        now += 1.0
        fresh = [
            sequence(
                f"{turn}-{i}",
                deadline_at=now + 1,
                tokens=2,
                priority=Priority.INTERACTIVE,
                accepted=now,
            )
            for i in range(5)
        ]
        view = replace(view, waiting=[*view.waiting, *fresh])
        decision = step_policy(name, {"max_wait_seconds": 50}).step(view, now)
        if "poor" in decision.admit:
            assert now - NOW <= 60
            assert now - NOW > 50 or name in {"edf", "fcfs"}
            return
        view = carried_out(decision, view, now, finished=2)
    pytest.fail("it never ran")


@settings(max_examples=150, deadline=None)
@given(st.lists(engines(), min_size=1, max_size=3))
def test_facts_of_what_runs_are_the_same_however_they_are_found(views: list[EngineView]) -> None:
    running = RunningFacts()
    for view in views:
        later = [
            replace(s, computed_tokens=s.computed_tokens + 9, output_tokens=s.output_tokens + 9)
            for s in view.running
        ]
        for sequences in (view.running, later, later[1:], view.waiting):
            assert np.array_equal(running.of(sequences), facts_of(sequences), equal_nan=True)


def test_each_policy_has_its_order() -> None:
    old = sequence("old", accepted=NOW - 9, tokens=50, deadline_at=NOW + 90)
    soon = sequence("soon", tokens=40, deadline_at=NOW + 20)
    short = sequence("short", tokens=5)
    urgent = sequence("urgent", tokens=60, priority=Priority.INTERACTIVE, deadline_at=NOW + 50)
    everyone = (short, soon, urgent, old)
    assert admitted("fcfs", *everyone) == ("old",)
    assert admitted("past-future", *everyone) == ("old",)
    assert admitted("edf", *everyone) == ("soon",)
    assert admitted("sjf", *everyone) == ("short",)
    assert admitted("priority", *everyone) == ("urgent",)
    assert admitted("cslo-odbs", *everyone) == ("soon",)


def test_an_admission_leaves_the_watermark_free() -> None:
    waiting = [sequence(str(i), prompt=99) for i in range(3)]
    # 100 tokens each with the next one: 300 and 5 % of 314 fit, of 313 not.
    assert admitted("fcfs", *waiting, slots=4, kv_tokens_total=316) == ("0", "1", "2")
    assert admitted("fcfs", *waiting, slots=4, kv_tokens_total=315) == ("0", "1")
    decision = step_policy("fcfs").step(engine([], waiting, kv_tokens_total=315), NOW)
    assert decision.reconsider_when == 116
    assert decision.reserve == {"0": 100, "1": 100}


def test_out_of_room_the_last_of_the_order_is_preempted() -> None:
    running = [
        decoding("old", 100, accepted=NOW - 9, priority=Priority.BATCH),
        decoding("young", 100, accepted=NOW - 1),
    ]
    view = engine(running, [], kv_tokens_total=200)
    assert step_policy("fcfs").step(view, NOW).preempt == ("young",)
    assert step_policy("priority").step(view, NOW).preempt == ("old",)


def test_a_cap_in_knees_keeps_batches_small() -> None:
    waiting = [sequence(str(i)) for i in range(200)]
    view = engine([], waiting, slots=256, kv_tokens_total=100_000)
    assert len(step_policy("fcfs").step(view, NOW).admit) == 200
    assert len(step_policy("fcfs", {"knee_factor": "2"}).step(view, NOW).admit) == 90
    assert len(step_policy("cslo-odbs").step(view, NOW).admit) == COST.knee == 45


PAIRS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=8)


@settings(deadline=None)
@given(PAIRS, st.lists(st.integers(0, 7), max_size=4))
def test_what_fits_is_what_a_simulation_finds(
    pairs: list[tuple[int, int]], removed: list[int]
) -> None:
    def peak_of(some: list[tuple[int, int]]) -> float:
        held, left = (np.array(values) for values in zip(*some, strict=True))
        return max(float((held + t)[left >= t].sum()) for t in range(int(left.max()) + 1))

    *others, last = pairs
    room = peak_of(pairs)
    together = peak_room(room, *(([p[i] for p in others]) for i in (0, 1)))
    short, emptied = (peak_room(size, [], []) for size in (room - 1, room - 1))
    for pair in others:
        short, emptied = short.beside(*pair), emptied.beside(*pair)
    assert together.beside(*last).fits
    assert short.beside(*last).fits == (not others)
    for place in removed:
        if others:
            emptied = emptied.without(*others.pop(place % len(others)))
            assert emptied.beside(*last).fits == (not others or peak_of([*others, last]) < room)


def test_past_future_admits_what_ends_before_it_meets() -> None:
    # 151 tokens are held for four steps more; then another may have as many.
    nearly = decoding("nearly", 141, tokens=145, spread=0.0, prompt=10)
    assert remaining_tokens(nearly)[1] == 4
    some = sequence("some", prompt=10, tokens=270, spread=0.0)
    view = engine([nearly], [some], kv_tokens_total=300)
    assert step_policy("past-future").step(view, NOW).admit == ("some",)
    longer = sequence("longer", prompt=10, tokens=280, spread=0.0)
    assert step_policy("past-future").step(replace(view, waiting=[longer]), NOW).admit == ()


@given(st.integers(1, 300), st.integers(0, 400))
def test_what_remains_follows_from_what_was_predicted(median: int, answered: int) -> None:
    view = decoding("s", answered + 1, tokens=float(median), max_output_tokens=1000)
    low, middle, high = remaining_tokens(view)
    assert 1 <= low <= middle <= high
    if answered + 1 < median * 0.5:
        assert middle == pytest.approx(max(median - answered - 1, 1), abs=1e-6)


JOBS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 60)).map(
        lambda d: Job(d[1] - d[0], float(d[0]), 0.0, 0.0, 0.0)
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(JOBS)
def test_on_one_slot_no_selection_has_fewer_late(jobs: list[Job]) -> None:
    """Moore and Hodgson, by brute force over all subsets and orders."""
    jobs = sorted(jobs, key=lambda job: job.latest_start + job.slot_seconds)
    late = late_ones(jobs, Fluid(1, 0, 1, 0.0), 0.0)

    def in_time(chosen: tuple[Job, ...]) -> bool:
        at = 0.0
        for job in chosen:
            if at > job.latest_start:
                return False
            at += job.slot_seconds
        return True

    assert in_time(tuple(job for place, job in enumerate(jobs) if place not in late))
    best = max(
        size
        for size in range(len(jobs) + 1)
        for some in itertools.combinations(jobs, size)
        if any(map(in_time, itertools.permutations(some)))
    )
    assert len(jobs) - len(late) == best


def test_kv_room_and_prefill_make_late_too() -> None:
    job = Job(5.0, 1.0, 1000.0, 0.0, 100.0)
    fluid = Fluid(100, 100.0, 100, 100.0)
    # 100 tokens for 10 s each in a room of 100: one after the other; 10 s is too late.
    assert len(late_ones([job, job], fluid, 0.0)) == 1
    assert late_ones([job, job], replace(fluid, kv_tokens=1000.0, free_kv_tokens=1e3), 0.0) == set()
    slow = job._replace(prefill_seconds=6.0, kv_token_seconds=0.0, kv_tokens=0.0)
    assert len(late_ones([slow, slow], fluid, 0.0)) == 1


def test_blocks_are_counted_whole() -> None:
    assert held_tokens(sequence("s", prompt=15), 16) == 16
    assert held_tokens(sequence("s", prompt=16), 16) == 32
