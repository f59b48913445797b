"""SchedulerService: any scheduler answers for every model."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from tests.support.scheduling import MODEL, Mesh, Running, scheduler
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.convert import duration
from uellm.core.errors import InvalidArgumentError, NotFoundError, UnavailableError
from uellm.policy.prospects import Forecasts
from uellm.rpc import channel, error_from
from uellm.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc

LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis)


@asynccontextmanager
async def stub_of(service: Running) -> AsyncIterator[Any]:
    async with channel(service.address) as open_channel:
        yield scheduler_pb2_grpc.SchedulerServiceStub(open_channel)


async def call(method: Any, request: Any) -> Any:
    """The answer, once the model has an owner."""

    async def answer() -> Any:
        try:
            return await method(request, timeout=HANG_SECONDS)
        except grpc.aio.AioRpcError as error:
            found = error_from(error)
            if isinstance(found, UnavailableError):
                return None
            raise found from None

    return await eventually(answer)


def estimate(deadline: float | None = None, tokens: float = 100) -> Any:
    slo = common_pb2.Slo()
    if deadline is not None:
        slo.deadline.FromNanoseconds(round(deadline * 1e9))
    return scheduler_pb2.SchedulerServiceEstimateRequest(
        model=MODEL,
        slo=slo,
        profile=common_pb2.ResourceProfile(
            prompt_tokens=10,
            output_tokens=common_pb2.QuantileFunction(
                levels=LEVELS, values=[tokens / 2, tokens, tokens * 2]
            ),
        ),
    )


def or_refused(request: Any) -> Any:
    request.on_infeasible = common_pb2.ON_INFEASIBLE_REFUSE
    return request


def seconds_until_finish(promise: common_pb2.Promise) -> float:
    start, finish = promise.start_p50.ToNanoseconds(), promise.finish_p50.ToNanoseconds()
    return (finish - start) / 1e9


async def test_an_estimate_is_what_would_be_promised(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1, step_seconds=0.5)
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        promise = (await call(stub.Estimate, estimate(deadline=60))).promise
        assert seconds_until_finish(promise) == pytest.approx(50, rel=0.2)
        assert promise.queue_position == 0
        assert 0.5 < promise.p_meet < 0.9
        ids = [await mesh.accept(output=100) for _ in range(4)]
        for request_id in ids:
            await mesh.promised(request_id)
        # Three run or are bound, one waits; with a deadline it would come before that one.
        urgent = (await call(stub.Estimate, estimate(deadline=200))).promise
        patient = (await call(stub.Estimate, estimate())).promise
        assert urgent.queue_position == 0
        # Two of those that were sent have no slot yet, and one waits to be sent.
        assert patient.queue_position == 3
        assert patient.start_p50.ToNanoseconds() > urgent.start_p50.ToNanoseconds()
        assert not patient.HasField("p_meet")


async def test_an_estimate_says_who_would_be_refused(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1, step_seconds=0.5)
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        hopeless = await call(stub.Estimate, or_refused(estimate(deadline=1)))
        assert hopeless.refusal.reason == "DEADLINE_INFEASIBLE"
        assert "1 s is too short" in hopeless.refusal.message
        assert hopeless.promise.HasField("earliest_feasible_finish")
        assert not hopeless.promise.best_effort
        assert not (await call(stub.Estimate, estimate(deadline=1))).HasField("refusal")
        easy = await call(stub.Estimate, or_refused(estimate(deadline=300)))
        assert not easy.HasField("refusal")
        for _ in range(4):
            await mesh.promised(await mesh.accept(output=100))
        asked = or_refused(estimate(deadline=120))
        asked.profile.output_tokens.values[:] = [60, 100, 140]
        crowded = (await call(stub.Estimate, asked)).refusal
        submitted = await mesh.accept(output=100, deadline=120, refusable=True)
        ended = (await mesh.ended(submitted)).finished
        assert ended is not None
        assert crowded.reason == ended.failure.reason
        assert crowded.retry_after.seconds == pytest.approx(ended.failure.retry_after.seconds, 0.3)


async def test_estimates_leave_nothing_behind(mesh: Mesh, redis_url: str) -> None:
    """Nobody comes, so that nothing is decided either."""

    def forecasts() -> int:
        gc.collect()
        # Not isinstance: that asks objects of other libraries for their class, of which some warn.
        return sum(type(each) is Forecasts for each in gc.get_objects())

    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        await call(stub.Estimate, estimate())
        before = forecasts()
        for _ in range(20):
            await stub.Estimate(estimate(), timeout=HANG_SECONDS)
        assert forecasts() <= before + 1


async def test_the_queue_is_shown_in_its_order(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1)
    async with (
        scheduler(redis_url, lookahead_requests=0) as service,
        stub_of(service) as stub,
    ):
        await mesh.accept(deadline=100)
        await mesh.received("r0", 1)
        late, early = await mesh.accept(deadline=300), await mesh.accept(deadline=200)
        await mesh.promised(late)
        await mesh.promised(early)
        queue = await call(stub.GetQueue, scheduler_pb2.GetQueueRequest(model=MODEL))
    assert [request.request_id for request in queue.queued] == [early, late]
    assert all(request.promise.revision for request in queue.queued)
    (load,) = queue.replicas
    assert (load.replica, load.in_flight, load.slots) == ("r0", 1, 1)
    assert queue.owner == "scheduler-a"


async def test_the_policy_changes_while_running_and_outlives_its_scheduler(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=1)
    which = scheduler_pb2.GetPolicyRequest(model=MODEL)
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        assert (await call(stub.GetPolicy, which)).policy == "edf"
        change = scheduler_pb2.SetPolicyRequest(model=MODEL, policy="fcfs")
        assert (await call(stub.SetPolicy, change)).previous == "edf"
        assert (await call(stub.GetPolicy, which)).policy == "fcfs"
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        ids = [await mesh.accept(deadline=deadline) for deadline in (900, 100, 500)]
        assert [entry.request_id for entry in await mesh.received("r0", 3)] == ids
        answer = await call(stub.GetPolicy, which)
        assert answer.policy == "fcfs"
        assert set(answer.available) >= {"edf", "fcfs"}


async def test_settings_come_with_a_policy_and_go_with_it(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0")
    which = scheduler_pb2.GetPolicyRequest(model=MODEL)
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        before = await call(stub.GetPolicy, which)
        assert not before.HasField("chosen")
        change = scheduler_pb2.SetPolicyRequest(
            model=MODEL,
            policy="cslo-odbs",
            settings={"max_wait_seconds": "60", "step.keep_up": "3"},
            execution="continuous",
            class_defaults={"interactive": common_pb2.Slo(ttft=duration(2))},
        )
        await call(stub.SetPolicy, change)
        found = await call(stub.GetPolicy, which)
        values = {(row.level, row.name): row.value for row in found.settings}
        assert values["dispatch", "max_wait_seconds"] == values["step", "max_wait_seconds"] == "60"
        assert values["step", "keep_up"] == "3"
        assert found.chosen.class_defaults["interactive"].ttft == duration(2)
        assert found.chosen.execution == "continuous"
        assert all(row.description for row in found.settings)
        # A refused change leaves all as it was.
        with pytest.raises(InvalidArgumentError, match="must be above 0") as error:
            change.settings["max_wait_seconds"] = "0"
            await call(stub.SetPolicy, change)
        assert error.value.field == "max_wait_seconds"
        assert (await call(stub.GetPolicy, which)).chosen == found.chosen
        # What is not named again has its default.
        change = scheduler_pb2.SetPolicyRequest(model=MODEL, policy="cslo-odbs")
        assert (await call(stub.SetPolicy, change)).previous == "cslo-odbs"
        found = await call(stub.GetPolicy, which)
        assert all(row.value == row.default_value for row in found.settings)
        assert not found.chosen.class_defaults
        # And none at all: as the services are set.
        await call(stub.SetPolicy, scheduler_pb2.SetPolicyRequest(model=MODEL))
        after = await call(stub.GetPolicy, which)
        assert (after.policy, after.settings) == (before.policy, before.settings)
        assert not after.HasField("chosen")
        assert await mesh.redis.get(mesh.gateway.keys.policy) is None


async def test_a_policy_changes_the_order_of_what_waits_already(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1)
    async with (
        scheduler(redis_url, lookahead_requests=0, policy="fcfs") as service,
        stub_of(service) as stub,
    ):
        running = await mesh.accept()
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == running
        patient, urgent = await mesh.accept(deadline=900), await mesh.accept(deadline=60)
        await mesh.promised(urgent)
        change = scheduler_pb2.SetPolicyRequest(model=MODEL, policy="edf")
        await call(stub.SetPolicy, change)
        await mesh.finish("r0", entry)
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == urgent
        await mesh.finish("r0", entry)
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == patient


async def test_a_policy_that_was_kept_as_a_name_alone_is_still_known(
    mesh: Mesh, redis_url: str
) -> None:
    """And one that no package here offers leaves the default in force."""
    await mesh.redis.set(mesh.gateway.keys.policy, "sjf")
    await mesh.deploy("r0")
    which = scheduler_pb2.GetPolicyRequest(model=MODEL)
    async with scheduler(redis_url, policy="priority") as service, stub_of(service) as stub:

        async def is_in_force(name: str) -> bool:
            return (await call(stub.GetPolicy, which)).policy == name

        await eventually(lambda: is_in_force("sjf"))
        await mesh.redis.set(mesh.gateway.keys.policy, "somebodys-own")
        await eventually(lambda: is_in_force("priority"))
        await mesh.redis.delete(mesh.gateway.keys.policy)
        assert await is_in_force("priority")


async def test_any_scheduler_answers_for_the_owner(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0")
    async with (
        scheduler(redis_url, "a") as first,
        scheduler(redis_url, "b") as second,
        stub_of(first) as one,
        stub_of(second) as other,
    ):
        which = scheduler_pb2.GetQueueRequest(model=MODEL)
        owners = {(await call(stub.GetQueue, which)).owner for stub in (one, other)}
        assert len(owners) == 1
        for stub in (one, other):
            assert (await call(stub.Estimate, estimate())).promise.finish_p50.seconds
        change = scheduler_pb2.SetPolicyRequest(model=MODEL, policy="fcfs")
        for stub in (one, other):
            await call(stub.SetPolicy, change)
        for stub in (one, other):
            policy = await call(stub.GetPolicy, scheduler_pb2.GetPolicyRequest(model=MODEL))
            assert policy.policy == "fcfs"


async def test_bad_calls_name_what_is_wrong(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0")
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        with pytest.raises(NotFoundError, match="'nothing' is not deployed; deployed: demo"):
            await call(stub.GetQueue, scheduler_pb2.GetQueueRequest(model="nothing"))
        with pytest.raises(InvalidArgumentError, match="available: cslo-odbs, edf, fcfs") as error:
            change = scheduler_pb2.SetPolicyRequest(model=MODEL, policy="magic")
            await call(stub.SetPolicy, change)
        assert error.value.field == "policy"
        for fields, field, message in (
            ({"settings": {"speed": "9"}}, "speed", "no such setting of fcfs; available: knee"),
            ({"settings": {"watermark": "2"}}, "watermark", "2 must be at most 0.9"),
            ({"execution": "magic"}, "execution", "one of continuous, static"),
            ({"class_defaults": {"vip": common_pb2.Slo()}}, "class.vip", "one of batch, normal"),
            ({"policy": "", "execution": "static"}, "policy", "name the policy"),
        ):
            change = scheduler_pb2.SetPolicyRequest(
                **{"model": MODEL, "policy": "fcfs"} | fields  # type: ignore[arg-type]
            )
            with pytest.raises(InvalidArgumentError, match=message) as error:
                await call(stub.SetPolicy, change)
            assert error.value.field == field
        empty = scheduler_pb2.SchedulerServiceEstimateRequest(model=MODEL)
        with pytest.raises(InvalidArgumentError, match=r"profile\.output_tokens: empty"):
            await call(stub.Estimate, empty)
        wrong = estimate()
        wrong.profile.output_tokens.levels[0] = 0.95
        with pytest.raises(InvalidArgumentError, match="levels must ascend"):
            await call(stub.Estimate, wrong)


async def test_without_a_replica_there_is_no_estimate(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy()
    async with scheduler(redis_url) as service, stub_of(service) as stub:
        await call(stub.GetQueue, scheduler_pb2.GetQueueRequest(model=MODEL))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Estimate(estimate(), timeout=HANG_SECONDS)
        found = error_from(error.value)
        assert (found.reason, found.retry_after_seconds) == ("NO_REPLICA", 1.0)
