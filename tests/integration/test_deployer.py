"""The real deployer with a real Redis and workers that obey the protocol over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from uellm_deployer import reconcile
from uellm_deployer.app import start
from uellm_deployer.settings import DeployerSettings
from uellm_deployer.store import DESIRED
from uellm_deployer.workers import Workers

from tests.support.checkpoints import write_adapter, write_checkpoint
from tests.support.waiting import eventually, stays
from tests.support.workers import RecordingWorker
from uellm.core.errors import (
    ConfigurationError,
    FailedPreconditionError,
    InvalidArgumentError,
    ModelFilesError,
    NotFoundError,
    UellmError,
    UnavailableError,
)
from uellm.embedded import EmbeddedRedis
from uellm.rpc import channel, error_from
from uellm.streams.connection import UNREACHABLE, connect
from uellm.streams.keys import Keys
from uellm.streams.queue import ModelQueue
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, deployer_pb2, deployer_pb2_grpc, topology_pb2

READY = topology_pb2.REPLICA_STATE_READY
FAILED = topology_pb2.REPLICA_STATE_FAILED
MODEL = "org/tiny"
REPLICA = "org/tiny-0"


class Mesh:
    """Deployers and workers around one Redis."""

    def __init__(self, redis: Redis, url: str, source: Path) -> None:
        self.redis = redis
        self.registry = Registry(redis)
        self.queue = ModelQueue(redis, MODEL)
        self.source = source
        self.workers: dict[str, RecordingWorker] = {}
        self.addresses: list[str] = []
        self._url = url
        self._running: list[tuple[asyncio.Event, asyncio.Task[None]]] = []

    async def add_deployer(self, **settings: Any) -> str:
        """Run a deployer; returns its address."""
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        defaults = {"settle_seconds": 0.3, "recovery_seconds": 0.3, "worker_silence_seconds": 1.0}
        told = DeployerSettings(
            redis_url=self._url,
            host="127.0.0.1",
            service_id=f"deployer-{len(self._running)}",
            **(defaults | settings),
        )
        task = asyncio.create_task(start(told, stop=stop, ready=ready.set_result))
        self._running.append((stop, task))
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        self.addresses.append(ready.result())
        return ready.result()

    async def stop_deployer(self, index: int) -> None:
        """As by SIGTERM."""
        stop, task = self._running[index]
        stop.set()
        await task

    async def add_worker(self, name: str, **facts: Any) -> RecordingWorker:
        """Run a worker that knows the deployers there are."""
        worker = self.workers[name] = RecordingWorker(name, **facts)
        await worker.start(self.addresses)
        await eventually(lambda: self.knows(name))
        return worker

    async def knows(self, name: str) -> bool:
        described = await self.call("Describe", deployer_pb2.DescribeRequest())
        return name in [worker.worker for worker in described.workers]

    async def call(
        self, method: str, request: Any, deployer: int = 0, timeout: float = 10.0
    ) -> Any:
        """Call a deployer.

        Raises:
            UellmError: what it answered.
        """
        async with channel(self.addresses[deployer]) as way:
            stub = deployer_pb2_grpc.DeployerServiceStub(way)
            try:
                return await getattr(stub, method)(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                raise error_from(error) from None

    async def apply(self, deployer: int = 0, **wanted: Any) -> topology_pb2.Deployment:
        """Have the model served."""
        request = self.request(**wanted)
        answer = await self.call("Apply", deployer_pb2.ApplyRequest(deployment=request), deployer)
        return answer.deployment

    def request(self, **wanted: Any) -> deployer_pb2.PlanRequest:
        wanted = {"slots": 4, "max_tokens": 64} | wanted
        model = common_pb2.ModelRef(name=MODEL, source=wanted.pop("source", str(self.source)))
        return deployer_pb2.PlanRequest(model=model, **wanted)

    async def published(self) -> topology_pb2.Deployment | None:
        return (await self.registry.deployments()).get(MODEL)

    async def ready(self, above: int = 0, replicas: int = 1) -> topology_pb2.Deployment:
        """Wait until all replicas are routed to, at generations above one."""

        async def check() -> topology_pb2.Deployment | None:
            found = await self.published()
            if found is None or len(found.replicas) != replicas:
                return None
            routes = await self.queue.routes([replica.id for replica in found.replicas])
            good = all(
                replica.state == READY
                and replica.epoch > above
                and replica.id in routes
                and routes[replica.id].epoch == replica.epoch
                and routes[replica.id].state == "READY"
                for replica in found.replicas
            )
            return found if good else None

        return await eventually(check)

    async def route(self) -> tuple[int, str]:
        route = (await self.queue.routes([REPLICA])).get(REPLICA)
        return (route.epoch, route.state) if route else (0, "")

    async def close(self) -> None:
        for worker in self.workers.values():
            await worker.stop()
        for stop, task in self._running:
            stop.set()
            with suppress(Exception):
                await task


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


def layers(deployment: topology_pb2.Deployment, replica: int = 0) -> list[tuple[str, int, int]]:
    return [
        (stage.device_ids[0], stage.first_layer, stage.last_layer)
        for stage in deployment.replicas[replica].stages
    ]


BOTH = [("w1/cpu:0", 0, 2), ("w2/cpu:0", 3, 5)]


async def test_a_model_is_placed_on_both_workers_routed_and_published(pair: Mesh) -> None:
    await pair.apply(stages=2)
    deployment = await pair.ready()
    assert layers(deployment) == BOTH
    assert (deployment.max_tokens, deployment.slots, deployment.dtype) == (64, 4, "float32")
    assert (deployment.wanted_stages, deployment.wanted_replicas) == (2, 1)
    assert len(deployment.profile.layers) == 6
    assert deployment.model.digest
    assert not deployment.status
    first, last = deployment.replicas[0].stages
    assert (first.has_embed, first.has_head, last.has_embed, last.has_head) == (1, 0, 0, 1)
    assert [peer.host for peer in first.peers] == ["127.0.0.1"] * 2
    assert first.kv_bytes == 4 * 64 * 3 * deployment.profile.layers[0].kv_bytes_per_token
    for worker in pair.workers.values():
        generation = deployment.replicas[0].epoch
        assert worker.calls == [("prepare", REPLICA, generation), ("commit", REPLICA, generation)]
    report = (await pair.queue.routes([REPLICA]))[REPLICA].report
    assert (report.slots, report.kv_tokens_total, report.epoch) == (4, 256, generation)
    assert report.prefill_seconds_per_token > 0
    assert report.decode_step_seconds > 0


async def test_a_lost_worker_is_noticed_at_once_and_its_layers_move(mesh: Mesh) -> None:
    # Its closed port tells, not its silence.
    await mesh.add_deployer(worker_silence_seconds=600.0)
    for name in ("w1", "w2"):
        await mesh.add_worker(name)
    await mesh.apply(stages=2)
    before = (await mesh.ready()).replicas[0].epoch
    await mesh.workers["w2"].stop()

    async def suspended() -> bool:
        return await mesh.route() == (before, "FORMING")

    await eventually(suspended)
    deployment = await mesh.ready(above=before)
    assert layers(deployment) == [("w1/cpu:0", 0, 5)]
    assert "1 stage(s) instead of 2" in deployment.status


async def test_signs_of_life_without_news_cost_nothing(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = beats = 0
    decide, hear = reconcile.decide, Workers.hear

    def counted_decide(*told: Any) -> Any:
        nonlocal looks
        looks += 1
        return decide(*told)

    def counted_hear(workers: Workers, *told: Any) -> bool:
        nonlocal beats
        beats += 1
        return hear(workers, *told)

    await mesh.add_deployer()
    for number in range(8):
        await mesh.add_worker(f"w{number}")
    await mesh.apply()
    await mesh.ready()
    monkeypatch.setattr(reconcile, "decide", counted_decide)
    monkeypatch.setattr(Workers, "hear", counted_hear)
    await eventually(lambda: beats >= 80)
    assert looks < beats / 2


async def test_a_worker_that_stops_giving_signs_of_life_is_replaced(mesh: Mesh) -> None:
    # Long enough for a busy machine not to silence those that are well.
    await mesh.add_deployer(worker_silence_seconds=4.0)
    for name in ("w1", "w2", "w3"):
        await mesh.add_worker(name)
    await mesh.apply(stages=2)
    before = (await mesh.ready()).replicas[0].epoch
    await mesh.workers["w1"].freeze()
    deployment = await mesh.ready(above=before)
    assert layers(deployment) == [("w3/cpu:0", 0, 2), ("w2/cpu:0", 3, 5)]


async def test_a_lost_child_is_replaced_where_it_was(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    pair.workers["w2"].fail_stage(REPLICA, "CHILD_LOST: it was killed")
    deployment = await pair.ready(above=before)
    assert layers(deployment) == BOTH
    assert ("release", REPLICA, before) not in pair.workers["w1"].calls


async def test_a_restarted_worker_is_used_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.workers["w2"].restart(pair.addresses)
    assert layers(await pair.ready(above=before)) == BOTH


async def test_a_worker_that_is_going_is_left_and_released(pair: Mesh) -> None:
    await pair.apply()
    deployment = await pair.ready()
    epoch = deployment.replicas[0].epoch
    (first,) = layers(deployment)
    going = pair.workers[first[0].partition("/")[0]]
    going.going = True
    after = await pair.ready(above=epoch)
    assert layers(after)[0][0] != first[0]
    assert ("release", REPLICA, epoch) in going.calls


async def test_a_device_that_its_driver_lost_is_done_without(mesh: Mesh) -> None:
    await mesh.add_deployer()
    worker = await mesh.add_worker("w1", devices=2)
    await mesh.apply(stages=2)
    before = (await mesh.ready()).replicas[0]
    worker.lost = {"w1/sim:1"}
    after = (await mesh.ready(above=before.epoch)).replicas[0]
    assert [stage.device_id for stage in after.planned.stages] == ["w1/sim:0"]


async def test_what_serves_stays_where_a_driver_does_not_answer(pair: Mesh) -> None:
    """NVML fails in containers after a reload of the host's units; CUDA goes on."""
    await pair.apply(stages=2)
    before = await pair.ready()
    for worker in pair.workers.values():
        worker.healthy = False

    async def told() -> bool:
        there = (await pair.call("Describe", deployer_pb2.DescribeRequest())).workers
        return not any(device.healthy for worker in there for device in worker.devices)

    await eventually(told)

    async def untouched() -> bool:
        after = await pair.published()
        return after is not None and after.replicas == before.replicas

    await stays(untouched, 1.0)
    assert await pair.route() == (before.replicas[0].epoch, "READY")


async def test_a_replica_with_too_few_stages_grows_when_nothing_runs(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.workers["w2"].stop()
    small = (await pair.ready(above=before)).replicas[0].epoch
    await pair.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    await pair.workers["w2"].restart(pair.addresses)
    await eventually(lambda: pair.knows("w2"))
    assert (await pair.ready()).replicas[0].epoch == small
    await pair.redis.delete(Keys(MODEL).leases)
    assert layers(await pair.ready(above=small)) == BOTH


async def test_what_a_worker_says_is_shown_and_forming_is_tried_again(pair: Mesh) -> None:
    broken = pair.workers["w2"]
    broken.fail_prepare = [FailedPreconditionError("out of memory: 3 GiB are missing")]
    await pair.apply(stages=2)

    async def status() -> str:
        deployment = await pair.published()
        return deployment.status if deployment and "out of memory" in deployment.status else ""

    assert "worker w2: out of memory: 3 GiB are missing; next try in 0.5 s" in await eventually(
        status
    )
    deployment = await pair.ready()
    assert layers(deployment) == BOTH
    assert not deployment.status
    # What the other one had prepared was let go before it was asked again.
    calls = pair.workers["w1"].calls
    assert [name for name, _, _ in calls] == ["prepare", "release", "prepare", "commit"]
    assert calls[2][2] > calls[1][2] == calls[0][2]


async def test_another_worker_is_preferred_to_one_that_cannot(mesh: Mesh) -> None:
    await mesh.add_deployer()
    first = await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    first.fail_prepare = [ModelFilesError("no directory /models/tiny")]
    await mesh.apply()
    assert layers(await mesh.ready()) == [("w2/cpu:0", 0, 5)]


async def test_a_worker_lost_while_it_loads_is_done_without(pair: Mesh) -> None:
    slow = pair.workers["w2"]
    slow.hold_prepare.clear()
    await pair.apply(stages=2)
    await eventually(lambda: ("prepare", REPLICA, 1) in slow.calls)
    await slow.stop()
    deployment = await pair.ready()
    assert layers(deployment) == [("w1/cpu:0", 0, 5)]


async def test_a_place_may_be_looked_for_as_long_as_it_takes(pair: Mesh) -> None:
    stays_there, goes = pair.workers["w1"], pair.workers["w2"]
    stays_there.files.share = 0.5
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    stays_there.files.hold.clear()  # Asked before every plan; waited for longer than a round.
    await goes.stop()
    deployment = await pair.ready(above=before)
    assert layers(deployment) == [("w1/cpu:0", 0, 5)]


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


async def test_replicas_go_to_different_workers_and_more_or_fewer_may_be_wanted(
    pair: Mesh,
) -> None:
    await pair.apply(replicas=2)
    deployment = await pair.ready(replicas=2)
    assert {layers(deployment, i)[0][0] for i in range(2)} == {"w1/cpu:0", "w2/cpu:0"}
    epochs = {replica.id: replica.epoch for replica in deployment.replicas}
    await pair.apply(replicas=1)
    left = await pair.ready(replicas=1)
    assert {replica.id: replica.epoch for replica in left.replicas} == {REPLICA: epochs[REPLICA]}
    released = [call for worker in pair.workers.values() for call in worker.calls]
    assert ("release", "org/tiny-1", epochs["org/tiny-1"]) in released


async def test_a_copy_that_is_not_wanted_any_more_is_not_loaded_to_its_end(pair: Mesh) -> None:
    await pair.apply()
    first = (await pair.ready()).replicas[0]
    (other,) = (w for w in pair.workers.values() if w.name not in first.stages[0].device_ids[0])
    other.hold_prepare.clear()
    await pair.apply(replicas=2)
    await eventually(lambda: ("prepare", "org/tiny-1", 1) in other.calls)
    await pair.apply(replicas=1)
    left = await pair.ready(replicas=1)
    assert left.replicas[0].id == REPLICA
    assert left.replicas[0].epoch == first.epoch
    await eventually(lambda: ("release", "org/tiny-1", 1) in other.calls)


async def test_what_is_wanted_otherwise_is_formed_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.apply(stages=2)
    assert (await pair.ready()).replicas[0].epoch == before
    await pair.apply(stages=2, slots=2)
    after = await pair.ready(above=before)
    assert after.slots == 2


async def test_adapters_are_pushed_with_the_model_and_changes_form_it_again(
    pair: Mesh, tmp_path: Path
) -> None:
    plain, adapted = (
        common_pb2.ModelRef(name=name, source=str(write_adapter(tmp_path / name, layers=6)))
        for name in ("plain", "adapted")
    )
    await pair.apply(stages=2, adapters=[plain, adapted])
    deployment = await pair.ready()
    assert [(a.name, a.source) for a in deployment.adapters] == [
        ("adapted", adapted.source),
        ("plain", plain.source),
    ]
    for worker in pair.workers.values():
        pushed = worker.assignments[REPLICA]
        assert list(pushed.adapters) == list(deployment.adapters)
        assert all(adapter.digest for adapter in pushed.adapters)
    before = deployment.replicas[0].epoch
    await pair.apply(stages=2, adapters=[adapted, plain])
    assert (await pair.ready()).replicas[0].epoch == before
    await pair.apply(stages=2, adapters=[plain])
    after = await pair.ready(above=before)
    assert [adapter.name for adapter in after.adapters] == ["plain"]
    bare = common_pb2.ModelRef(name="bare", source=str(tmp_path))
    with pytest.raises(FailedPreconditionError, match=r"adapter 'bare'.*adapter_config\.json"):
        await pair.apply(stages=2, adapters=[bare])
    assert (await pair.ready()).replicas[0].epoch == after.replicas[0].epoch


async def test_undeploy_waits_for_what_runs_then_lets_go(pair: Mesh) -> None:
    await pair.apply(stages=2)
    epoch = (await pair.ready()).replicas[0].epoch
    await pair.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    await pair.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))

    async def draining() -> bool:
        return await pair.route() == (epoch, "DRAINING")

    await eventually(draining)
    assert await pair.published() is not None
    assert all(worker.stages for worker in pair.workers.values())
    await pair.redis.delete(Keys(MODEL).leases)

    async def gone() -> bool:
        return await pair.published() is None

    await eventually(gone)
    assert not any(worker.stages for worker in pair.workers.values())
    assert not await pair.redis.hgetall(DESIRED)
    with pytest.raises(NotFoundError, match="is not deployed"):
        await pair.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))
    await pair.apply(stages=2)
    await pair.ready(above=epoch)


async def test_a_model_that_is_wanted_again_while_it_ends_is_formed_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    epoch = (await pair.ready()).replicas[0].epoch
    await pair.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    await pair.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))

    async def draining() -> bool:
        return await pair.route() == (epoch, "DRAINING")

    await eventually(draining)
    await pair.apply(stages=2)
    assert layers(await pair.ready(above=epoch)) == BOTH


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


async def test_a_stage_of_an_unknown_replica_is_released(pair: Mesh) -> None:
    pair.workers["w1"].assign("gone-0", 3)
    await eventually(lambda: ("release", "gone-0", 3) in pair.workers["w1"].calls)


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
        await asyncio.wait_for(mesh.add_deployer(**told), 10)


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


async def gone(mesh: Mesh) -> bool:
    return await mesh.published() is None


async def test_a_plan_changes_nothing_and_says_why_not(pair: Mesh) -> None:
    answer = await pair.call("Plan", pair.request(stages=2))
    assert [stage.device_id for stage in answer.plan.replicas[0].stages] == [
        device for device, _, _ in BOTH
    ]
    assert "layers 0 to 2 on w1/cpu:0" in answer.plan.explanation
    assert not any(worker.calls for worker in pair.workers.values())
    assert await pair.published() is None


async def test_without_room_the_deployment_fails_and_says_what_is_missing(mesh: Mesh) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1", memory_bytes=100 << 20)
    await mesh.apply()

    async def failed() -> topology_pb2.Deployment | None:
        found = await mesh.published()
        return found if found and found.replicas[0].state == FAILED else None

    deployment = await eventually(failed)
    assert "are missing" in deployment.status
    assert "one more device with" in deployment.status
    await mesh.add_worker("w2")
    assert layers(await mesh.ready()) == [("w2/cpu:0", 0, 5)]


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"source": ""}, InvalidArgumentError, r"model\.source"),
        ({"source": "/nowhere/at/all"}, FailedPreconditionError, "no directory"),
        ({"dtype": "int3"}, InvalidArgumentError, "float32, bfloat16"),
        ({"max_tokens": 4000}, InvalidArgumentError, r"max_tokens: 4000; at most 128"),
        ({"replicas": 1000}, InvalidArgumentError, "the limit is 64"),
    ],
)
async def test_bad_requests_are_refused_by_field(
    mesh: Mesh, change: dict[str, Any], error: type[UellmError], word: str
) -> None:
    await mesh.add_deployer()
    for method, request in (
        ("Plan", mesh.request(**change)),
        ("Apply", deployer_pb2.ApplyRequest(deployment=mesh.request(**change))),
    ):
        with pytest.raises(error, match=word):
            await mesh.call(method, request)
    assert await mesh.published() is None


async def test_an_older_start_of_a_worker_is_refused(pair: Mesh) -> None:
    worker = pair.workers["w1"]
    request = deployer_pb2.RegisterWorkerRequest(
        worker="w1", address="127.0.0.1:1", incarnation=worker.incarnation - 1
    )
    with pytest.raises(UellmError, match="a newer start of worker w1"):
        await pair.call("RegisterWorker", request)


async def test_changes_are_watched(pair: Mesh) -> None:
    async with channel(pair.addresses[0]) as way:
        stub = deployer_pb2_grpc.DeployerServiceStub(way)
        watch = stub.WatchDeployments(deployer_pb2.WatchDeploymentsRequest())
        await pair.apply(stages=2)
        async for answer in watch:
            states = [replica.state for d in answer.deployments for replica in d.replicas]
            if states == [READY]:
                break
        else:
            pytest.fail("the watch ended before the deployment was ready")
        watch.cancel()
