"""A step policy that waits on purpose is asked again when it said, without any news."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from uellm_worker.engine import child
from uellm_worker.engine.child import Child
from uellm_worker.engine.inbox import Inbox
from uellm_worker.engine.instant import InstantEngine

from tests.support.engine_loop import FunctionPolicy, add, make_loop
from tests.support.waiting import HANG_SECONDS
from uellm.policy.views import EngineView, StepDecision
from uellm.v1.engine_pb2 import CommitShard, EngineCommand, EngineEvent, PrepareShard
from uellm.v1.topology_pb2 import ShardAssignment

WAIT_SECONDS = 0.3


@dataclass
class Waiting:
    """Admits whoever has waited long enough, and wants to be asked again when the next has."""

    name: str = "waiting"
    asked_at: list[float] = field(default_factory=list)

    def step(self, engine: EngineView, now: float) -> StepDecision:
        self.asked_at.append(now)
        ready = tuple(
            s.request_id for s in engine.waiting if now - s.arrived_at >= WAIT_SECONDS - 1e-6
        )
        others = [s.arrived_at for s in engine.waiting if s.request_id not in ready]
        return StepDecision(
            admit=ready,
            chunk_tokens=99,
            reconsider_at=min(others) + WAIT_SECONDS if others else None,
        )


class Channel:
    """What a child says to its agent, until that is gone."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.gone = False

    def send(self, event: EngineEvent) -> None:
        if self.gone:
            raise BrokenPipeError
        self.events.put(event)


@dataclass
class Running:
    """A child in a thread, serving."""

    channel: Channel
    inbox: Inbox
    policy: Waiting

    def tell(self, **command: object) -> None:
        self.inbox.put(EngineCommand(**command))  # type: ignore[arg-type]

    def expect(self, kind: str) -> EngineEvent:
        while (event := self.channel.events.get(timeout=HANG_SECONDS)).WhichOneof("event") != kind:
            pass
        return event


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    policy = Waiting()
    monkeypatch.setattr(child, "step_policy", lambda name: policy)
    found = Running(Channel(), Inbox(), policy)
    serving = Child(found.channel, found.inbox, InstantEngine())  # type: ignore[arg-type]

    def serve() -> None:
        try:
            serving.run()
        except BrokenPipeError:
            return

    thread = threading.Thread(target=serve)
    thread.start()
    assignment = ShardAssignment(generation=1, stage_count=1, slots=4, max_tokens=64)
    found.tell(prepare=PrepareShard(assignment=assignment))
    found.expect("prepared")
    found.tell(commit=CommitShard(generation=1))
    found.expect("serving")
    yield found
    found.channel.gone = True
    found.tell(prepare=PrepareShard(assignment=assignment))
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


def test_a_policy_that_waits_is_asked_again_when_it_said(running: Running) -> None:
    began = time.monotonic()
    running.tell(add=add("a", max_tokens=1))
    step = running.expect("step").step
    assert list(step.admitted) == ["a"]
    assert time.monotonic() - began >= WAIT_SECONDS
    # Nobody asks in between.
    assert len(running.policy.asked_at) <= 3


def test_news_are_heard_while_a_policy_waits(running: Running) -> None:
    running.tell(add=add("a", max_tokens=1))
    running.tell(add=add("b", max_tokens=1))
    admitted: list[str] = []
    while len(admitted) < 2:
        admitted += running.expect("step").step.admitted
    assert sorted(admitted) == ["a", "b"]


@pytest.mark.parametrize(("at", "patience"), [(None, None), (1000.0, 998.0), (0.0, 0.001)])
def test_a_loop_says_for_how_long_it_has_nothing_to_do(
    at: float | None, patience: float | None
) -> None:
    """By a clock that goes on by one second whenever it is looked at."""
    loop = make_loop(policy=FunctionPolicy(lambda _: StepDecision(reconsider_at=at)))
    assert loop.patience is None
    loop.add(add("a"))
    assert loop.step() is None
    assert loop.patience == (None if patience is None else pytest.approx(patience, abs=2))
    assert patience is None or loop.patience is None or loop.patience > 0
