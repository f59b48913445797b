"""What policies do to requests, with a real scheduler and a real engine of one slot."""

from pathlib import Path
from typing import Any

import pytest
from uellm_worker import policy as policy_watch

from tests.support.scheduling import Mesh
from tests.support.serving import MODEL, ask, ended, serving, started
from uellm.streams.messages import Record
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1.common_pb2 import ModelPolicy


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis, MODEL)


def in_time(record: Record) -> bool:
    assert record.finished is not None
    return record.finished.slo.met


def ended_at(record: Record) -> float:
    assert record.finished is not None
    return record.finished.timings.finished_at.ToNanoseconds() / 1e9


@pytest.mark.parametrize(("policy", "urgent_met"), [("cslo-odbs", True), ("fcfs", False)])
async def test_an_urgent_request_overtakes_and_preempts(
    mesh: Mesh,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    urgent_met: bool,
) -> None:
    monkeypatch.setattr(policy_watch, "LOOK_SECONDS", 0.05)
    # Urgent from 4 s before the last moment on: at thirty steps, a third of a second, a busy
    # machine would be too late.
    settings = {"step.urgent_steps": "400"} if policy == "cslo-odbs" else {}
    chosen = ModelPolicy(policy=policy, settings=settings)
    await SchedulerQueue(mesh.redis, MODEL).set_policy(chosen)
    async with serving(mesh, redis_url, tmp_path / "m", policy):
        patient = [await ask(mesh, 400, deadline=120) for _ in range(2)]
        await started(mesh, patient[0])
        urgent = await ended(mesh, await ask(mesh, 20, deadline=4.0))
        others = [await ended(mesh, request_id) for request_id in patient]
    assert in_time(urgent) == urgent_met
    # Not only those that wait: the one that ran, too, gave way.
    assert (ended_at(urgent) < min(map(ended_at, others))) == urgent_met
    assert all(map(in_time, others))
    assert {record.tokens for record in others} == {400}
    assert [record.attempts for record in others] == [1, 1]


async def test_a_policy_that_is_chosen_meanwhile_reaches_who_runs_and_who_waits(
    mesh: Mesh, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_watch, "LOOK_SECONDS", 0.05)
    async with serving(mesh, redis_url, tmp_path / "m", "fcfs"):
        patient = [await ask(mesh, 300, deadline=120) for _ in range(2)]
        await started(mesh, patient[0])
        urgent = await ask(mesh, 20, deadline=4.5)
        await mesh.promised(urgent)
        chosen = ModelPolicy(policy="cslo-odbs", settings={"step.urgent_steps": "450"})
        await SchedulerQueue(mesh.redis, MODEL).set_policy(chosen)
        first = await ended(mesh, urgent)
        others = [await ended(mesh, request_id) for request_id in patient]
    assert in_time(first)
    assert ended_at(first) < min(map(ended_at, others))
    assert {record.tokens for record in others} == {300}


async def test_who_wants_no_late_answer_is_told_though_it_was_sent_ahead(
    mesh: Mesh, redis_url: str, tmp_path: Path
) -> None:
    async with serving(mesh, redis_url, tmp_path / "m", "fcfs"):
        # It is expected to end soon, and does not.
        running = await ask(mesh, 600, output=20)
        await started(mesh, running)
        hopeful = await ask(mesh, 40, deadline=1.6, refusable=True)
        late = await ended(mesh, hopeful)
        assert late.state == "EXPIRED"
        assert (late.tokens, late.attempts) == (0, 1)
        assert late.finished is not None
        assert late.finished.failure.reason == "DEADLINE_EXPIRED"
        assert (await mesh.record(running)).state == "RUNNING"
        await ended(mesh, running)
