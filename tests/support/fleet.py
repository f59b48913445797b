"""A mesh of separate processes, each started alone with only an address of Redis, to be killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.waiting import HANG_SECONDS, eventually
from uellm.embedded import EmbeddedRedis
from uellm.rpc import channel
from uellm.streams.connection import connect
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, deployer_pb2, deployer_pb2_grpc, topology_pb2

START_SECONDS = 240.0
"""Each of several processes imports torch, on whatever the machine has left."""


@dataclass
class Service:
    """One service in a process of its own."""

    service_id: str
    role: str
    directory: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it, as a container or a unit would."""
        log = (self.directory / f"{self.service_id}.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).parent / "uellm"), "serve", self.role],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.service_id} was never started"
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and reap."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(HANG_SECONDS)

    def stop(self) -> None:
        """SIGTERM; SIGKILL to its whole session if that is not enough."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(HANG_SECONDS)


class Fleet:
    """Services around one Redis."""

    def __init__(self, directory: Path, redis: EmbeddedRedis) -> None:
        self.directory = directory
        self.redis = redis
        self.services: dict[str, Service] = {}

    def add(self, role: str, number: int, **settings: str) -> Service:
        """Start a service; ``settings`` are its own, without their prefix."""
        service_id = f"{role}-{number}"
        prefix = f"UELLM_{role.upper()}_"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("UELLM_")},
            "UELLM_REDIS_URL": self.redis.url,
            "UELLM_HOST": "127.0.0.1",
            f"{prefix}SERVICE_ID": service_id,
            **{f"{prefix}{name.upper()}": value for name, value in settings.items()},
        }
        service = Service(service_id, role, self.directory, environment)
        service.start()
        self.services[service_id] = service
        return service

    async def addresses(self, role: str, count: int) -> list[str]:
        """The addresses of a role's services, once ``count`` of them are SERVING."""
        redis = connect(self.redis.url)
        try:
            registry = Registry(redis)

            async def serving() -> list[str]:
                pids = {service.pid for service in self.services.values() if service.role == role}
                found = [s.address for s in await registry.find(role) if s.pid in pids]
                self.check_alive()
                return found if len(found) >= count else []

            return await eventually(serving, timeout=START_SECONDS, interval=0.05)
        finally:
            await redis.aclose()

    def check_alive(self) -> None:
        """Fail with the end of its log if a service has ended by itself."""
        for service in self.services.values():
            code = service.process.poll() if service.process else None
            if code is not None and code >= 0:
                raise RuntimeError(f"{service.service_id} ended with {code}: {self.log(service)}")

    def log(self, service: Service) -> str:
        """The end of a service's log."""
        return (self.directory / f"{service.service_id}.log").read_text()[-2000:]

    async def deploy(
        self,
        name: str,
        source: Path,
        *,
        stages: int,
        slots: int = 4,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """Have a model served, and wait until it is."""
        (deployer, *_) = await self.addresses("deployer", 1)
        async with channel(deployer) as connection:
            stub = deployer_pb2_grpc.DeployerServiceStub(connection)

            async def workers_there() -> bool:
                described = await stub.Describe(
                    deployer_pb2.DescribeRequest(), timeout=HANG_SECONDS
                )
                return len(described.workers) >= stages

            await eventually(workers_there, timeout=START_SECONDS, interval=0.05)
            request = deployer_pb2.PlanRequest(
                model=common_pb2.ModelRef(name=name, source=str(source)),
                stages=stages,
                slots=slots,
                adapters=[
                    common_pb2.ModelRef(name=adapter, source=str(directory))
                    for adapter, directory in (adapters or {}).items()
                ],
            )
            await stub.Apply(deployer_pb2.ApplyRequest(deployment=request), timeout=HANG_SECONDS)
        await self.wait_ready(name)

    async def describe(self) -> deployer_pb2.DescribeResponse:
        """What is where, as the deployer says."""
        (deployer, *_) = await self.addresses("deployer", 1)
        async with channel(deployer) as connection:
            stub = deployer_pb2_grpc.DeployerServiceStub(connection)
            described: deployer_pb2.DescribeResponse = await stub.Describe(
                deployer_pb2.DescribeRequest(), timeout=HANG_SECONDS
            )
            return described

    async def wait_ready(self, name: str) -> topology_pb2.Deployment:
        """Wait until every replica of a model takes requests."""

        async def ready() -> topology_pb2.Deployment | None:
            for deployment in (await self.describe()).deployments:
                states = {replica.state for replica in deployment.replicas}
                if deployment.name == name and states == {topology_pb2.REPLICA_STATE_READY}:
                    return deployment
            return None

        return await eventually(ready, timeout=START_SECONDS, interval=0.05)

    async def stage_pids(self, name: str) -> dict[int, int]:
        """Process ids of the children that hold a model's stages, by stage index."""
        described = await self.describe()
        (deployment,) = (d for d in described.deployments if d.name == name)
        replicas = {replica.id for replica in deployment.replicas}
        return {
            stage.stage_index: stage.pid
            for worker in described.workers
            for stage in worker.stages
            if stage.replica in replicas and stage.state == deployer_pb2.STAGE_STATE_SERVING
        }

    def stop(self) -> None:
        """Stop everything: gateways first, the deployer last."""
        for role in ("gateway", "scheduler", "profiler", "worker", "deployer"):
            leaving = [s for s in self.services.values() if s.role == role]
            for service in leaving:
                if service.process is not None and service.process.poll() is None:
                    service.process.terminate()
            for service in leaving:
                service.stop()


@contextmanager
def fleet(directory: Path) -> Iterator[Fleet]:
    """An empty fleet with a Redis of its own; everything is gone afterwards."""
    with EmbeddedRedis(directory / "redis") as redis:
        mesh = Fleet(directory, redis)
        try:
            yield mesh
        finally:
            mesh.stop()


MODEL = "demo"


async def status(mesh: Fleet, model: str = MODEL) -> dict[str, Any]:
    """What `uellm status` says of a model."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "uellm"),
        *("status", model, "--json", "--redis", mesh.redis.url),
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("UELLM_")},
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    (deployment,) = json.loads(said)["deployments"]
    return dict(deployment)
