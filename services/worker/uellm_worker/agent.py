"""The worker's side of the deployer: registers, then gives signs of life."""

import asyncio
import contextlib

import grpc
from redis.exceptions import RedisError

from uellm import rpc
from uellm.addresses import host_of
from uellm.convert import duration_seconds
from uellm.logs import logger
from uellm.service import Context
from uellm.streams.connection import UNREACHABLE
from uellm.streams.registry import ServiceAddress
from uellm.v1 import deployer_pb2, deployer_pb2_grpc, topology_pb2
from uellm_worker.devices import Devices, resident_bytes
from uellm_worker.stages import Stages

_log = logger("agent")
HEARTBEAT_SECONDS = 1.0
"""Until a deployer says otherwise."""
CALL_SECONDS = 3.0


class Agent:
    """Keeps one deployer informed of this worker.

    Args:
        context: the service's.
        devices: what the worker has.
        stages: what it holds.

    Attributes:
        incarnation: rises with every start of the worker.
    """

    def __init__(self, context: Context, devices: Devices, stages: Stages) -> None:
        self._context = context
        self._devices = devices
        self._stages = stages
        # By Redis TIME: the host's clock may have gone back since the start before.
        self.incarnation = round(context.clock.now() * 1e9)
        self._deployer: ServiceAddress | None = None
        self._channel: grpc.aio.Channel | None = None
        self._registered = False
        self._interval = HEARTBEAT_SECONDS
        self._going = False
        self._away = False
        self._beating = asyncio.Lock()

    async def run(self) -> None:
        """Register and give signs of life for ever; at once when a stage changes."""
        await self._context.repeat(self._turn, "agent")

    async def _turn(self) -> None:
        changed = self._stages.changed
        changed.clear()
        await self.beat()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval):
                await changed.wait()

    async def beat(self) -> None:
        """One sign of life, after a registration where one is due."""
        async with self._beating:
            await self._find()
            await self._say()

    async def _say(self) -> None:
        if self._channel is None:
            return
        stub = deployer_pb2_grpc.DeployerServiceStub(self._channel)
        try:
            if not self._registered:
                await self._register(stub)
            reply = await stub.Heartbeat(self._heartbeat(), timeout=CALL_SECONDS)
            if reply.unknown:
                await self._register(stub)
                await stub.Heartbeat(self._heartbeat(), timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._registered = False
            if not self._away:
                _log.warning(
                    "the deployer takes no sign of life; trying on",
                    address=self._deployer.address if self._deployer else "",
                    code=error.code().name,
                    error=error.details(),
                )
            self._away = True
        else:
            self._away = False

    async def going(self) -> None:
        """Say that nothing more may be placed here."""
        self._going = True
        await self.beat()

    def devices(self) -> list[topology_pb2.Device]:
        """The devices as they are now."""
        used = sum(status.resident_bytes for status in self.statuses())
        held = self._stages.held_bytes()
        return self._devices.describe(used, held, healthy=not self._going)

    def statuses(self) -> list[deployer_pb2.StageStatus]:
        """The stages as they are now."""
        return [stage.status(resident_bytes) for stage in self._stages.held]

    async def close(self) -> None:
        """Let go of the deployer."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _find(self) -> None:
        """Stay with the deployer that is known while it answers, else take the next."""
        try:
            found = await self._context.registry.find("deployer")
            workers = await self._context.registry.find("worker")
        except (*UNREACHABLE, RedisError):
            return  # The one that is known may still be reached.
        host = host_of(self._context.address)
        self._devices.sharers = max(sum(host_of(w.address) == host for w in workers), 1)
        if not found:
            return
        starts = [(each.service_id, each.address, each.pid) for each in found]
        known, chosen = self._deployer, found[0]
        if known is not None and (start := (known.service_id, known.address, known.pid)) in starts:
            if not self._away or len(found) == 1:
                return
            # Killed or stopped, it stays registered for a while, and another one acts by then.
            chosen = found[(starts.index(start) + 1) % len(found)]
        await self.close()
        self._deployer, self._registered = chosen, False
        self._channel = rpc.channel(chosen.address)

    async def _register(self, stub: "deployer_pb2_grpc.DeployerServiceAsyncStub") -> None:
        request = deployer_pb2.RegisterWorkerRequest(
            worker=self._context.identity,
            address=self._context.address,
            devices=self.devices(),
            incarnation=self.incarnation,
            links=self._devices.links,
        )
        reply = await stub.RegisterWorker(request, timeout=CALL_SECONDS)
        self._interval = duration_seconds(reply.heartbeat_interval) or HEARTBEAT_SECONDS
        self._registered = True

    def _heartbeat(self) -> deployer_pb2.HeartbeatRequest:
        return deployer_pb2.HeartbeatRequest(
            worker=self._context.identity,
            incarnation=self.incarnation,
            stages=self.statuses(),
            devices=self.devices(),
            going=self._going,
        )
