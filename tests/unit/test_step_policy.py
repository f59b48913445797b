"""What the engine's policy reserves, and whom it admits."""

from hypothesis import given
from hypothesis import strategies as st

from uellm.core.request import QuantileFunction, ResourceProfile, Slo
from uellm.policy.fcfs import FcfsStep
from uellm.policy.reserving import reserve_tokens
from uellm.policy.views import EngineView, SequenceView

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


def waiting(number: int, need: int) -> SequenceView:
    return SequenceView(
        request_id=str(number),
        slo=Slo(0.0),
        profile=profile(1, 1),
        prompt_tokens=1,
        computed_tokens=0,
        output_tokens=0,
        max_output_tokens=9,
        reserve_tokens=need,
        rank=0,
        arrived_at=float(number),
    )


@given(st.lists(COUNT, max_size=8), st.integers(0, 1500), st.integers(0, 3))
def test_first_come_first_served_admits_what_can_be_reserved(
    needs: list[int], free: int, running: int
) -> None:
    view = EngineView(
        running=[waiting(100 + i, 5) for i in range(running)],
        waiting=[waiting(i, need) for i, need in enumerate(needs)],
        slots=5,
        kv_tokens_free=free,
        kv_tokens_total=2000,
        max_chunk_tokens=64,
    )
    decision = FcfsStep().step(view, 0.0)
    admitted = len(decision.admit)
    assert decision.admit == tuple(str(i) for i in range(admitted))
    assert admitted <= 5 - running
    # Alone, the first is admitted whatever it needs: nothing would ever change otherwise.
    assert sum(needs[:admitted]) <= free or (admitted == 1 and not running)
    if admitted < min(len(needs), 5 - running):
        assert sum(needs[: admitted + 1]) > free
        assert decision.reconsider_when == needs[admitted]
    else:
        assert decision.reconsider_when is None
