"""Continuous SLO-ODBS in the engine: whom it admits, preempts, and computes first."""

from dataclasses import replace

from tests.support.policies import COST, NOW, admitted, decoding, engine, sequence
from uellm.policy.occupancy import held_tokens
from uellm.policy.registry import step_policy


def test_who_cannot_be_in_time_yields_to_who_can() -> None:
    lost = sequence("lost", deadline_at=NOW + 0.1, tokens=200)
    late = sequence("late", ttft_at=NOW - 1)
    able = sequence("able", deadline_at=NOW + 50, tokens=200)
    assert admitted("cslo-odbs", lost, late, able) == ("able",)
    assert admitted("cslo-odbs", lost, late, able, slots=3)[0] == "able"
    # The test is optimistic: a short answer could be in time.
    maybe = sequence("maybe", deadline_at=NOW + 2.5, tokens=200, spread=0.9)
    assert admitted("cslo-odbs", maybe, able) == ("maybe",)


def test_an_urgent_one_takes_the_slot_of_one_that_has_time() -> None:
    rich = decoding("rich", 5, tokens=100, deadline_at=NOW + 100)
    busy = decoding("busy", 5, tokens=100, deadline_at=NOW + 4)
    urgent = sequence("urgent", ttft_at=NOW + 0.2, tokens=100)
    view = engine([rich, busy], [urgent], slots=2)
    decision = step_policy("cslo-odbs").step(view, NOW)
    assert (decision.admit, decision.preempt) == (("urgent",), ("rich",))
    calm = sequence("calm", ttft_at=NOW + 50, tokens=100)
    assert step_policy("cslo-odbs").step(replace(view, waiting=[calm]), NOW).preempt == ()
    # Nobody is preempted for ever, nor where computing anew costs more than it gains.
    again = replace(rich, preemptions=3)
    assert step_policy("cslo-odbs").step(replace(view, running=[again, busy]), NOW).preempt == ()
    never = step_policy("cslo-odbs", {"most_preemptions": 0})
    assert never.step(view, NOW).preempt == ()
    dear = replace(view, cost=replace(COST, per_token=0.05))
    assert step_policy("cslo-odbs", {"knee_factor": 0}).step(dear, NOW).preempt == ()


def test_the_urgent_go_beyond_the_knee_before_anybody_is_preempted_for_them() -> None:
    rich = [decoding(f"rich-{i}", 5, tokens=100, deadline_at=NOW + 100) for i in range(45)]
    urgent = sequence("urgent", ttft_at=NOW + 0.2, tokens=400)
    calm = sequence("calm", ttft_at=NOW + 50, tokens=100)
    view = engine(rich, [urgent, calm], slots=64, kv_tokens_total=100_000)
    decision = step_policy("cslo-odbs").step(view, NOW)
    assert (decision.admit, decision.preempt) == (("urgent",), ())
    knee = step_policy("cslo-odbs", {"urgent_knee_factor": 1})
    assert len(knee.step(view, NOW).preempt) == 1
    # Nor are there slots beyond those of the engine.
    assert len(step_policy("cslo-odbs").step(replace(view, slots=45), NOW).preempt) == 1


def test_nobody_goes_beyond_the_knee_where_those_that_decode_would_be_late() -> None:
    # A step of 46 tokens takes 20.4 ms; one of those that run has 20.3 ms for each of its tokens.
    tight = [decoding(f"r{i}", 5, tokens=100, deadline_at=NOW + 95 * 0.0203) for i in range(9)]
    rich = [decoding(f"rich-{i}", 5, tokens=100, deadline_at=NOW + 100) for i in range(36)]
    urgent = sequence("urgent", ttft_at=NOW + 0.2, tokens=40)
    view = engine(tight + rich, [urgent], slots=64, kv_tokens_total=100_000)
    policy = step_policy("cslo-odbs", {"most_preemptions": 0})
    assert policy.step(view, NOW).admit == ()
    # One in ten that could not keep up does not keep all others from going on.
    alone = replace(view, running=[*tight[:4], *rich, *rich[:5]])
    assert policy.step(alone, NOW).admit == ("urgent",)


def test_who_is_lost_stays_where_computing_anew_takes_time_from_all() -> None:
    lost = decoding("lost", 50, tokens=100, prompt=400, deadline_at=NOW - 1)
    urgent = sequence("urgent", ttft_at=NOW + 1, tokens=50)
    view = engine([lost], [urgent], slots=1)
    policy = step_policy("cslo-odbs")
    assert policy.step(view, NOW).preempt == ("lost",)
    # A knee of 1: each token takes as long as the weights do.
    dear = replace(COST, per_token=COST.weights)
    assert policy.step(replace(view, cost=dear), NOW).preempt == ()


def test_of_those_that_run_few_have_waited_too_long() -> None:
    elders = [decoding(f"elder-{i}", 5, deadline_at=NOW - 9, accepted=NOW - 700) for i in range(2)]
    others = [decoding(f"other-{i}", 5, tokens=100, deadline_at=NOW + 60) for i in range(15)]
    elder = sequence("elder", deadline_at=NOW - 9, accepted=NOW - 650)
    fresh = sequence("fresh", ttft_at=NOW + 50)
    for running, first in ((others + elders[:1], "elder"), (others + elders, "fresh")):
        view = engine(running, [elder, fresh], slots=64, kv_tokens_total=10_000)
        assert step_policy("cslo-odbs", {"elder_every": 8}).step(view, NOW).admit[0] == first


def test_the_urgent_are_lent_room_that_others_will_need_if_somebody_can_give_it_back() -> None:
    rich = [decoding(f"rich-{i}", 100, tokens=300, deadline_at=NOW + 100) for i in range(4)]
    urgent = sequence("urgent", ttft_at=NOW + 0.2, tokens=100)
    # 404 tokens are held; all answers together come to far more than there is.
    view = engine(rich, [urgent], slots=64, kv_tokens_total=700)
    lent = step_policy("cslo-odbs").step(view, NOW)
    assert (lent.admit, lent.preempt) == (("urgent",), ())
    never = step_policy("cslo-odbs", {"lent_steps": 1000}).step(view, NOW)
    assert never.admit == ("urgent",)
    assert never.preempt
    # Whoever is short of time itself gives nothing back, and is not taken its room.
    tight = [decoding(f"tight-{i}", 100, tokens=300, deadline_at=NOW + 5) for i in range(4)]
    refused = step_policy("cslo-odbs").step(replace(view, running=tight), NOW)
    assert (refused.admit, refused.preempt) == ((), ())


def test_nobody_more_is_preempted_than_gives_the_urgent_room_now() -> None:
    rich = [decoding(f"rich-{i}", 100, tokens=300, deadline_at=NOW + 100 + i) for i in range(6)]
    urgent = sequence("urgent", ttft_at=NOW + 0.2, tokens=100)
    # None of the room is free, and the predicted peak is far more, whoever of them goes.
    view = engine(rich, [urgent], slots=64, kv_tokens_total=sum(map(held_tokens, rich)) + 9)
    decision = step_policy("cslo-odbs").step(view, NOW)
    assert (decision.admit, decision.preempt) == (("urgent",), ("rich-5",))
    # The last that has time is not taken its slot for it: nobody would give anything back.
    tight = [decoding(f"tight-{i}", 100, tokens=300, deadline_at=NOW + 5) for i in range(5)]
    refused = step_policy("cslo-odbs").step(replace(view, running=[*tight, rich[0]]), NOW)
    assert (refused.admit, refused.preempt) == ((), ())


def test_where_many_are_lost_the_short_come_first() -> None:
    long = sequence("long", tokens=400, deadline_at=NOW + 40)
    short = sequence("short", tokens=10, deadline_at=NOW + 42)
    lost = [sequence(f"lost-{i}", deadline_at=NOW - 1) for i in range(8)]
    calm = engine([], [long, short], slots=1)
    assert step_policy("cslo-odbs").step(calm, NOW).admit == ("long",)
    flooded = replace(calm, waiting=[*lost, long, short])
    assert step_policy("cslo-odbs").step(flooded, NOW).admit == ("short",)


def test_one_that_is_lost_gives_way_first_and_out_of_room_too() -> None:
    lost = decoding("lost", 50, tokens=100, deadline_at=NOW - 1)
    rich = decoding("rich", 50, tokens=100, deadline_at=NOW + 500)
    urgent = sequence("urgent", ttft_at=NOW + 0.2, tokens=50)
    view = engine([rich, lost], [urgent], slots=2)
    assert step_policy("cslo-odbs").step(view, NOW).preempt == ("lost",)
    assert step_policy("cslo-odbs").step(replace(view, kv_tokens_total=100), NOW).preempt == (
        "lost",
    )
    tight = decoding("tight", 50, tokens=100, deadline_at=NOW + 5)
    full = engine([rich, tight], [], kv_tokens_total=100)
    assert step_policy("cslo-odbs").step(full, NOW).preempt == ("rich",)


def test_prefill_is_paced_by_those_that_decode() -> None:
    waiting = [sequence("long", prompt=200)]
    free = engine([], waiting)
    assert step_policy("cslo-odbs").step(free, NOW).chunk_tokens == 256
    first = NOW - 1
    reader = decoding("reader", 30, tokens=100, tpot=0.04, first_token_at=first)
    view = engine([reader], waiting)
    # 31 tokens at 40 ms are due 0.24 s from now: a step may take as long.
    assert step_policy("cslo-odbs").step(view, NOW).chunk_tokens == 256
    behind = replace(reader, first_token_at=NOW - 1.24)
    # 40 ms a step: 38 ms of arithmetic are 95 tokens, one of which decodes.
    chunk = step_policy("cslo-odbs").step(replace(view, running=[behind]), NOW).chunk_tokens
    assert chunk == 93  # and 28 us for the context
    late = decoding("late", 30, tokens=100, deadline_at=NOW + 1.3)
    # 19 ms a step are less than a full one takes: what the weights' streaming hides is left.
    chunk = step_policy("cslo-odbs").step(replace(view, running=[late]), NOW).chunk_tokens
    assert chunk == COST.knee - 1


def test_prompts_are_computed_in_the_order_in_which_first_tokens_are_needed() -> None:
    long = sequence("long", prompt=200, computed_tokens=20, tokens=100, deadline_at=NOW + 60)
    soon = sequence("soon", ttft_at=NOW + 0.5)
    lost = sequence("lost", ttft_at=NOW - 1)
    # It is due first, but for its short answer there is time.
    brief = sequence("brief", deadline_at=NOW + 59, tokens=4)
    view = engine([lost, long, soon, decoding("busy")], [])
    policy = step_policy("cslo-odbs")
    assert policy.step(view, NOW).prefill == ("soon", "long", "lost")
    joined = policy.step(replace(view, waiting=[brief], slots=8), NOW)
    assert joined.admit == ("brief",)
    assert joined.prefill == ("soon", "long", "brief", "lost")


def test_prefill_keeps_up_with_the_answers_that_end() -> None:
    # Forty prompts of 200 tokens for answers of 20: 400 prompt tokens a step take their places.
    late = [decoding(f"r{i}", 10, prompt=200, tokens=20, deadline_at=NOW + 2) for i in range(40)]
    view = engine(late, [sequence("w")], slots=64, kv_tokens_total=99_999, max_chunk_tokens=2048)
    assert step_policy("cslo-odbs").step(view, NOW).chunk_tokens == 800
    alone = step_policy("cslo-odbs", {"keep_up": 0}).step(view, NOW)
    assert alone.chunk_tokens < 500  # 200 ms a step


def test_selection_keeps_as_many_in_time_as_possible() -> None:
    # One slot: the long one takes 4 s and makes the two short ones late, which take .4 s each.
    long = sequence("long", tokens=200, spread=0.0, deadline_at=NOW + 4.2)
    short = [
        sequence(f"s{i}", tokens=20, spread=0.0, deadline_at=NOW + 4.3 + i / 10) for i in range(2)
    ]
    view = engine([], [long, *short], slots=1)
    assert step_policy("cslo-odbs").step(view, NOW).admit == ("long",)
    assert step_policy("cslo-odbs", {"scanned": 256}).step(view, NOW).admit == ("s0",)


def test_tenants_take_turns_by_tokens() -> None:
    flood = [
        sequence(f"a{i}", tenant="a", deadline_at=NOW + 50 + i / 100, accepted=NOW - 3)
        for i in range(6)
    ]
    few = [sequence(f"b{i}", tenant="b", deadline_at=NOW + 51 + i / 100) for i in range(2)]
    assert admitted("cslo-odbs", *flood, *few, slots=4) == ("a0", "b0", "a1", "b1")
    # What runs counts.
    view = engine([decoding("a9", 50, tenant="a")], [*flood, *few], slots=3)
    assert step_policy("cslo-odbs").step(view, NOW).admit == ("b0", "b1")
    # Someone who has to start much sooner does not take turns.
    soon = sequence("soon", tenant="a", deadline_at=NOW + 5)
    assert admitted("cslo-odbs", *flood, *few, soon, slots=1) == ("soon",)
