"""Deployers that are restarted, stand by or lose their lease, and a Redis that goes or forgets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from uellm_deployer.store import DESIRED

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import BOTH, MODEL, REPLICA, Mesh, gone, layers
from tests.support.waiting import HANG_SECONDS, eventually, stays
from uellm.core.errors import (
    ConfigurationError,
    UnavailableError,
)
from uellm.embedded import EmbeddedRedis
from uellm.streams.connection import UNREACHABLE, connect
from uellm.v1 import deployer_pb2


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


@pytest.fixture
async def pair(mesh: Mesh) -> Mesh:
    """One deployer, two workers."""
    await mesh.add_deployer()
    await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    return mesh


async def test_a_stale_generation_is_left_behind(pair: Mesh) -> None:
    pair.workers["w1"].fence(REPLICA, 7)
    await pair.apply(stages=2)
    assert (await pair.ready()).replicas[0].epoch == 8


async def test_a_restarted_deployer_adopts_what_runs(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = await pair.ready()
    await pair.stop_deployer(0)
    await pair.add_deployer()
    pair.addresses.pop(0)
    for worker in pair.workers.values():
        worker.calls.clear()
        await worker.turn_to(pair.addresses)
    # A new deployer does not say what is where before the workers have told it.
    described = await pair.call("Describe", deployer_pb2.DescribeRequest())
    assert [worker.stages[0].replica for worker in described.workers] == [REPLICA] * 2

    async def untouched() -> bool:
        after = await pair.published()
        return (
            after is not None
            and after.replicas == before.replicas
            and not any(worker.calls for worker in pair.workers.values())
        )

    # Longer than any grace of a takeover.
    await stays(untouched, 3.5)
    pair.workers["w1"].fail_stage(REPLICA, "CHILD_LOST")
    await pair.ready(above=before.replicas[0].epoch)


async def test_workers_may_take_a_while_to_turn_to_the_next_deployer(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = await pair.ready()
    for worker in pair.workers.values():
        await worker.freeze()  # They wait for an answer of the one before, which does not come.
    await pair.stop_deployer(0)
    await pair.add_deployer()

    async def untouched() -> bool:
        after = await pair.published()
        return after is not None and after.replicas == before.replicas

    await stays(untouched, 2.0)  # Twice as long as a worker may be silent.
    for worker in pair.workers.values():
        await worker.turn_to(pair.addresses[1:])
    await stays(untouched, 4.0)
    assert await pair.route() == (before.replicas[0].epoch, "READY")


async def test_devices_of_a_worker_are_one_stage_which_is_adopted(mesh: Mesh) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1", devices=2)
    await mesh.add_worker("w2", devices=2)
    await mesh.apply(stages=4)
    before = await mesh.ready()
    first, last = before.replicas[0].stages
    held = [(s.device_id, s.first_layer, s.last_layer) for s in (*first.shards, *last.shards)]
    assert held == [("w1/sim:0", 0, 1), ("w1/sim:1", 2, 3), ("w2/sim:0", 4, 4), ("w2/sim:1", 5, 5)]
    assert (first.last_layer, last.first_layer, last.stage_count) == (3, 4, 2)
    await mesh.stop_deployer(0)
    await mesh.add_deployer()
    mesh.addresses.pop(0)
    for worker in mesh.workers.values():
        worker.calls.clear()
        await worker.turn_to(mesh.addresses)

    async def untouched() -> bool:
        after = await mesh.published()
        return after is not None and after.replicas == before.replicas

    # Nothing grows either: there are as many stages as were wanted, on two workers.
    await stays(untouched, 3.5)
    assert not any(worker.calls for worker in mesh.workers.values())
    await mesh.workers["w2"].stop()
    after = await mesh.ready(above=before.replicas[0].epoch)
    (alone,) = after.replicas[0].stages
    assert [(s.device_id, s.first_layer, s.last_layer) for s in alone.shards] == [
        ("w1/sim:0", 0, 2),
        ("w1/sim:1", 3, 5),
    ]


async def test_a_restarted_deployer_forms_again_what_is_gone(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.stop_deployer(0)
    await pair.add_deployer()
    pair.addresses.pop(0)
    for worker in pair.workers.values():
        await worker.restart(pair.addresses)
    assert layers(await pair.ready(above=before)) == BOTH


async def test_a_deployer_that_stands_by_forwards_and_takes_over(mesh: Mesh) -> None:
    await mesh.add_deployer()
    await mesh.add_deployer()
    # Both workers talk to the one that stands by first.
    mesh.addresses.reverse()
    await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    await mesh.apply(stages=2)
    before = await mesh.ready()
    assert await mesh.call("Describe", deployer_pb2.DescribeRequest(), 1) is not None
    await mesh.stop_deployer(0)
    described = await mesh.call("Describe", deployer_pb2.DescribeRequest())
    assert [deployment.name for deployment in described.deployments] == [MODEL]
    mesh.workers["w1"].fail_stage(REPLICA, "CHILD_LOST")
    await mesh.ready(above=before.replicas[0].epoch)


async def test_what_redis_lost_is_asserted_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = await pair.ready()
    await pair.redis.flushall()
    assert (await pair.ready()).replicas == before.replicas
    assert await pair.redis.hexists(DESIRED, MODEL)
    pair.workers["w1"].fail_stage(REPLICA, "CHILD_LOST")
    await pair.ready(above=before.replicas[0].epoch)


async def test_a_route_that_somebody_closed_is_opened_again(pair: Mesh) -> None:
    """A deposed deployer's last word, or one of this deployer's whose reply was lost."""
    await pair.apply()
    epoch = (await pair.ready()).replicas[0].epoch
    assert await pair.queue.route(REPLICA, epoch, "FORMING")

    async def open_again() -> bool:
        return await pair.route() == (epoch, "READY")

    await eventually(open_again)


async def test_redis_may_go_away_and_come_back(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        client = connect(server.url)
        mesh = Mesh(client, server.url, write_checkpoint(tmp_path / "model", layers=6))
        try:
            await mesh.add_deployer()
            await mesh.add_worker("w1")
            await mesh.apply()
            before = await mesh.ready()
            server.kill()
            await asyncio.to_thread(server.start)
            mesh.workers["w1"].fail_stage(REPLICA, "CHILD_LOST")

            async def again() -> bool:
                with suppress(*UNREACHABLE):
                    await client.ping()
                    return True
                return False

            await eventually(again)
            await mesh.ready(above=before.replicas[0].epoch)
        finally:
            await mesh.close()
            await client.aclose()


async def test_a_deployer_that_lost_its_lease_touches_nothing(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = await pair.ready()
    owner = "uellm:deployer:owner"

    async def deposed() -> bool:
        until = (await pair.redis.time())[0] * 1000 + 5000
        other = {"holder": "x@127.0.0.1:1", "token": 99, "until": until}
        await pair.redis.hset(owner, mapping=other)
        try:
            await pair.call("Describe", deployer_pb2.DescribeRequest(), timeout=0.5)
        except UnavailableError:
            return True
        return False

    await eventually(deposed)
    pair.workers["w1"].fail_stage(REPLICA, "CHILD_LOST")

    async def untouched() -> bool:
        await deposed()
        return await pair.published() == before and (await pair.route())[1] == "READY"

    await stays(untouched, 1.5)


async def test_models_of_the_settings_are_served_from_the_start(mesh: Mesh) -> None:
    await mesh.add_deployer(models=(f"{MODEL}={mesh.source}",), stages=2, settle_seconds=5.0)
    await mesh.add_worker("w1")

    async def waits() -> bool:
        deployment = await mesh.published()
        return deployment is not None and "1 of 2 are there" in deployment.status

    await eventually(waits)
    await mesh.add_worker("w2")
    assert layers(await mesh.ready()) == BOTH


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"models": ("my model=org/tiny",)}, "'my model' is no name"),
        ({"models": ("a=org/tiny",), "adapters": ("b:c=org/c",)}, "served: a"),
        ({"models": ("a=org/tiny",), "slots": 5000}, "slots: 5000; the limit is 4096"),
    ],
)
async def test_settings_that_cannot_be_end_it_at_once(
    told: dict[str, Any], says: str, mesh: Mesh
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        await asyncio.wait_for(mesh.add_deployer(**told), HANG_SECONDS)


async def test_what_was_wanted_since_outlives_settings_that_say_the_same(
    mesh: Mesh, tmp_path: Path
) -> None:
    told = {"models": (f"{MODEL}={mesh.source}",), "slots": 4, "max_tokens": 64}

    async def restart(**changed: Any) -> None:
        await mesh.stop_deployer(len(mesh.addresses) - 1)
        await mesh.add_deployer(**(told | changed))
        await mesh.workers["w1"].turn_to(mesh.addresses[-1:])

    await mesh.add_deployer(**told)
    await mesh.add_worker("w1")
    epoch = (await mesh.ready()).replicas[0].epoch
    await mesh.apply(slots=2)
    epoch = (await mesh.ready(above=epoch)).replicas[0].epoch
    await restart()
    kept = await mesh.ready(above=epoch - 1)
    assert (kept.slots, kept.replicas[0].epoch) == (2, epoch)
    await mesh.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL), 1)
    await eventually(lambda: gone(mesh))
    await restart()
    described = await mesh.call("Describe", deployer_pb2.DescribeRequest(), 2)
    assert not described.deployments
    await restart(slots=3)
    assert (await mesh.ready()).slots == 3
