"""`uellm models` and `uellm health`, behind their options."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from uellm.cli import exits
from uellm.client import Client
from uellm.config import ROLES
from uellm.core.errors import UnavailableError
from uellm.mesh.readiness import placement
from uellm.rpc import channel
from uellm.streams.connection import RedisClient, check, connect
from uellm.streams.queue import ModelQueue
from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import queue_pb2, topology_pb2

PROBE_SECONDS = 2.0
_REPORTED = (
    *("running", "waiting", "slots", "kv_tokens_total", "kv_tokens_used", "kv_tokens_reserved"),
    *("kv_tokens_cached", "kv_tokens_committed", "prefix_hit_tokens", "padding_tokens"),
    *("computed_tokens", "recomputed_tokens"),
)
"""Of a replica's report, what `uellm health` shows."""


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """A registered service and what it answers when asked."""

    role: str
    id: str
    address: str
    pid: int
    status: str
    faults: Sequence[str]


async def models(servers: Sequence[str], *, as_json: bool) -> int:
    """The models being served."""
    async with Client(servers) as client:
        served = await client.models()
    if as_json:
        _print_json(
            [
                {
                    "name": model.name,
                    "max_tokens": model.max_tokens,
                    "ready_replicas": model.ready_replicas,
                    "replicas": model.replicas,
                    "has_chat_template": model.has_chat_template,
                    "source": model.ref.source,
                    "status": model.status,
                    "adapters": list(model.adapters),
                    "stored_dtype": model.stored_dtype,
                    "dtype": model.dtype,
                }
                for model in served
            ]
        )
        return exits.OK
    columns = ("model", "replicas ready", "context", "chat", "weights", "computes in", "adapters")
    table = Table(*columns, Column("source", overflow="fold"), "status", box=None)
    for model in served:
        table.add_row(
            model.name,
            f"{model.ready_replicas}/{model.replicas}",
            str(model.max_tokens),
            "yes" if model.has_chat_template else "no",
            model.stored_dtype,
            model.dtype,
            ", ".join(model.adapters) or "none",
            model.ref.source,
            model.status,
        )
    Console().print(table if served else "no model is served")
    return exits.OK


async def health(redis_url: str, *, as_json: bool) -> int:
    """Every registered service, asked; every deployment."""
    redis = connect(redis_url)
    try:
        await check(redis, redis_url)
        registry = Registry(redis)
        found = [service for role in ROLES for service in await registry.find(role)]
        services = await asyncio.gather(*map(_probe, found))
        deployments = [
            await _describe(redis, deployment)
            for deployment in (await registry.deployments()).values()
        ]
    finally:
        await redis.aclose()
    missing = [role for role in ROLES if role not in {service.role for service in services}]
    if as_json:
        _print_json(
            {
                "services": [asdict(service) for service in services],
                "missing": missing,
                "deployments": deployments,
            }
        )
    else:
        _print_health(services, missing, deployments)
    well = not missing and all(service.status == "SERVING" for service in services)
    return exits.OK if well else exits.FAILED


async def probe(address: str, *, as_json: bool) -> int:
    """One service, registered or not."""
    status = await _ask(address)
    if as_json:
        _print_json({"address": address, "status": status})
    else:
        sys.stdout.write(f"{status}\n")
    if status == grpc.StatusCode.UNAVAILABLE.name:
        raise UnavailableError(f"no service answers at {address}; start it, or correct --address")
    return exits.OK if status == "SERVING" else exits.FAILED


async def _probe(service: ServiceAddress) -> ServiceHealth:
    status = await _ask(service.address)
    return ServiceHealth(
        service.role, service.service_id, service.address, service.pid, status, service.faults
    )


async def _ask(address: str) -> str:
    async with channel(address) as connection:
        stub: Any = health_pb2_grpc.HealthStub(connection)
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
        except grpc.aio.AioRpcError as error:
            return error.code().name


def _state(replica: topology_pb2.Replica) -> str:
    return topology_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_")


async def _describe(redis: RedisClient, deployment: topology_pb2.Deployment) -> dict[str, Any]:
    """A deployment: where its replicas are, and what they last said of themselves."""
    queue = ModelQueue(redis, deployment.name)
    routes = await queue.routes(replica.id for replica in deployment.replicas)
    return {
        "name": deployment.name,
        "status": deployment.status,
        "stored_dtype": deployment.profile.stored_dtype,
        "dtype": deployment.dtype,
        "replicas": [
            {
                **asdict(placement(replica)),
                "state": _state(replica),
                "engine": _engine(routes[replica.id].report) if replica.id in routes else None,
            }
            for replica in deployment.replicas
        ],
    }


def _engine(report: queue_pb2.ReplicaReport) -> dict[str, int] | None:
    """What is held and was saved, in tokens; None before the first report."""
    if not report.kv_tokens_total:
        return None
    return {name: getattr(report, name) for name in _REPORTED}


def _print_health(
    services: Sequence[ServiceHealth],
    missing: Sequence[str],
    deployments: Sequence[dict[str, Any]],
) -> None:
    console = Console()
    table = Table("role", "id", "address", "pid", "status", box=None)
    for service in services:
        colour = "green" if service.status == "SERVING" else "red"
        table.add_row(
            service.role,
            service.id,
            service.address,
            str(service.pid),
            f"[{colour}]{service.status}",
        )
    console.print(table)
    for service in services:
        for fault in service.faults:
            console.print(f"[red]{service.id}: {escape(fault)}; its log has more", soft_wrap=True)
    for role in missing:
        console.print(f"[red]no {role}: start one with `uellm serve {role}`")
    for deployment in deployments:
        name = deployment["name"]
        for replica in deployment["replicas"]:
            where = "  ".join(replica["stages"])
            console.print(f"{name}: {replica['replica']} {replica['state']}  {where}")
            if replica["engine"] is not None:
                console.print("  " + _holds(replica["engine"]), soft_wrap=True)
        if not deployment["replicas"] or deployment["status"]:
            console.print(f"{name}: {deployment['status'] or 'no replica'}")
    if not deployments:
        console.print("no model is served")


def _holds(engine: dict[str, int]) -> str:
    # Who waits for a slot is counted with those in the engine.
    running = engine["running"] - engine["waiting"]
    return (
        f"{running} running on {engine['slots']} slots, {engine['waiting']} waiting; "
        f"KV cache of {engine['kv_tokens_total']} tokens: {engine['kv_tokens_used']} used, "
        f"{engine['kv_tokens_cached']} kept as prefixes, "
        f"which saved {engine['prefix_hit_tokens']} prompt tokens"
    )


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
