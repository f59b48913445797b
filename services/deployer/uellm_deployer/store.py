"""What the deployers keep in Redis: what is wanted, generations, what is published."""

from collections.abc import Mapping

from uellm.core.load import OfferedLoad
from uellm.service import Context
from uellm.streams.keys import Keys
from uellm.streams.queue import ModelQueue
from uellm.streams.scripts import Scripts
from uellm.v1 import deployer_pb2, queue_pb2, topology_pb2

DESIRED = "uellm:desired"
"""Hash: PlanRequest by served name."""
DECLARED = "uellm:declared"
"""Hash: PlanRequest by served name, as a deployer's settings last said."""
GENERATIONS = "uellm:generations"
"""Hash: the last generation given out, by replica. Never goes down."""


class Store:
    """The deployers' part of Redis. Every call may be repeated."""

    def __init__(self, context: Context) -> None:
        self._redis = context.redis
        self._registry = context.registry
        self._scripts = Scripts(context.redis)

    async def desired(self) -> Mapping[str, deployer_pb2.PlanRequest]:
        """What is wanted, by served name."""
        raw = await self._redis.hgetall(DESIRED)
        return {
            name.decode(): deployer_pb2.PlanRequest.FromString(value)
            for name, value in sorted(raw.items())
        }

    async def want(self, request: deployer_pb2.PlanRequest) -> None:
        """Remember what is wanted."""
        await self._redis.hset(DESIRED, request.model.name, request.SerializeToString())

    async def declare(self, request: deployer_pb2.PlanRequest) -> None:
        """Want what settings say, unless they said so before: what was wanted since then counts."""
        name, said = request.model.name, request.SerializeToString(deterministic=True)
        if await self._redis.hget(DECLARED, name) != said:
            async with self._redis.pipeline(transaction=True) as both:
                both.hset(DESIRED, name, said)
                both.hset(DECLARED, name, said)
                await both.execute()

    async def unwant(self, name: str) -> bool:
        """Forget it; False if it was not wanted."""
        return bool(await self._redis.hdel(DESIRED, name))

    async def next_generation(self, replica: str, above: int) -> int:
        """A generation that nobody was given before, above ``above``."""
        generation = int(await self._redis.hincrby(GENERATIONS, replica, 1))
        if generation <= above:
            # Redis lost what it knew, and the workers did not.
            generation = int(
                await self._redis.hincrby(GENERATIONS, replica, above + 1 - generation)
            )
        return generation

    async def published(self) -> Mapping[str, topology_pb2.Deployment]:
        """Deployments as they were last published."""
        return await self._registry.deployments()

    async def publish(self, deployment: topology_pb2.Deployment) -> None:
        """Publish a deployment."""
        await self._registry.publish(deployment)

    async def withdraw(self, name: str) -> None:
        """Withdraw a deployment."""
        await self._registry.withdraw(name)

    async def route(
        self,
        model: str,
        replica: str,
        epoch: int,
        state: str,
        report: queue_pb2.ReplicaReport | None = None,
    ) -> bool:
        """Point a replica's route to an epoch; False if a newer one is routed."""
        return await self._queue(model).route(replica, epoch, state, report)

    async def routed(self, model: str, replicas: list[str]) -> Mapping[str, tuple[int, str]]:
        """Epoch and state of those replicas that are routed to."""
        routes = await self._queue(model).routes(replicas)
        return {name: (route.epoch, route.state) for name, route in routes.items()}

    async def reports(
        self, model: str, replicas: list[str]
    ) -> Mapping[str, queue_pb2.ReplicaReport]:
        """What replicas last said of themselves."""
        routes = await self._queue(model).routes(replicas)
        return {name: route.report for name, route in routes.items()}

    async def offered(self, model: str) -> OfferedLoad | None:
        """What is asked of a model, if its scheduler says so."""
        return await self._queue(model).offered()

    async def num_running(self, model: str) -> int:
        """Requests that replicas hold."""
        return int(await self._redis.zcard(Keys(model).leases))

    def _queue(self, model: str) -> ModelQueue:
        return ModelQueue(self._redis, model, self._scripts)
