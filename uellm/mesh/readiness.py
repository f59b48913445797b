"""From processes that were started to models that answer."""

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc

from uellm.client import Client
from uellm.convert import device_shards
from uellm.core.errors import ConfigurationError, UnavailableError
from uellm.mesh.options import MeshOptions
from uellm.mesh.supervision import Supervised
from uellm.rpc import CALL_SECONDS, channel, error_from
from uellm.streams.registry import Registry
from uellm.v1 import deployer_pb2, deployer_pb2_grpc, topology_pb2

START_SECONDS = 120.0
LIBRARIES_SECONDS = 600.0
"""Longest time until workers that run have loaded what computes models: seconds, but minutes from a
slow disk or beside other work. One that fails at it is not waited for."""
_POLL_SECONDS = 0.1

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Placement:
    """Which layers of a replica are where.

    Attributes:
        replica: its id.
        epoch: its generation.
        stages: in order, each as ``worker:first-last``; of a worker that spreads its stage over
            devices, each of those as ``worker/device:first-last``.
    """

    replica: str
    epoch: int
    stages: tuple[str, ...]


def placement(replica: topology_pb2.Replica) -> Placement:
    """The placement of a replica as the deployer publishes it."""
    stages = sorted(replica.stages, key=lambda stage: stage.stage_index)
    workers = {peer.stage: peer.worker for stage in stages for peer in stage.peers}
    found = []
    for stage in stages:
        parts = device_shards(stage)
        for part in parts:
            where = part.device_id if len(parts) > 1 else workers.get(stage.stage_index, "?")
            found.append(f"{where}:{part.first_layer}-{part.last_layer}")
    return Placement(replica.id, replica.epoch, tuple(found))


async def wait_for_services(
    registry: Registry, services: Collection[Supervised], report: Report
) -> None:
    """Wait until every service is SERVING, which is when it registers.

    Raises:
        UnavailableError: naming those that are not, after START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    told = ""
    while True:
        roles = {service.spec.role for service in services}
        serving = {found.pid for role in roles for found in await registry.find(role)}
        waiting = [s.spec.service_id for s in services if s.pid not in serving]
        if not waiting:
            return
        if (words := f"starting {', '.join(waiting)}") != told:
            report(told := words)
        if time.monotonic() > deadline:
            raise UnavailableError(f"not started within {START_SECONDS:.0f} s: {waiting}")
        await asyncio.sleep(_POLL_SECONDS)


def patience(workers: Collection[Supervised]) -> float:
    """Seconds that workers are waited for until they have loaded their libraries.

    One that ended meanwhile may do so for ever: that is no reason to wait for longer.
    """
    return START_SECONDS if any(worker.restarts for worker in workers) else LIBRARIES_SECONDS


async def deploy(
    registry: Registry, options: MeshOptions, services: Collection[Supervised], report: Report
) -> None:
    """Have the deployer place all models, and wait until each takes requests.

    Raises:
        UellmError: why a model cannot be placed or loaded.
    """
    (deployer, *_) = await registry.find("deployer")
    async with channel(deployer.address) as connection:
        stub: Any = deployer_pb2_grpc.DeployerServiceStub(connection)
        try:
            await _wait_for_workers(stub, options, services, report)
            for model in options.models:
                report(f"placing {model.name}")
                request = deployer_pb2.ApplyRequest(deployment=options.plan_request(model))
                await stub.Apply(request, timeout=4 * CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None
    for model in options.models:
        await _wait_for_model(registry, model.name, report, patient=options.listens)


def _check_stages(options: MeshOptions, devices: int) -> None:
    """The deployer would wait for more devices, and none are going to come."""
    if options.stages > devices and not options.listens:
        raise ConfigurationError(
            f"--stages: {options.stages}, each on a device of its own, and the {options.workers} "
            f"worker(s) have {devices}; start more with --workers, or ask for at most {devices}",
            field="stages",
        )


async def _wait_for_workers(
    stub: Any, options: MeshOptions, services: Collection[Supervised], report: Report
) -> None:
    began, told = time.monotonic(), ""
    workers = [service for service in services if service.spec.role == "worker"]
    while True:
        words = "waiting for the workers to report their devices, once they have loaded their "
        words += "libraries" + "".join(f"; {ended}" for w in workers if (ended := w.ended))
        if words != told:
            report(told := words)
        described = await stub.Describe(deployer_pb2.DescribeRequest(), timeout=CALL_SECONDS)
        if len(described.workers) >= options.workers:
            _check_stages(options, sum(len(worker.devices) for worker in described.workers))
            return
        if time.monotonic() - began > (most := patience(workers)):
            raise UnavailableError(
                f"{options.workers} workers were started, and {len(described.workers)} have "
                f"reported to the deployer within {most:.0f} s; "
                f"{'; '.join(filter(None, (w.ended for w in workers))) or 'none has ended'}; their "
                "logs say what they are at"
            )
        await asyncio.sleep(_POLL_SECONDS)


async def _wait_for_model(registry: Registry, name: str, report: Report, *, patient: bool) -> None:
    """No deadline: a large model loads for as long as it loads, and says how far it is.

    Args:
        registry: of the mesh.
        name: of the model.
        report: told what is being waited for.
        patient: devices may come that it fits on.
    """
    told = ""
    while True:
        deployment = (await registry.deployments()).get(name)
        if deployment is not None:
            states = [replica.state for replica in deployment.replicas]
            if states and all(state == topology_pb2.REPLICA_STATE_READY for state in states):
                return
            if topology_pb2.REPLICA_STATE_FAILED in states and not patient:
                # The deployer would go on trying, but without a mesh there is no next time.
                why, _, _ = deployment.status.partition("; next try in ")
                raise ConfigurationError(f"{name}: {why}", field="model")
            if deployment.status and deployment.status != told:
                report(f"{name}: {(told := deployment.status)}")
        await asyncio.sleep(_POLL_SECONDS)


async def wait_for_gateway(address: str, options: MeshOptions) -> None:
    """Wait until the gateway serves every model, too: it looks around twice a second.

    Raises:
        UnavailableError: if it does not within START_SECONDS.
    """
    wanted = {model.name for model in options.models}
    deadline = time.monotonic() + START_SECONDS
    async with Client(address) as client:
        while time.monotonic() < deadline:
            if wanted <= {model.name for model in await client.models() if model.ready_replicas}:
                return
            await asyncio.sleep(_POLL_SECONDS)
    raise UnavailableError(f"the gateway at {address} does not list {sorted(wanted)}")
