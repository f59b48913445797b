"""What is to be looked at comes at its time, in order, and what nobody wants takes no room."""

from hypothesis import given
from hypothesis import strategies as st

from uellm.policy.agenda import SPARE, Agenda

DAY = 86_400.0
TIMES = st.lists(st.integers(0, 20).map(float), max_size=60)


@given(TIMES, TIMES)
def test_items_come_when_it_is_time_the_earliest_first(
    times: list[float], asked: list[float]
) -> None:
    agenda: Agenda[int] = Agenda()
    for number, at in enumerate(times):
        agenda.add(at, number)
    left = sorted(enumerate(times), key=lambda each: each[1])
    for now in sorted(asked):
        came = [number for number, at in left if at <= now]
        assert list(agenda.due(now)) == came
        left = left[len(came) :]
        assert len(agenda) == len(left)


@given(TIMES, st.integers(0, 60))
def test_the_earliest_are_kept(times: list[float], most: int) -> None:
    agenda: Agenda[int] = Agenda()
    for number, at in enumerate(times):
        agenda.add(at, number)
    agenda.keep_first(most)
    earliest = sorted(range(len(times)), key=lambda number: times[number])
    assert list(agenda.due(20.0)) == earliest[:most]


def test_what_nobody_wants_is_dropped_before_it_is_many() -> None:
    agenda: Agenda[int] = Agenda()
    wanted = set(range(5000))
    for number in range(20_000):
        agenda.add(DAY - number, number)
        agenda.tidy(wanted.__contains__)
        assert len(agenda) <= 2 * len(wanted) + SPARE + 1
    assert wanted <= set(agenda.due(DAY))
