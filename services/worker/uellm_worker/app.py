"""The worker as a service: its parts, and the order in which they come and go."""

import asyncio
import os
from collections.abc import Callable

import grpc

from uellm.core.errors import ConfigurationError, InvalidArgumentError
from uellm.mesh.state import home
from uellm.models.tokenizer import Tokenizer
from uellm.policy.registry import step_policy
from uellm.service import Context, serve
from uellm.streams.decisions import DecisionLog, DecisionWriter
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.secret import mesh_secret
from uellm.v1 import (
    engine_pb2,
    files_pb2,
    files_pb2_grpc,
    topology_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from uellm_worker.agent import Agent
from uellm_worker.children import ChildSpawner
from uellm_worker.devices import Devices
from uellm_worker.files.cache import FileCache
from uellm_worker.files.fetching import Fetcher
from uellm_worker.files.host import HostFiles
from uellm_worker.files.sending import Sender
from uellm_worker.files.servicer import FilesServicer
from uellm_worker.files.supply import Supply
from uellm_worker.intake import Leadership
from uellm_worker.leader import Leader
from uellm_worker.probing import Probes
from uellm_worker.rehearsal import Rehearsal
from uellm_worker.servicer import WorkerServicer
from uellm_worker.settings import WorkerSettings
from uellm_worker.stage_child import StageChild
from uellm_worker.stages import Stages
from uellm_worker.tracing import StageFacts, stage_facts

SERVICES = (
    worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    files_pb2.DESCRIPTOR.services_by_name["FilesService"].full_name,
)
_NO_MODEL = "-"
"""Whose queues nobody has: no model is named so."""
GOING_SECONDS = 1.0
"""How long a worker that ends tries to tell the deployer."""


class WorkerApplication:
    """See ``uellm.service.Application``.

    Args:
        settings: the worker's.
        context: the service's.
    """

    service_names: tuple[str, ...] = SERVICES

    def __init__(self, settings: WorkerSettings, context: Context) -> None:
        # CUDA then numbers devices as NVML does; the children inherit it.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self._settings = settings
        self._context = context
        self._spawner = ChildSpawner(
            settings.engine,
            log_level=settings.log_level.upper(),
            instant_step_seconds=settings.instant_step_seconds,
        )
        self._devices = Devices(
            context.identity,
            settings.devices,
            settings.memory_bytes,
            settings.rack,
            settings.threads,
        )
        cache = FileCache(settings.cache_path, settings.cache_bytes)
        self._host_files = HostFiles(cache)
        supply = Supply(
            self._host_files, Fetcher(cache, self._secret), allow_download=settings.allow_download
        )
        self._stages = Stages(
            self._spawner,
            context.aside,
            supply.at_hand,
            self._lead,
            threads=settings.threads,
            data_host=settings.data_address,
            step_policy=settings.step_policy,
            execution=settings.execution,
            record_every_steps=settings.record_every_steps if settings.decisions_kept else 0,
            now=context.clock.now,
            simulate=self._devices.simulated,
        )
        self._agent = Agent(context, self._devices, self._stages)
        self._probes = Probes(
            self._spawner,
            self._devices,
            supply.shaped_like,
            threads=settings.threads,
            data_host=settings.data_address,
            busy=self._stages.busy,
            rehearsal=lambda: Rehearsal(LeaderQueue(context.redis, _NO_MODEL)),
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add WorkerService and FilesService."""
        servicer = WorkerServicer(
            self._context.identity,
            self._agent,
            self._stages,
            self._probes,
            self._settings.drain_seconds,
        )
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        sender = Sender(self._host_files, self._settings.uploads, lambda: self._stages.computing)
        files = FilesServicer(self._host_files, sender, self._secret)
        files_pb2_grpc.add_FilesServiceServicer_to_server(files, server)

    async def start(self) -> None:
        """Start the fork server, which loads its libraries meanwhile, and look for a deployer."""
        await self._spawner.start()
        self._context.spawn(self._devices.measure(home()), "speed of the CPU")
        self._context.spawn(self._offer(), "agent")

    async def _offer(self) -> None:
        """Tell the deployer once a stage can start at once: until then others are faster."""
        try:
            await self._spawner.warm()
        except ConnectionError:
            raise ConfigurationError(
                "the engine's libraries could not be loaded, see above; "
                "pip install 'uellm[worker]', or set UELLM_WORKER_ENGINE=instant",
                field="engine",
            ) from None
        await self._agent.run()

    async def drain(self) -> None:
        """Say so, then finish or hand back everything led here."""
        try:
            async with asyncio.timeout(GOING_SECONDS):
                await self._agent.going()
        except TimeoutError:
            pass
        await self._stages.drain(self._settings.drain_seconds / 2)

    async def close(self) -> None:
        """End every child."""
        await self._stages.close()
        await self._spawner.close()
        await self._agent.close()

    async def _secret(self) -> str:
        return await mesh_secret(self._context.redis)

    def _lead(
        self, assignment: topology_pb2.ShardAssignment, tokenizer: Tokenizer, child: StageChild
    ) -> Leader:
        async def stages() -> tuple[StageFacts, ...]:
            deployments = await self._context.registry.deployments()
            deployment = deployments.get(assignment.deployment, topology_pb2.Deployment())
            for replica in deployment.replicas:
                if replica.id == assignment.replica:
                    return stage_facts(replica.stages)
            return stage_facts([assignment])

        return Leader(
            LeaderQueue(
                self._context.redis,
                assignment.deployment,
                retention_seconds=self._settings.retention_seconds,
            ),
            self._context.clock,
            tokenizer,
            Leadership(assignment.replica, assignment.generation, assignment.stage_count, stages),
            child.send,
            policy=engine_pb2.EnginePolicy(
                policy=self._settings.step_policy, execution=self._settings.execution
            ),
            lease_seconds=self._settings.lease_seconds,
            append_interval_seconds=self._settings.append_interval_seconds,
            decisions=DecisionWriter(
                DecisionLog(self._context.redis, assignment.deployment),
                self._settings.decisions_kept,
            ),
        )


async def start(
    settings: WorkerSettings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run a worker until a signal, ``stop`` or a failure of its own.

    Raises:
        ConfigurationError: if it cannot start as it was told to.
    """
    try:
        step_policy(settings.step_policy)
    except InvalidArgumentError as error:
        raise ConfigurationError(
            f"UELLM_WORKER_STEP_POLICY: {error.message}", field="step_policy"
        ) from None
    await serve(
        settings, lambda context: WorkerApplication(settings, context), stop=stop, ready=ready
    )
