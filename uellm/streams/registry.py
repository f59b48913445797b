"""Who is there: services by role, under a lease, and the deployments they serve.

This is the mesh's only discovery. An address that is not renewed is gone after its lease. What
writes here is a script, because scripts may be allowed to write when Redis is full; and nothing
is a transaction, because a full Redis refuses those, even to read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from uellm.streams.connection import RedisClient
from uellm.streams.keys import DEPLOYMENTS, SERVICES, Keys
from uellm.streams.messages import parse_policy
from uellm.streams.scripts import Scripts
from uellm.v1 import common_pb2, topology_pb2

LEASE_SECONDS = 5.0
RENEW_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """One running service.

    Attributes:
        role: gateway, profiler, scheduler, deployer or worker.
        service_id: unique among its role.
        address: host:port of its gRPC server.
        pid: its process on its host.
        faults: what fails there as nobody foresaw, for people.
        version: of uellm there; "": it does not say.
    """

    role: str
    service_id: str
    address: str
    pid: int
    faults: tuple[str, ...] = ()
    version: str = ""


class Registry:
    """The registry of one mesh."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._scripts = Scripts(redis)

    async def register(self, service: ServiceAddress, lease_seconds: float = LEASE_SECONDS) -> None:
        """Register a service, or renew its registration."""
        facts = json.dumps(
            {
                "address": service.address,
                "pid": service.pid,
                "faults": service.faults,
                "version": service.version,
            }
        )
        await self._scripts(
            "register", _key(service.role), service.service_id, facts, lease_seconds
        )

    async def unregister(self, role: str, service_id: str) -> None:
        """Remove a service that is going away."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.zrem(f"{_key(role)}:leases", service_id)
            pipeline.hdel(_key(role), service_id)
            await pipeline.execute()

    async def find(self, role: str) -> list[ServiceAddress]:
        """The live services of a role, by id."""
        key = _key(role)
        seconds, microseconds = await self._redis.time()
        now = seconds + microseconds / 1e6
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.zrangebyscore(f"{key}:leases", now, "+inf")
            pipeline.zrangebyscore(f"{key}:leases", "-inf", now - 60)
            pipeline.hgetall(key)
            live, forgotten, facts = await pipeline.execute()
        if forgotten:
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.zrem(f"{key}:leases", *forgotten)
                pipeline.hdel(key, *forgotten)
                await pipeline.execute()
        return [
            _parse(role, service_id, facts[service_id])
            for service_id in sorted(live)
            if service_id in facts
        ]

    async def publish(self, deployment: topology_pb2.Deployment) -> None:
        """Publish a deployment for gateways and schedulers to route by."""
        await self._scripts("publish", DEPLOYMENTS, deployment.name, deployment.SerializeToString())

    async def withdraw(self, name: str) -> None:
        """Remove a deployment."""
        await self._redis.hdel(DEPLOYMENTS, name)

    async def deployments(self) -> Mapping[str, topology_pb2.Deployment]:
        """All deployments, by served name."""
        raw = await self._redis.hgetall(DEPLOYMENTS)
        return {
            name.decode(): topology_pb2.Deployment.FromString(value)
            for name, value in sorted(raw.items())
        }

    async def policies(self, names: Iterable[str]) -> Mapping[str, common_pb2.ModelPolicy | None]:
        """What was chosen for models while running, by name; None: nothing was."""
        names = list(names)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.get(Keys(name).policy)
            found = await pipeline.execute() if names else []
        return {name: parse_policy(raw) for name, raw in zip(names, found, strict=True)}


def _key(role: str) -> str:
    return f"{SERVICES}:{role}"


def _parse(role: str, service_id: bytes, facts: bytes) -> ServiceAddress:
    parsed = json.loads(facts)
    return ServiceAddress(
        role,
        service_id.decode(),
        parsed["address"],
        parsed["pid"],
        tuple(parsed.get("faults", ())),
        parsed.get("version", ""),
    )
