"""Runs of the simulated mesh, with all that was decided on record."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from uellm.core.cost import StepCost
from uellm.core.request import Priority
from uellm.decisions.explanation import Facts
from uellm.decisions.records import (
    DispatchPolicyUsed,
    DispatchRecord,
    Record,
    StepPolicyUsed,
    StepRecord,
)
from uellm.decisions.segments import SegmentWriter, read_segment
from uellm.policy.registry import step_policies
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    EngineView,
    QueueView,
    ReplicaView,
    StepDecision,
)
from uellm.simulator.mesh import Mesh, MeshSettings, Outcome
from uellm.simulator.mesh import Record as Ended
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import profiler
from uellm.simulator.requests import Request
from uellm.v1.decisions_pb2 import DecisionSegment

TINY = Platform("tiny", StepCost(0.001, 0.004, 0.001, 1e-5, 1e-6), 400, 6, 16)
STATES = {Outcome.FINISHED: "DONE", Outcome.REFUSED: "FAILED", Outcome.EXPIRED: "EXPIRED"}


class _RecordingDispatch:
    """A policy of level one whose decisions are written down as they are made."""

    def __init__(self, used: DispatchPolicyUsed, writer: SegmentWriter) -> None:
        self.name = used.name
        self._used, self._policy, self._writer = used, used.make(), writer

    def dispatch(
        self, queue: QueueView, replicas: Sequence[ReplicaView], now: float
    ) -> DispatchDecision:
        decision = self._policy.dispatch(queue, replicas, now)
        waiting = len(queue.waiting)
        self._writer.add(DispatchRecord(now, self._used, queue, tuple(replicas), decision, waiting))
        return decision


class _RecordingStep:
    """The same at level two."""

    def __init__(self, used: StepPolicyUsed, writer: SegmentWriter, replica: str) -> None:
        self.name = used.name
        self._used, self._policy, self._writer = used, used.make(), writer
        self._replica, self._step = replica, 0

    def step(self, engine: EngineView, now: float) -> StepDecision:
        decision = self._policy.step(engine, now)
        counts = len(engine.running), len(engine.waiting)
        self._writer.add(
            StepRecord(now, self._replica, self._step, self._used, engine, decision, *counts)
        )
        self._step += 1
        return decision


@dataclass(frozen=True)
class RecordedRun:
    """What came of a run, what was decided in it, and how many bytes that takes."""

    ended: Sequence[Ended]
    records: Sequence[Record]
    size: int


def crowd(count: int, seed: int) -> list[Request]:
    """Requests of two tenants and all classes, with and without deadlines, more than fit."""
    rng = random.Random(seed)  # noqa: S311 - reproducible
    arrival, requests = 0.0, []
    for number in range(count):
        arrival += rng.expovariate(40)
        requests.append(
            Request(
                f"tiny:{number:026d}",
                arrival,
                rng.randint(1, 60),
                min(int(rng.lognormvariate(3, 1)) + 1, 150),
                "all",
                200,
                deadline=rng.choice([None, 0.3, 1.0, 5.0]),
                ttft=rng.choice([None, None, 0.2]),
                priority=rng.choice(list(Priority)),
                tenant=rng.choice(["ours", "theirs"]),
            )
        )
    return requests


def recorded_run(
    name: str, requests: Sequence[Request], *, replicas: int = 1, refusable: bool = True
) -> RecordedRun:
    """Run requests under a policy at both levels; records come out of their bytes."""
    writer = SegmentWriter()
    used = DispatchPolicyUsed(name, DispatchSettings(lookahead_requests=3))
    step = StepPolicyUsed(name if name in step_policies() else "fcfs")
    numbers = iter(range(replicas))
    mesh = Mesh(
        TINY,
        _RecordingDispatch(used, writer),
        lambda: _RecordingStep(step, writer, f"replica-{next(numbers)}"),
        MeshSettings(replicas=replicas, refusable=refusable),
    )
    run = mesh.run(requests, profiler("b80", requests, np.random.default_rng(3)))
    packed = writer.message().SerializeToString()
    records = read_segment(DecisionSegment.FromString(packed)).records
    return RecordedRun(run.records, records, len(packed))


def facts_of(ended: Ended, run: RecordedRun) -> Facts:
    """What would be stored of a request."""
    request = ended.request
    profile = next(
        view.profile
        for record in run.records
        if isinstance(record, DispatchRecord)
        for view in record.queue.waiting
        if view.request_id == request.request_id
    )
    facts = Facts(
        request_id=request.request_id,
        tenant=request.tenant,
        state=STATES[ended.outcome or Outcome.FINISHED],
        slo=request.slo,
        profile=profile,
        promise=ended.promise,
        dispatched_at=ended.dispatched_at,
        first_token_at=ended.first_token_at,
        finished_at=ended.finished_at,
        refused=ended.outcome is Outcome.REFUSED,
        message="" if ended.outcome is Outcome.FINISHED else "it could not be in time",
        attempts=1 if ended.dispatched_at is not None else 0,
    )
    done = ended.outcome is Outcome.FINISHED
    return replace(facts, output_tokens=request.output_tokens if done else 0)
