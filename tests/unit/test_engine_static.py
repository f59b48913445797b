"""Static execution: every step has the shape of the batch, and the answers are the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.instant import InstantRunner
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.plan import StepPlan
from uellm_worker.engine.randomness import instant_token

from uellm.policy.fcfs import FcfsStep
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import AddSequence, DropSequence

VOCAB = 50


class Plans(InstantRunner):
    """Keeps the plans."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__(VOCAB)
        self._depth = depth
        self.plans: list[StepPlan] = []

    @property
    def depth(self) -> int:
        return self._depth

    def submit(self, plan: StepPlan) -> None:
        assert plan.rows == len(plan.token_ids)
        self.plans.append(plan)
        super().submit(plan)


def make_loop(
    runner: Plans,
    slots: int = 4,
    spare: int = 4,
    max_tokens: int = 64,
    kv_tokens: int = 0,
    block_tokens: int = 1,
) -> EngineLoop:
    kv_tokens = kv_tokens or 2 * slots * max_tokens
    capacity = Capacity(slots, max_tokens, kv_tokens, spare, block_tokens)
    return EngineLoop(
        runner, FcfsStep(), capacity, Vocabulary(VOCAB), now=lambda: 0.0, execution="static"
    )


def add(index: int, prompt: int, answer: int) -> AddSequence:
    return AddSequence(
        request_id=str(index),
        generation=1,
        token_ids=[1 + i % (VOCAB - 1) for i in range(prompt)],
        prompt_tokens=prompt,
        sampling=Sampling(max_tokens=answer, seed=index),
    )


def expected(index: int, count: int) -> list[int]:
    return [instant_token(index, position, VOCAB) for position in range(count)]


def run(loop: EngineLoop, limit: int = 2000) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(limit):
        if not loop.busy:
            return tokens
        report = loop.step()
        if report is not None:
            for output in report.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError("the loop does not come to an end")


def test_a_batch_is_a_rectangle_that_lasts_to_its_longest_answer() -> None:
    runner = Plans()
    loop = make_loop(runner)
    lengths = [(3, 2), (9, 7), (5, 4), (1, 1)]
    for index, (prompt, answer) in enumerate(lengths):
        loop.add(add(index, prompt, answer))
    assert run(loop) == {str(i): expected(i, answer) for i, (_, answer) in enumerate(lengths)}
    # The prompts take four times the longest one, and every token after the first a row of each.
    assert [plan.rows for plan in runner.plans] == [4 * 9] + [4] * 6


def test_the_padding_is_reported() -> None:
    loop = make_loop(Plans())
    loop.add(add(0, 10, 5))
    loop.add(add(1, 4, 2))
    reports = []
    while loop.busy:
        reports.append(loop.step())
    # Six tokens of the shorter prompt, and three of its answer's four steps.
    padded = [report.report.padding_tokens for report in reports if report is not None]
    assert padded == [6, 6, 7, 8, 9]


def test_nobody_joins_before_the_batch_is_over() -> None:
    runner = Plans()
    loop = make_loop(runner, slots=2)
    for index, answer in enumerate([2, 6, 3]):
        loop.add(add(index, 4, answer))
    loop.step()
    loop.add(add(3, 4, 3))
    run(loop)
    assert [len(plan.admissions) for plan in runner.plans] == [2, 0, 0, 0, 0, 0, 2, 0, 0]
    assert {plan.rows for plan in runner.plans} == {8, 2}


def test_long_prompts_take_several_steps_of_whole_columns() -> None:
    runner = Plans()
    loop = make_loop(runner, slots=4, max_tokens=400)
    for index, prompt in enumerate([300, 20, 150, 10]):
        loop.add(add(index, prompt, 3))
    assert run(loop) == {str(i): expected(i, 3) for i in range(4)}
    assert [plan.rows for plan in runner.plans] == [512, 512, 4 * 300 - 1024, 4, 4]


def test_stages_work_one_after_the_other() -> None:
    runner = Plans(depth=3)
    loop = make_loop(runner, slots=2)
    loop.add(add(0, 4, 3))
    loop.add(add(1, 4, 3))
    loop.step()
    assert len(runner.plans) == 1


@pytest.mark.parametrize("blocks", [7, 8, 12, 13, 14, 15, 20])
def test_the_longest_sequence_fits_beside_the_padding_in_whole_blocks(blocks: int) -> None:
    loop = make_loop(Plans(), slots=2, max_tokens=100, kv_tokens=16 * blocks, block_tokens=16)
    loop.add(add(0, 90, 50))
    assert run(loop) == {"0": expected(0, 10)}


COMMANDS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "drop", "step", "step", "step"]),
        st.integers(0, 7),
        st.integers(1, 20),
        st.integers(1, 12),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(COMMANDS, st.integers(1, 4), st.sampled_from([0, 1, 4]))
def test_any_mix_of_commands_ends_with_the_right_tokens(
    commands: list[tuple[str, int, int, int]], slots: int, spare: int
) -> None:
    loop = make_loop(Plans(), slots=slots, spare=spare)
    wanted: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    for kind, index, prompt, answer in commands:
        if kind == "add" and str(index) not in wanted:
            loop.add(add(index, prompt, answer))
            wanted[str(index)] = expected(index, answer)
        elif kind == "drop" and str(index) in wanted:
            loop.drop(DropSequence(request_id=str(index), generation=1))
            if len(tokens.get(str(index), [])) < len(wanted[str(index)]):
                wanted[str(index)] = tokens.get(str(index), [])
        elif kind == "step" and (report := loop.step()) is not None:
            for output in report.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    for name, more in run(loop).items():
        tokens.setdefault(name, []).extend(more)
    assert tokens == {name: answer for name, answer in wanted.items() if answer}
