"""What the engine loop learns of its steps' cost, in time that the runner counts."""

import pytest
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.loop import EngineLoop

from tests.support.engine_loop import (
    GUESS,
    STAGE,
    VOCAB,
    FunctionPolicy,
    Timed,
    add,
    timed_loop,
)
from uellm.convert import cost_from_proto
from uellm.policy.views import EngineView, StepDecision
from uellm.v1.engine_pb2 import StepReport


def serve(loop: EngineLoop, runner: Timed, rounds: int = 300) -> dict[str, list[float]]:
    """Requests that come and go; when each had its tokens."""
    times: dict[str, list[float]] = {}
    number = 0
    for _ in range(rounds):
        while len([name for name in times if name.startswith("+")]) < 1 + number % 40:
            number += 1
            name = f"+{number}"
            times[name] = []
            loop.add(add(name, prompt=5 + 37 * number % 400, max_tokens=8 + number % 60))
        report = loop.step()
        assert report is not None
        note(report, times, runner.seconds)
    return times


def note(report: StepReport, times: dict[str, list[float]], now: float) -> None:
    for output in report.outputs:
        times[output.request_id].append(now)
        if output.finish:
            times[output.request_id.replace("+", "-")] = times.pop(output.request_id)


def test_before_the_first_step_the_estimate_stands() -> None:
    costs = []

    def admit(view: EngineView) -> StepDecision:
        costs.append(view.cost)
        names = tuple(s.request_id for s in view.waiting)
        return StepDecision(admit=names, chunk_tokens=9, reconsider_at=0.0)

    runner = Timed()
    loop = EngineLoop(
        runner,
        FunctionPolicy(admit),
        Capacity(4, 64, 256),
        Vocabulary(VOCAB),
        timer=lambda: runner.seconds,
        cost=GUESS,
    )
    loop.add(add("a"))
    first, second = loop.step(), loop.step()
    assert costs[0] == GUESS
    assert costs[1] is not None
    assert costs[1] != GUESS
    assert first is not None
    assert second is not None
    assert (first.report.cost.observations, second.report.cost.observations) == (1, 2)
    assert second.report.cost.mean_error > 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_reported_cost_is_the_time_from_token_to_token(depth: int) -> None:
    """However many steps are under way together."""
    runner = Timed(depth)
    loop = timed_loop(runner)
    serve(loop, runner)
    # A steady load now: so many decode, and nobody comes or goes.
    while loop.busy:
        loop.step()
    times: dict[str, list[float]] = {}
    for i in range(24):
        times[f"+{i}"] = []
        loop.add(add(f"+{i}", prompt=50, max_tokens=400))
    report = StepReport()
    while min(map(len, times.values())) < 200:
        found = loop.step()
        assert found is not None
        report = found
        note(report, times, runner.seconds)
    predicted = cost_from_proto(report.report.cost).seconds(24, 24 * (50 + 200))
    for at in times.values():
        assert predicted == pytest.approx((at[199] - at[149]) / 50, rel=0.1)
    assert report.report.cost.mean_error < 0.1


def test_the_time_between_two_busy_spells_is_nobodys() -> None:
    runner = Timed()
    loop = timed_loop(runner)
    for number in range(40):
        loop.add(add(str(number), prompt=10, max_tokens=4))
        while loop.busy:
            loop.step()
        runner.seconds += 100.0
    loop.add(add("last"))
    report = loop.step()
    assert report is not None
    cost = report.report.cost
    assert cost.overhead_seconds + cost.weights_seconds == pytest.approx(STAGE.unloaded, rel=0.1)


def test_what_is_done_between_two_steps_counts() -> None:
    """It, too, keeps the answers waiting."""
    runner = Timed()
    loop = timed_loop(runner)
    loop.add(add("a", prompt=1, max_tokens=300))
    for _ in range(200):
        loop.step()
        runner.seconds += 0.006
    report = loop.step()
    assert report is not None
    cost = cost_from_proto(report.report.cost)
    assert cost.seconds(1, 200) == pytest.approx(STAGE.unloaded + 0.006, rel=0.05)
