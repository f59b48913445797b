"""Who is there, and what they serve."""

import time

import pytest
from redis.asyncio import Redis

from tests.support.scheduling import Mesh
from tests.support.waiting import eventually
from uellm.cli import exits, overview
from uellm.streams.clock import RedisClock
from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import queue_pb2, topology_pb2


def _service(number: int, role: str = "worker") -> ServiceAddress:
    return ServiceAddress(role, f"{role}-{number}", f"host:{number}", number)


async def test_services_are_found_by_role(redis: Redis) -> None:
    registry = Registry(redis)
    for service in (_service(2), _service(1), _service(1, "gateway")):
        await registry.register(service)
    assert await registry.find("worker") == [_service(1), _service(2)]
    assert await registry.find("gateway") == [_service(1, "gateway")]
    assert await registry.find("profiler") == []


async def test_a_service_that_registers_again_has_its_new_address(redis: Redis) -> None:
    registry = Registry(redis)
    await registry.register(_service(1))
    moved = ServiceAddress("worker", "worker-1", "elsewhere:9", 9)
    await registry.register(moved)
    assert await registry.find("worker") == [moved]


async def test_a_service_that_goes_is_gone_at_once(redis: Redis) -> None:
    registry = Registry(redis)
    await registry.register(_service(1))
    await registry.unregister("worker", "worker-1")
    await registry.unregister("worker", "worker-1")
    assert await registry.find("worker") == []


async def test_a_silent_service_is_gone_after_its_lease(redis: Redis) -> None:
    registry = Registry(redis)
    await registry.register(_service(1), lease_seconds=0.05)
    await registry.register(_service(2))

    async def only_the_other() -> bool:
        return await registry.find("worker") == [_service(2)]

    await eventually(only_the_other)
    await registry.register(_service(1))
    assert await registry.find("worker") == [_service(1), _service(2)]


async def test_services_long_gone_leave_nothing_behind(redis: Redis) -> None:
    registry = Registry(redis)
    await registry.register(_service(1), lease_seconds=-120)
    assert await registry.find("worker") == []
    assert await redis.keys("*") == []


async def test_deployments_are_published_and_withdrawn(redis: Redis) -> None:
    registry = Registry(redis)
    first = topology_pb2.Deployment(name="b/model", version=1)
    second = topology_pb2.Deployment(name="a", version=7)
    for deployment in (first, second, first):
        await registry.publish(deployment)
    assert list((await registry.deployments()).items()) == [("a", second), ("b/model", first)]
    await registry.withdraw("a")
    await registry.withdraw("a")
    assert list(await registry.deployments()) == ["b/model"]


async def test_the_clock_is_redis_time(redis: Redis) -> None:
    clock = RedisClock(redis)
    began = time.monotonic()
    await clock.sync()
    seconds, microseconds = await redis.time()
    apart = abs(clock.now() - (seconds + microseconds / 1e6))
    assert apart < 0.1 + time.monotonic() - began
    before = clock.now()
    await clock.sync()
    await clock.sync(force=True)
    assert clock.now() >= before - 0.5


async def test_health_tells_who_computes_from_who_waits_for_a_slot(
    redis: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = Mesh(redis)
    await mesh.deploy("r0", slots=2)
    report = queue_pb2.ReplicaReport(epoch=1, slots=2, kv_tokens_total=9, running=5, waiting=3)
    assert await mesh.leader.route("r0", 1, "READY", report)
    assert await overview.health(redis_url, as_json=False) == exits.FAILED
    assert "2 running on 2 slots, 3 waiting" in capsys.readouterr().out
