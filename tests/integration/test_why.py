"""`uellm why` of a mesh of real services: late, refused, expired, preempted, another tenant's."""

import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import Gateway, running_gateway
from tests.support.scheduling import Mesh, scheduler
from tests.support.serving import MODEL, ask, ended, serving, started
from tests.support.waiting import eventually
from uellm.cli import exits, explaining
from uellm.client import Client
from uellm.core.errors import InvalidArgumentError, NotFoundError
from uellm.decisions.segments import VERSION
from uellm.streams.keys import Keys, new_request_id
from uellm.v1.decisions_pb2 import DecisionSegment
from uellm.v1.inference_pb2 import ExplainResponse


@pytest.fixture
async def gateway(redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(redis_url, service_id="g1") as gateway:
        yield gateway


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis, MODEL)


async def explained(
    gateway: Gateway, request_id: str, *kinds: str, naming: str = ""
) -> ExplainResponse:
    """The explanation, once what is decided of the request, and of another, is on record."""
    async with Client(gateway.address) as client:

        async def whole() -> ExplainResponse:
            answer = await client.explain(request_id)
            found = {e.kind for e in answer.events} | {c.kind for c in answer.causes}
            assert not answer.notes
            assert found >= set(kinds)
            assert naming in " ".join(event.text for event in answer.events)
            return answer

        answer = await eventually(whole, interval=0.05)
    assert answer is not None
    return answer


async def test_late_behind_a_long_one(
    mesh: Mesh, gateway: Gateway, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(mesh, redis_url, tmp_path / "m", "fcfs", lookahead_requests=0):
        long = await ask(mesh, 300)
        await started(mesh, long)
        short = await ask(mesh, 10, deadline=0.2)
        record = await ended(mesh, short)
        assert record.finished is not None
        assert not record.finished.slo.met
        answer = await explained(gateway, short, "promised", "dispatched", "held_up_slot")
    assert "after its deadline" in answer.summary
    assert "every slot was taken" in answer.summary
    causes = {cause.kind: cause for cause in answer.causes}
    assert list(causes["ahead_before"].requests) == [long]
    waited = {phase.name: phase.seconds for phase in answer.phases}
    assert sum(waited.values()) == pytest.approx(
        record.finished.timings.finished_at.ToNanoseconds() / 1e9 - record.accepted_at, abs=0.01
    )
    assert waited["queue"] > 0.5
    # All of it, but for the moments in which a busy machine decides nothing.
    assert 0.5 * waited["queue"] < causes["held_up_slot"].seconds < waited["queue"] + 0.1
    best = answer.counterfactuals[0]
    assert list(best.without) == [long]
    # By the estimate what was left of the long one: of 300 steps of 10 ms and more.
    assert 0.5 < best.seconds_earlier < 2 * waited["queue"] + 1
    assert answer.promise.p_meet < 0.5

    assert await explaining.why([gateway.address], short, as_json=False) == exits.OK
    said = capsys.readouterr().out
    for words in (answer.summary, "Where the time went", "What would have helped", long):
        assert words in said
    await explaining.why([gateway.address], short, as_json=True)
    assert json.loads(capsys.readouterr().out)["counterfactuals"][0]["without"] == [long]


async def test_refused_and_expired(
    mesh: Mesh, gateway: Gateway, redis_url: str, tmp_path: Path
) -> None:
    async with serving(mesh, redis_url, tmp_path / "m", "edf", lookahead_requests=0):
        # Far longer than it was expected to be, so that who waits for its slot is let in.
        long = await ask(mesh, 400, output=20)
        await started(mesh, long)
        refused = await ask(mesh, 100, deadline=0.3, refusable=True)
        expired = await ask(mesh, 10, deadline=2.5, refusable=True)
        await ended(mesh, refused)
        await ended(mesh, expired)
        first = await explained(gateway, refused, "finished", "ahead_before")
        second = await explained(gateway, expired, "promised", "held_up_slot")
    assert first.summary.startswith("Refused after")
    assert "slo.deadline: 0.3 s is too short" in first.summary
    assert "Without" in first.summary
    assert long in first.counterfactuals[0].without
    assert second.summary.startswith("Expired after")
    # By the estimate the other one was to hold the slot for what is left of twenty steps.
    assert second.counterfactuals[0].seconds_earlier > 0
    assert [phase.name for phase in second.phases] == ["queue"]


async def others(redis: Any, begin: int, end: int) -> None:
    """Decisions of a busy model, five a second, so many seconds from now on."""
    now, _ = await redis.time()
    payload = zlib.compress(DecisionSegment(version=VERSION).SerializeToString())
    for i in range(5 * begin, 5 * end):
        place = f"{1000 * now + 200 * i}-0"
        await redis.xadd(Keys(MODEL).decisions, {"payload": payload}, id=place)


async def test_a_refused_one_whose_record_is_gone(
    mesh: Mesh, gateway: Gateway, redis: Any, redis_url: str, tmp_path: Path
) -> None:
    async with serving(mesh, redis_url, tmp_path / "m", "edf"):
        await others(redis, -50, 0)
        refused = await ask(mesh, 100, deadline=0.3, refusable=True)
        theirs = await ask(mesh, 100, deadline=0.3, refusable=True, tenant="theirs")
        await ended(mesh, refused)
        await ended(mesh, theirs)
        before = await explained(gateway, refused, "finished")
        await others(redis, 1, 50)
        for each in (refused, theirs):
            await redis.delete(Keys(MODEL).request(each))
        async with Client(gateway.address) as client:
            after = await client.explain(refused)
            with pytest.raises(NotFoundError, match="no request"):
                await client.explain(theirs)
    assert after.summary.startswith("Refused after")
    assert "slo.deadline: 0.3 s is too short" in after.summary
    assert after.promise == before.promise
    assert [event.kind for event in after.events] == [event.kind for event in before.events]
    assert after.accepted_at == before.accepted_at


async def test_preempted_for_an_urgent_one(
    mesh: Mesh, gateway: Gateway, redis_url: str, tmp_path: Path
) -> None:
    # Steps that are long beside what a busy machine adds to them.
    async with serving(mesh, redis_url, tmp_path / "m", "cslo-odbs", step_seconds=0.05):
        lost = await ask(mesh, 90, deadline=0.05)
        await started(mesh, lost)
        urgent = await ask(mesh, 10, deadline=3.0)
        await ended(mesh, urgent)
        await ended(mesh, lost)
        answer = await explained(gateway, lost, "preempted", "admitted", naming=urgent)
    events = {event.kind: event.text for event in answer.events}
    assert urgent in events["preempted"]
    causes = {cause.kind: cause for cause in answer.causes}
    assert causes["preempted"].seconds > 0.2
    kept = [each for each in answer.counterfactuals if "kept" in each.text or "lost" in each.text]
    assert [list(each.without) for each in kept] == [[urgent]]


async def test_what_is_anothers_stays_its_own(
    mesh: Mesh, gateway: Gateway, redis_url: str, tmp_path: Path
) -> None:
    async with serving(mesh, redis_url, tmp_path / "m", "fcfs", lookahead_requests=0):
        theirs = await ask(mesh, 100, tenant="theirs")
        await started(mesh, theirs)
        ours = await ask(mesh, 5)
        await ended(mesh, ours)
        answer = await explained(gateway, ours, "held_up_slot", "ahead_before")
        async with Client(gateway.address) as client:
            with pytest.raises(NotFoundError, match="another tenant's"):
                await client.explain(theirs)
    assert theirs not in str(answer)
    assert answer.counterfactuals[0].without == ["another tenant's request 1"]


async def test_what_is_unknown_or_trimmed_says_so(mesh: Mesh, gateway: Gateway) -> None:
    async with Client(gateway.address) as client:
        with pytest.raises(NotFoundError, match="no request"):
            await client.explain(new_request_id(MODEL))
        with pytest.raises(InvalidArgumentError, match="request_id"):
            await client.explain("nonsense")
        waiting = await mesh.accept(deadline=60)
        answer = await client.explain(waiting)
    assert answer.summary.startswith("Waits in the queue")
    assert "UELLM_DECISIONS_KEPT" in answer.notes[0]


async def test_one_that_waits_is_explained_so_far(
    mesh: Mesh, gateway: Gateway, redis_url: str
) -> None:
    async with scheduler(redis_url):
        await mesh.deploy()
        first = await mesh.accept(deadline=5)
        waiting = await mesh.accept(deadline=60)
        answer = await explained(gateway, waiting, "held_up_no_replica", "position")
        assert "1 ahead of it" in answer.summary
        (urgent,) = [cause for cause in answer.causes if cause.kind == "ahead_urgent"]
        assert list(urgent.requests) == [first]
