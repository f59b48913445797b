"""What a replica reports of the steps of its stages that only decode."""

from dataclasses import replace

import pytest
from uellm_worker.engine.plan import StepPlan, StepResult

from tests.support.engine_loop import STAGE, Timed, add, timed_loop
from uellm.v1.queue_pb2 import ReplicaReport


class Staged(Timed):
    """Says what each of its stages took."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self._plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._plans.append(plan)

    def collect(self, *, patient: bool = True) -> StepResult | None:
        result, plan = super().collect(patient=patient), self._plans.pop(0)
        assert result is not None
        chunks = [chunk for chunk in plan.chunks if chunk.count == 1 and chunk.start]
        # A prompt takes many times what a step that decodes does.
        took = STAGE.seconds(plan.rows, sum(chunk.start + 1 for chunk in chunks))
        return replace(result, seconds=(took,) * self.depth)


def reported(depth: int, sequences: int, answer: int = 60) -> ReplicaReport:
    """The last report in which all of them decode."""
    runner = Staged(depth)
    loop = timed_loop(runner, slots=8)
    for index in range(sequences):
        loop.add(add(f"s{index}", prompt=400, max_tokens=answer))
    found: ReplicaReport | None = None
    while loop.busy:
        report = loop.step()
        assert report is not None
        if not report.report.prefill_tokens and report.report.running == sequences:
            found = report.report
    assert found is not None
    return found


@pytest.mark.parametrize(("depth", "sequences"), [(1, 1), (1, 6), (3, 1), (3, 6)])
def test_prompts_are_no_part_of_what_steps_that_decode_take(depth: int, sequences: int) -> None:
    report = reported(depth, sequences)
    batch, context = report.decode_step_sequences, report.decode_step_context_tokens
    assert batch == pytest.approx(sequences / min(depth, sequences), rel=0.15)
    expected = STAGE.seconds(batch, context)
    assert [stage.decode_seconds for stage in report.stages] == [
        pytest.approx(expected, rel=0.02)
    ] * depth
    assert report.stages[0].compute_seconds > expected


@pytest.mark.parametrize(("depth", "sequences", "steps"), [(1, 6, 1), (3, 1, 1), (3, 6, 3)])
def test_it_is_known_how_many_steps_were_under_way(depth: int, sequences: int, steps: int) -> None:
    found = reported(depth, sequences).decode_steps_in_flight
    assert found == pytest.approx(steps, rel=0.15)


def test_prompts_alone_are_told_apart_with_what_they_were() -> None:
    report = reported(depth=3, sequences=3)
    tokens, pairs = report.prefill_step_tokens, report.prefill_step_pairs
    # Three prompts, one after the other, in parts of an equal size.
    assert 0 < tokens <= 400
    assert pairs >= tokens * (tokens + 1) / 2 * 0.99
    expected = STAGE.seconds(tokens)
    assert [stage.prefill_seconds for stage in report.stages] == [
        pytest.approx(expected, rel=0.05)
    ] * 3


def test_before_the_first_step_that_decodes_nothing_is_said() -> None:
    runner = Staged(1)
    loop = timed_loop(runner)
    loop.add(add("s", prompt=400, max_tokens=3))
    report = loop.step()
    assert report is not None
    assert report.report.prefill_tokens
    assert report.report.decode_step_sequences == 0
    assert report.report.stages[0].decode_seconds == 0
