"""Who is there: services by role, under a lease, and the deployments they serve.

This is the mesh's only discovery. An address that is not renewed is gone after its lease.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from uellm.streams.connection import RedisClient
from uellm.streams.keys import DEPLOYMENTS, SERVICES
from uellm.v1 import topology_pb2

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
    """

    role: str
    service_id: str
    address: str
    pid: int


class Registry:
    """The registry of one mesh."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def register(self, service: ServiceAddress, lease_seconds: float = LEASE_SECONDS) -> None:
        """Register a service, or renew its registration."""
        facts = json.dumps({"address": service.address, "pid": service.pid})
        key = _key(service.role)
        seconds, microseconds = await self._redis.time()
        async with self._redis.pipeline(transaction=True) as pipeline:
            expires = seconds + microseconds / 1e6 + lease_seconds
            pipeline.zadd(f"{key}:leases", {service.service_id: expires})
            pipeline.hset(key, service.service_id, facts)
            await pipeline.execute()

    async def unregister(self, role: str, service_id: str) -> None:
        """Remove a service that is going away."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.zrem(f"{_key(role)}:leases", service_id)
            pipeline.hdel(_key(role), service_id)
            await pipeline.execute()

    async def find(self, role: str) -> list[ServiceAddress]:
        """The live services of a role, by id."""
        key = _key(role)
        seconds, microseconds = await self._redis.time()
        now = seconds + microseconds / 1e6
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.zrangebyscore(f"{key}:leases", now, "+inf")
            pipeline.zrangebyscore(f"{key}:leases", "-inf", now - 60)
            pipeline.hgetall(key)
            live, forgotten, facts = await pipeline.execute()
        if forgotten:
            async with self._redis.pipeline(transaction=True) as pipeline:
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
        await self._redis.hset(DEPLOYMENTS, deployment.name, deployment.SerializeToString())

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


def _key(role: str) -> str:
    return f"{SERVICES}:{role}"


def _parse(role: str, service_id: bytes, facts: bytes) -> ServiceAddress:
    parsed = json.loads(facts)
    return ServiceAddress(role, service_id.decode(), parsed["address"], parsed["pid"])
