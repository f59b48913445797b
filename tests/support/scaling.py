"""A deployer with the objective goodput, and the load of its models."""

from typing import Any

from tests.support.deployer import READY, MeasuredWorker, Mesh, add
from tests.support.waiting import eventually
from uellm.core.load import OfferedLoad
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2

OTHER = "org/other"


UNDER_WAY = topology_pb2.CHANGE_STATE_UNDER_WAY
AT_ONCE: dict[str, Any] = {
    "probe_seconds": 0.0,
    "replan_seconds": 0.1,
    "replan_cooldown_seconds": 0.0,
    "keep_seconds": 0.3,
}


ONE_STAGE = 420 << 20
"""Memory of a device that holds one copy, and not two."""


class Loaded(Mesh):
    """A mesh whose schedulers say what load they are told to."""

    def __init__(self, *facts: Any) -> None:
        super().__init__(*facts)
        self._rates: dict[str, float] = {}

    async def offer(self, model: str, rate: float) -> None:
        """Say from now on that so many requests come per second."""
        self._rates[model] = rate
        await self.say()

    async def say(self) -> None:
        """What schedulers say every second."""
        now = float((await self.redis.time())[0])
        for model, rate in self._rates.items():
            load = OfferedLoad(now, 30.0, rate, 0.0, 16.0, 16, 16.0, 16)
            queue = SchedulerQueue(self.redis, model)
            await queue.offer(await queue.own("scheduler", 60_000), load, 60_000)

    async def want(self, name: str, **wanted: Any) -> None:
        """Have a model served by the objective goodput, unless another one is named."""
        request = self.request(**{"objective": "goodput"} | wanted)
        request.model.CopyFrom(common_pb2.ModelRef(name=name, source=str(self.source)))
        await self.call("Apply", deployer_pb2.ApplyRequest(deployment=request))

    async def serving(self, name: str, copies: int) -> topology_pb2.Deployment | None:
        """A deployment once so many copies serve, nothing else is there and no change is left."""
        await self.say()
        found = (await self.registry.deployments()).get(name)
        if found is None or UNDER_WAY in [change.state for change in found.changes]:
            return None
        states = [replica.state for replica in found.replicas]
        return found if states == [READY] * copies else None

    async def until(self, name: str, copies: int) -> topology_pb2.Deployment:
        return await eventually(lambda: self.serving(name, copies))

    async def does(self, name: str) -> float:
        """Requests per second that its copies do."""
        await self.say()
        answer = await self.call("Describe", deployer_pb2.DescribeRequest())
        found = [load for load in answer.loads if load.name == name]
        return float(found[0].capacity_requests_per_second) if found else 0.0


async def workers(mesh: Loaded, count: int) -> list[MeasuredWorker]:
    found = [MeasuredWorker(f"w{n}", "cpu", memory_bytes=ONE_STAGE) for n in range(count)]
    await add(mesh, *found)
    return found
