"""Several steps under way at once: who is in which, what comes too late, what fails."""

import pytest
from uellm_worker.engine.errors import PeerLostError
from uellm_worker.engine.plan import Release, StepPlan, StepResult

from tests.support.engine_loop import FunctionPolicy, Recorder, add, expected, make_loop, run, take
from uellm.policy.views import StepDecision
from uellm.v1.common_pb2 import (
    FINISH_REASON_LENGTH,
)
from uellm.v1.engine_pb2 import DropSequence


def test_as_many_steps_are_under_way_as_there_are_stages() -> None:
    runner = Recorder(depth=3)
    loop = make_loop(slots=6, runner=runner)
    for i in range(6):
        loop.add(add(str(i), max_tokens=8, seed=i))
    tokens, _ = run(loop)
    assert tokens == {str(i): expected(i, 8) for i in range(6)}
    # Three groups of two neighbours each, in turn; a new step follows every result.
    assert runner.log[:3] == ["submit"] * 3
    assert runner.log[3:-3] == ["collect", "submit"] * (3 * 7)
    slots = [[chunk.slot for chunk in plan.chunks] for plan in runner.plans]
    assert slots == [[0, 1], [2, 3], [4, 5]] * 8


def test_a_lone_sequence_waits_for_nothing() -> None:
    runner = Recorder(depth=3)
    loop = make_loop(slots=6, runner=runner)
    loop.add(add("a", max_tokens=5))
    assert run(loop)[0] == {"a": expected(0, 5)}
    assert runner.log == ["submit", "collect"] * 5


def test_fewer_sequences_than_stages_go_each_at_its_own_pace() -> None:
    runner = Recorder(depth=4)
    loop = make_loop(slots=8, runner=runner)
    loop.add(add("a", max_tokens=6))
    loop.add(add("b", max_tokens=6, seed=1))
    run(loop)
    assert runner.log[:3] == ["submit", "submit", "collect"]
    assert [plan.rows for plan in runner.plans[2:]] == [1] * 10


def test_a_lone_prompt_fills_the_pipeline() -> None:
    """Its chunks follow each other: only the last of them has a token to wait for."""
    runner = Recorder(depth=4)
    loop = make_loop(slots=1, max_tokens=600, runner=runner)
    loop.add(add("a", prompt=500, max_tokens=2))
    assert run(loop)[0] == {"a": expected(0, 2)}
    assert [plan.rows for plan in runner.plans] == [128, 128, 128, 116, 1]
    assert runner.log == ["submit"] * 4 + ["collect"] * 4 + ["submit", "collect"]


def test_a_new_sequence_does_not_wait_for_a_result() -> None:
    """A command ends the wait for a result while a stage idles."""

    class Interrupted(Recorder):
        def collect(self, *, patient: bool = True) -> StepResult | None:
            if patient or len(self.plans) > 1:
                return super().collect(patient=patient)
            return None

    runner = Interrupted(depth=2)
    loop = make_loop(slots=2, runner=runner)
    loop.add(add("a", max_tokens=4))
    assert loop.step() is None
    assert loop.busy
    assert loop.under_way
    loop.add(add("b", max_tokens=4, seed=1))
    assert run(loop)[0] == {"a": expected(0, 4), "b": expected(1, 4)}
    assert runner.log[:3] == ["submit", "submit", "collect"]


def test_who_joins_is_put_where_the_fewest_are() -> None:
    runner = Recorder(depth=2)
    loop = make_loop(slots=8, runner=runner)
    for i in range(5):
        loop.add(add(str(i), max_tokens=1 if i in (0, 2, 4) else 30))
    loop.step()
    loop.step()
    for i in range(5, 8):
        loop.add(add(str(i), max_tokens=30))
    for _ in range(6):
        loop.step()
    # Of the first five, the even ones are over: two are left in the second group.
    assert sorted(len(plan.chunks) for plan in runner.plans[-2:]) == [2, 3]


@pytest.mark.parametrize("end", ["drop", "replace", "preempt"])
def test_what_comes_too_late_is_left_out(end: str) -> None:
    preempt: list[str] = []
    policy = FunctionPolicy(
        lambda view: StepDecision(
            admit=tuple(s.request_id for s in view.waiting),
            preempt=tuple(preempt),
            chunk_tokens=512,
        )
    )
    runner = Recorder(depth=2)
    loop = make_loop(slots=2, runner=runner, policy=policy)
    for i, name in enumerate("ab"):
        loop.add(add(name, max_tokens=6, seed=i))
    report = loop.step()  # The first token of "a"; a step of "b" is under way.
    assert report is not None
    tokens: dict[str, list[int]] = {}
    take(report, tokens, {})
    if end == "preempt":
        preempt.append("b")
    else:
        loop.drop(DropSequence(request_id="b", generation=1))
        if end == "replace":
            loop.add(add("b", prompt=4, max_tokens=6, seed=1))
        else:
            loop.add(add("c", max_tokens=6, seed=2))
    report = loop.step()
    preempt.clear()
    assert report is not None
    take(report, tokens, {})
    rest, ends = run(loop)
    for name, more in rest.items():
        tokens[name] = tokens.get(name, []) + more
    wanted = {"a": expected(0, 6)}
    wanted |= {"c": expected(2, 6)} if end == "drop" else {"b": expected(1, 6)}
    assert tokens == wanted
    assert set(ends) == set(wanted)


def test_a_slot_that_is_spoilt_after_it_was_given_away_is_scrubbed() -> None:
    class Broken(Recorder):
        def submit(self, plan: StepPlan) -> None:
            super().submit(plan)
            if plan.step == 1:
                self._results[-1] = StepResult([-1], seconds=(0.0,))

    runner = Broken(depth=2)
    loop = make_loop(slots=2, runner=runner)
    for i, name in enumerate("ab"):
        loop.add(add(name, max_tokens=6, seed=i))
    tokens: dict[str, list[int]] = {}
    report = loop.step()
    assert report is not None
    take(report, tokens, {})
    loop.drop(DropSequence(request_id="b", generation=1))
    loop.add(add("heir", max_tokens=6, seed=2))
    rest, ends = run(loop)
    assert rest["heir"] == expected(2, 6)
    assert set(ends.values()) == {FINISH_REASON_LENGTH}
    later = runner.plans[2:]
    assert [a.slot for plan in later for a in plan.admissions] == [1, 1]
    assert Release(1, 0) in later[0].moves, "wiped before the heir computes"


class Small(Recorder):
    """Has memory for so many tokens of a step."""

    def __init__(self, rows: int, depth: int = 1) -> None:
        super().__init__(depth)
        self.rows = rows
        self.failures = 0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        if plan.rows > self.rows:
            self.failures += 1
            self._results[-1] = StepResult((), seconds=(0.0,), out_of_memory=True)


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_shrink_until_they_fit_into_memory(depth: int) -> None:
    runner = Small(rows=3, depth=depth)
    loop = make_loop(slots=6, runner=runner)
    for i in range(6):
        loop.add(add(str(i), prompt=20, max_tokens=6, seed=i))
    assert run(loop)[0] == {str(i): expected(i, 6) for i in range(6)}
    assert 0 < runner.failures < 40


def test_steps_grow_again_when_memory_is_back() -> None:
    runner = Small(rows=4)
    loop = make_loop(slots=2, max_tokens=900, runner=runner)
    loop.add(add("a", prompt=30, max_tokens=400))
    loop.step()
    while runner.failures < 3:
        loop.step()
    assert runner.plans[-1].rows < 8
    runner.rows = 10**9
    while len(runner.plans) < 300:
        loop.step()
    loop.add(add("b", prompt=90, max_tokens=1))
    run(loop)
    assert max(plan.rows for plan in runner.plans[300:]) > 30


def test_memory_for_no_token_at_all_ends_the_generation() -> None:
    loop = make_loop(runner=Small(rows=0))
    loop.add(add("a", prompt=8))
    with pytest.raises(MemoryError, match="single token"):
        run(loop)
    assert loop.suspects == ("a",)


def test_all_steps_under_way_are_suspected_when_a_peer_is_lost() -> None:
    class Lost(Recorder):
        def collect(self, *, patient: bool = True) -> StepResult | None:
            raise PeerLostError("gone")

    loop = make_loop(slots=3, runner=Lost(depth=2))
    for name in "abcd":
        loop.add(add(name))
    with pytest.raises(PeerLostError):
        loop.step()
    assert set(loop.suspects) == {"a", "b", "c"}


def test_an_error_of_a_steps_own_is_blamed_on_that_step() -> None:
    class Fatal(Recorder):
        def submit(self, plan: StepPlan) -> None:
            super().submit(plan)
            if plan.step == 1:
                raise RuntimeError("boom")

    loop = make_loop(slots=2, runner=Fatal(depth=2))
    for name in "ab":
        loop.add(add(name))
    with pytest.raises(RuntimeError):
        loop.step()
    assert loop.suspects == ("b",)


def test_an_error_in_the_choice_of_tokens_is_blamed_on_the_oldest_step() -> None:
    class Fatal(Recorder):
        def collect(self, *, patient: bool = True) -> StepResult | None:
            raise RuntimeError("boom")

    loop = make_loop(slots=2, runner=Fatal(depth=2))
    for name in "ab":
        loop.add(add(name))
    with pytest.raises(RuntimeError):
        loop.step()
    assert loop.suspects == ("a",)


def test_too_little_memory_for_a_token_is_blamed_on_its_step() -> None:
    loop = make_loop(slots=2, runner=Small(rows=0, depth=2))
    for name in "ab":
        loop.add(add(name, prompt=1))
    with pytest.raises(MemoryError, match="single token"):
        run(loop)
    assert loop.suspects == ("a",)
