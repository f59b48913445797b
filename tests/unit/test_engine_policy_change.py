"""Policy and execution changed while sequences run: none is lost, none answers otherwise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.instant import InstantRunner
from uellm_worker.engine.plan import Copy, StepPlan

from tests.support.engine_loop import (
    VOCAB,
    FunctionPolicy,
    Recorder,
    add,
    expected,
    make_loop,
    run,
    take,
)
from uellm.policy.fcfs import FcfsStep
from uellm.policy.registry import step_policy
from uellm.policy.views import StepDecision
from uellm.v1.engine_pb2 import StepReport


def test_the_next_step_is_decided_by_the_new_policy() -> None:
    loop = make_loop(policy=FunctionPolicy(lambda _: StepDecision()))
    loop.add(add("a"))
    assert loop.step() is None
    assert loop.report().policy == "function"
    loop.decide_by(FcfsStep(), "")
    assert loop.report().policy == "fcfs"
    assert run(loop)[0] == {"a": expected(0, 5)}


def test_what_ran_under_another_policy_goes_on_where_it_was() -> None:
    runner = Recorder()
    loop = make_loop(runner=runner)
    loop.add(add("a", prompt=30, max_tokens=20))
    tokens: dict[str, list[int]] = {}
    for _ in range(6):
        report = loop.step()
        assert report is not None
        take(report, tokens, {})
    loop.decide_by(step_policy("cslo-odbs"), "continuous")
    loop.add(add("b", prompt=3, max_tokens=4, seed=2))
    rest = run(loop)[0]
    assert tokens["a"] + rest["a"] == expected(0, 20)
    assert rest["b"] == expected(2, 4)
    # Nothing was computed twice.
    assert sum(plan.rows for plan in runner.plans) == 30 + 19 + 3 + 3


def test_an_unknown_execution_changes_nothing() -> None:
    loop = make_loop()
    with pytest.raises(ValueError, match="one of continuous, static"):
        loop.decide_by(step_policy("sjf"), "magic")
    report = loop.report()
    assert (report.policy, report.execution) == ("fcfs", "continuous")


class Holding(InstantRunner):
    """Checks that what is sampled rests on what the caches hold; padding may be anywhere."""

    def __init__(self, depth: int) -> None:
        super().__init__(VOCAB)
        self._depth = depth
        self._held: dict[int, int] = {}

    @property
    def depth(self) -> int:
        return self._depth

    def submit(self, plan: StepPlan) -> None:
        for move in plan.moves:
            if isinstance(move, Copy):
                assert self._held[move.source] >= move.tokens
                self._held[move.slot] = move.tokens
            else:
                self._held[move.slot] = min(self._held.get(move.slot, 0), move.from_token)
        for chunk in plan.chunks:
            held = self._held.get(chunk.slot, 0)
            assert chunk.start <= held or not chunk.sample
            if chunk.start <= held:
                self._held[chunk.slot] = chunk.start + chunk.count
        super().submit(plan)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "step", "step", "step", "continuous", "static"]),
        st.sampled_from(["fcfs", "cslo-odbs", "slo-odbs", "fifo", "past-future"]),
        st.integers(1, 25),
        st.integers(1, 25),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(CHANGES, st.integers(2, 4), st.integers(100, 256), st.integers(1, 3))
def test_any_changes_under_way_end_with_the_right_tokens(
    changes: list[tuple[str, str, int, int]], slots: int, kv_tokens: int, depth: int
) -> None:
    loop = make_loop(slots=slots, max_tokens=64, kv_tokens=kv_tokens, runner=Holding(depth))
    wanted: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    for number, (what, policy, prompt, length) in enumerate(changes):
        if what == "add":
            loop.add(add(str(number), prompt=prompt, max_tokens=length, seed=number))
            wanted[str(number)] = expected(number, length)
        elif what == "step":
            report: StepReport | None = loop.step()
            if report is not None:
                take(report, tokens, ends)
        else:
            loop.decide_by(step_policy(policy), what)
    rest, more_ends = run(loop)
    for name, more in rest.items():
        tokens[name] = tokens.get(name, []) + more
    assert tokens == wanted
    assert ends.keys() | more_ends.keys() == wanted.keys()
