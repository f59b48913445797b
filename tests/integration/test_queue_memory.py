"""A full Redis refuses new work and lets the rest finish; with a full disk, all of it waits."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import psutil
import pytest

from tests.support.queues import GATEWAY, REPLICA, SCHEDULER, Sides, append, finish
from tests.support.servers import Server
from tests.support.waiting import eventually
from uellm.core.errors import ResourceExhaustedError
from uellm.embedded import EmbeddedRedis
from uellm.streams.connection import UNREACHABLE, connect
from uellm.streams.messages import Start
from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import common_pb2, topology_pb2


@pytest.fixture
async def full(sides: Sides) -> AsyncIterator[Sides]:
    """Sides with work in every state, on a server without a byte to spare."""
    for key in ("held", "running"):
        await sides.held(key=key)
    for key in ("queued", "promised", "expired"):
        await sides.queued(key=key)
    await sides.accept(key="accepted")
    await sides.redis.config_set("maxmemory", 1)
    yield sides
    await sides.redis.config_set("maxmemory", 0)


async def _id(sides: Sides, key: str) -> str:
    request_id: bytes = await sides.redis.hget(f"{sides.keys.prefix}idem:local:{key}", "id")
    return request_id.decode()


async def test_new_work_is_refused_cleanly(full: Sides) -> None:
    before = sorted(await full.redis.keys("*"))
    with pytest.raises(ResourceExhaustedError) as refused:
        await full.accept(key="new")
    assert refused.value.reason == "QUEUE_MEMORY"
    assert refused.value.retry_after_seconds
    assert sorted(await full.redis.keys("*")) == before


async def test_everything_else_goes_on(full: Sides) -> None:
    held, running = await _id(full, "held"), await _id(full, "running")
    queued, expired = await _id(full, "queued"), await _id(full, "expired")
    assert await full.scheduler.own(SCHEDULER, 60_000) == full.token
    await full.scheduler.ensure_requests_group()
    assert len(await full.read()) == 1
    assert len(await full.read("zombie")) == 0
    assert await full.scheduler.claim(full.token, SCHEDULER, 10) == []
    promise = common_pb2.Promise(revision=1)
    await full.scheduler.promise(full.token, {await _id(full, "promised"): promise})
    assert await full.dispatch((queued, 0)) == [True]
    assert len(await full.leader.read_batches(REPLICA, 1, 10, 1)) == 1
    step = (Start(running, 1), append(running, 1, 0, [1]), finish(running, 1))
    assert await full.say(*step, renew=[held, queued]) == []
    await full.reap()
    # Only the test needs memory for this.
    await full.redis.config_set("maxmemory", 0)
    await full.expire_lease(held)
    await full.redis.config_set("maxmemory", 1)
    assert (await full.reap()).requeued == (held,)
    assert await full.leader.hand_back(REPLICA, 1, [(queued, 1)]) == [True]
    assert await full.scheduler.finish(
        full.token, [replace(finish(expired, 0, "EXPIRED"), dead_reason="X")]
    ) == [True]
    await full.gateway.open_frames(GATEWAY, 60)
    await full.gateway.open_frames("gateway-2", 60)
    await full.gateway.watch(held, "local", "gateway-2")
    assert await full.scheduler.route(REPLICA, 2, "READY")
    for key in ("held", "queued", "promised", "accepted"):
        assert await full.cancel(await _id(full, key)) == "CANCELLED"
    assert await full.unrest() == []


async def test_services_stay_registered(full: Sides) -> None:
    registry = Registry(full.redis)
    service = ServiceAddress("worker", "worker-1", "host:1", 1)
    await registry.register(service)
    assert await registry.find("worker") == [service]
    await registry.publish(topology_pb2.Deployment(name="model"))
    assert list(await registry.deployments()) == ["model"]
    await registry.unregister("worker", "worker-1")
    await registry.withdraw("model")


def _with_a_small_disk(command: Sequence[str]) -> list[str]:
    # No file grows beyond 1 MiB; the signal that usually ends who tries is ignored.
    return ["sh", "-c", "trap '' XFSZ; ulimit -S -f 2048; exec \"$@\"", "sh", *command]


async def test_with_a_full_disk_everything_waits(queue_server: Server) -> None:
    if not isinstance(queue_server, EmbeddedRedis):
        pytest.skip("what is limited is a process of this host")
    with EmbeddedRedis(binary=queue_server.binary, wrap=_with_a_small_disk) as server:
        client = connect(server.url)
        sides = Sides(client)
        await sides.open()
        held = await sides.held()

        async def refused() -> bool:
            try:
                await sides.accept(prompt=range(20_000))
            except UNREACHABLE:
                return True
            return False

        await eventually(refused)
        with pytest.raises(UNREACHABLE):
            await sides.say(append(held, 1, 0, [1]))
        with pytest.raises(UNREACHABLE):
            await sides.read()
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_FSIZE, (1 << 30, 1 << 30))

        async def logged() -> bool:
            with contextlib.suppress(*UNREACHABLE):
                return await sides.say(append(held, 1, 0, [1]), finish(held, 1)) == []
            return False

        await eventually(logged)
        assert await sides.logged(held) == [1]
        await client.aclose()


async def test_without_the_replicas_that_it_needs_everything_waits(sides: Sides) -> None:
    held = await sides.held()
    await sides.redis.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(UNREACHABLE):
            await sides.accept()
        with pytest.raises(UNREACHABLE):
            await sides.say(append(held, 1, 0, [1]))
    finally:
        await sides.redis.config_set("min-replicas-to-write", 0)
    assert await sides.say(append(held, 1, 0, [1]), finish(held, 1)) == []
    assert await sides.logged(held) == [1]
