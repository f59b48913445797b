"""Who is read with care, who is answered from words, and who is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uellm_profiler.pacing import (
    CHUNK_SECONDS,
    MARGIN_SECONDS,
    MOST_AT_ONCE,
    PATIENCE_SECONDS,
    Asked,
    Pace,
    effort_of,
    next_turn,
)

NOW = 100.0

efforts = st.one_of(st.just(0.0), st.floats(8.0, 300.0))
limits = st.one_of(st.just(math.inf), st.floats(0.0, 0.5))
crowds = st.lists(
    st.builds(Asked, limits.map(lambda limit: NOW + limit), efforts, st.floats(NOW - 5, NOW)),
    max_size=80,
)
paces = st.builds(Pace, st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-2))


def all_turns(asked: list[Asked], pace: Pace) -> dict[int, tuple[str, float]]:
    """What becomes of each, and when, if all takes as long as expected."""
    now, left, became = NOW, list(range(len(asked))), dict[int, tuple[str, float]]()
    while left:
        turn = next_turn([asked[i] for i in left], pace, now)
        taken = [*turn.refused, *turn.hurried, *turn.read]
        assert taken
        assert len(set(taken)) == len(taken)
        became |= {left[i]: ("refused", now) for i in turn.refused}
        now += pace.answering(len(turn.hurried))
        became |= {left[i]: ("hurried", now) for i in turn.hurried}
        if turn.read:
            now += pace.reading(sum(asked[left[i]].effort for i in turn.read))
            became |= {left[i]: ("read", now) for i in turn.read}
        left = [each for i, each in enumerate(left) if i not in {*taken}]
    return became


@given(crowds, paces)
def test_all_are_answered_before_their_deadline_or_refused(asked: list[Asked], pace: Pace) -> None:
    became = all_turns(asked, pace)
    assert became.keys() == set(range(len(asked)))
    for i, (what, when) in became.items():
        if what == "refused":
            assert when + pace.answering(1) > asked[i].deadline - MARGIN_SECONDS - len(asked) * (
                pace.words
            )
        else:
            assert when <= asked[i].deadline - MARGIN_SECONDS + 1e-9


@given(st.lists(efforts, max_size=80), paces)
def test_who_has_all_the_time_is_read(wanted: list[float], pace: Pace) -> None:
    became = all_turns([Asked(math.inf, effort) for effort in wanted], pace)
    for i, effort in enumerate(wanted):
        assert became[i][0] == ("read" if effort else "hurried")


@given(crowds, paces)
def test_a_turn_is_bounded(asked: list[Asked], pace: Pace) -> None:
    turn = next_turn(asked, pace, NOW)
    assert len(turn.hurried) <= MOST_AT_ONCE
    effort = sum(asked[i].effort for i in turn.read)
    assert len(turn.read) <= 1 or pace.reading(effort) <= CHUNK_SECONDS


def test_of_a_burst_as_many_are_read_as_fit() -> None:
    pace = Pace(care=1e-4, words=2e-4)
    became = all_turns([Asked(NOW + 0.1, 28.0)] * 200, pace)
    read = [i for i, (what, _) in became.items() if what == "read"]
    # 200 from words would take 40 ms; 50 remain, and 2.8 ms are one prompt.
    assert 10 <= len(read) <= 18
    # The first that came, so that calls that came later have their answers early.
    assert read == list(range(len(read)))
    assert all(what == "hurried" for what, _ in list(became.values())[: 200 - len(read)])


def test_the_earliest_deadline_is_read_first() -> None:
    pace = Pace(care=1e-4, words=2e-4)
    crowd = [Asked(NOW + 0.2 - 0.001 * i, 28.0) for i in range(40)]
    assert next_turn(crowd, pace, NOW).read[0] == 39


@pytest.mark.parametrize("effort", [0.0, 28.0])
@pytest.mark.parametrize("crowding", [0.0, 28.0])
def test_who_has_no_deadline_is_answered_however_many_come_that_have_one(
    effort: float, crowding: float
) -> None:
    pace, now = Pace(), NOW
    patient = [Asked(math.inf, effort, NOW), Asked(math.inf, effort, NOW)]
    answered = 0
    while answered < len(patient):
        assert now < NOW + 2 * PATIENCE_SECONDS
        # More come with each turn than one can deal with.
        crowd = [Asked(now + 0.1, crowding, now)] * 400
        turn = next_turn([*patient[answered:], *crowd], pace, now)
        gone = {*turn.hurried, *turn.read}
        assert now > NOW + PATIENCE_SECONDS or 0 not in gone
        answered += 0 in gone
        now += pace.answering(len(turn.hurried)) + 0.02


def test_the_pace_follows_what_is_seen_and_rises_faster_than_it_falls() -> None:
    slower, faster = Pace(), Pace()
    slower.was_reading(100, 2 * slower.reading(100))
    faster.was_reading(100, faster.reading(100) / 2)
    assert slower.care / Pace().care - 1 > 2 * (1 - faster.care / Pace().care)


def test_who_seems_too_slow_to_read_anything_tries_in_the_end() -> None:
    stuck, asked = Pace(care=1.0), [Asked(NOW + 0.1, 28.0)]
    for _ in range(100):
        turn = next_turn(asked, stuck, NOW)
        if turn.read:
            break
        assert turn.hopeless
        stuck.doubted()
    assert turn.read == [0]
    # That there is no time beside all the others says nothing of how fast one is.
    assert not next_turn([Asked(NOW + 0.03, 28.0)] * 100, Pace(), NOW).hopeless


def test_who_comes_too_late_for_any_pace_does_not_make_it_doubted() -> None:
    late, short = Asked(NOW + MARGIN_SECONDS, 50.0), Asked(NOW + MARGIN_SECONDS + 0.002, 50.0)
    assert not next_turn([late], Pace(), NOW).hopeless
    assert next_turn([late, short], Pace(), NOW).hopeless


def test_blank_prompts_are_not_read_and_long_ones_in_part() -> None:
    assert effort_of("") == effort_of(" \n") == 0.0
    assert 0 < effort_of("a") < effort_of("a" * 400) < effort_of("a" * 200_000)
    assert effort_of("a" * 200_000) == effort_of("\ud800" * 200_000) == effort_of("x" * 4000)
