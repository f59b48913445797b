"""The step policy is asked where it can answer otherwise, and then always."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.loop import EngineLoop

from tests.support.engine_loop import VOCAB, Recorder, add, run, take
from uellm.policy.registry import step_policy
from uellm.policy.views import EngineView, StepDecision, StepPolicy
from uellm.v1.engine_pb2 import DropSequence, StepReport


@dataclass
class Asked:
    """Keeps what a policy was asked, and has it asked before every step if that is wanted."""

    policy: StepPolicy
    always: bool = False
    name: str = "asked"
    views: list[EngineView] = field(default_factory=list)

    def step(self, engine: EngineView, now: float) -> StepDecision:
        self.views.append(engine)
        decision = self.policy.step(engine, now)
        again = 0.0 if self.always else decision.reconsider_at
        return StepDecision(
            decision.admit,
            decision.preempt,
            decision.hand_back,
            decision.chunk_tokens,
            decision.reconsider_when,
            again,
            decision.reserve,
        )


def asked_loop(
    policy: str, *, always: bool = False, slots: int = 2, kv_tokens: int = 256
) -> tuple[EngineLoop, Asked, Recorder]:
    asked, runner = Asked(step_policy(policy), always), Recorder()
    loop = EngineLoop(
        runner, asked, Capacity(slots, 64, kv_tokens), Vocabulary(VOCAB), now=lambda: 100.0
    )
    return loop, asked, runner


def stepped(loop: EngineLoop) -> StepReport:
    report = loop.step()
    assert report is not None
    return report


def test_while_nothing_happens_nobody_is_asked() -> None:
    loop, asked, _ = asked_loop("fcfs")
    for name in "abc":
        loop.add(add(name, prompt=3, max_tokens=40))
    for _ in range(20):
        loop.step()
    # They come; the first two have their first tokens; the third waits for a slot.
    assert len(asked.views) == 2
    loop.drop(DropSequence(request_id="a", generation=1))
    assert {output.request_id for output in stepped(loop).outputs} == {"b", "c"}
    assert len(asked.views) == 3


def test_who_comes_is_seen_before_the_next_step() -> None:
    loop, asked, _ = asked_loop("cslo-odbs")
    loop.add(add("a", max_tokens=40))
    for _ in range(5):
        loop.step()
    before = len(asked.views)
    loop.add(add("b", max_tokens=2))
    assert {output.request_id for output in stepped(loop).outputs} == {"a", "b"}
    assert [s.request_id for s in asked.views[before].waiting] == ["b"]


def test_when_room_runs_short_it_is_asked_before_somebody_loses_a_slot() -> None:
    loop, asked, _ = asked_loop("fcfs", slots=3, kv_tokens=64)
    for name in "abc":
        loop.add(add(name, prompt=8, max_tokens=30))
    tokens, _ = run(loop)
    assert {name: len(answer) for name, answer in tokens.items()} == {"a": 30, "b": 30, "c": 30}
    assert min(view.kv_tokens_free for view in asked.views if len(view.running) > 1) <= 3


ARRIVALS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 25), st.integers(0, 6)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(ARRIVALS, st.sampled_from(["fcfs", "sjf", "past-future", "slo-odbs"]), st.integers(64, 200))
def test_the_plans_are_those_of_a_policy_that_is_asked_before_every_step(
    arrivals: list[tuple[int, int, int]], policy: str, kv_tokens: int
) -> None:
    plans = []
    for always in (False, True):
        loop, asked, runner = asked_loop(policy, always=always, slots=3, kv_tokens=kv_tokens)
        tokens: dict[str, list[int]] = {}
        for number, (prompt, length, steps) in enumerate(arrivals):
            loop.add(add(str(number), prompt=prompt, max_tokens=length, seed=number))
            for _ in range(steps):
                if (report := loop.step()) is not None:
                    take(report, tokens, {})
        run(loop)
        plans.append((runner.plans, len(asked.views)))
    (some, few), (every, many) = plans
    assert some == every
    assert few <= many
