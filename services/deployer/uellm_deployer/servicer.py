"""DeployerService: between its messages and the deployer that acts."""

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from uellm.convert import duration, timestamp
from uellm.core.errors import InvalidArgumentError
from uellm.v1 import deployer_pb2, deployer_pb2_grpc
from uellm_deployer.deployer import Deployer
from uellm_deployer.forwarding import Forwarding
from uellm_deployer.workers import Worker

HEARTBEAT_SECONDS = 1.0
SURVEY_SECONDS = 2.0
PROBE_SECONDS = 60.0

Call = grpc.aio.ServicerContext[Any, Any]


class DeployerServicer(deployer_pb2_grpc.DeployerServiceServicer):
    """See protos/uellm/v1/deployer.proto."""

    def __init__(self, deployer: Deployer, forwarding: Forwarding) -> None:
        self._deployer = deployer
        self._forwarding = forwarding

    async def RegisterWorker(
        self, request: deployer_pb2.RegisterWorkerRequest, context: Call
    ) -> deployer_pb2.RegisterWorkerResponse:
        """Take note of a worker."""
        for name, value in (("worker", request.worker), ("address", request.address)):
            if not value:
                raise InvalidArgumentError(f"{name} is empty; a worker names itself", field=name)
        answer = await self._forwarding.unary("RegisterWorker", request, context)
        if answer is None:
            self._deployer.register(request)
            answer = deployer_pb2.RegisterWorkerResponse(
                heartbeat_interval=duration(HEARTBEAT_SECONDS)
            )
        return answer  # type: ignore[no-any-return]

    async def Heartbeat(
        self, request: deployer_pb2.HeartbeatRequest, context: Call
    ) -> deployer_pb2.HeartbeatResponse:
        """Take note of a sign of life."""
        answer = await self._forwarding.unary("Heartbeat", request, context)
        if answer is None:
            known = self._deployer.hear(request)
            answer = deployer_pb2.HeartbeatResponse(unknown=not known)
        return answer  # type: ignore[no-any-return]

    async def Plan(
        self, request: deployer_pb2.PlanRequest, context: Call
    ) -> deployer_pb2.PlanResponse:
        """Say where a model would go."""
        answer = await self._forwarding.unary("Plan", request, context)
        if answer is None:
            answer = deployer_pb2.PlanResponse(plan=await self._deployer.plan(request))
        return answer  # type: ignore[no-any-return]

    async def Apply(
        self, request: deployer_pb2.ApplyRequest, context: Call
    ) -> deployer_pb2.ApplyResponse:
        """Have a model served from now on."""
        answer = await self._forwarding.unary("Apply", request, context)
        if answer is None:
            deployment = await self._deployer.apply(request.deployment)
            answer = deployer_pb2.ApplyResponse(deployment=deployment)
        return answer  # type: ignore[no-any-return]

    async def Undeploy(
        self, request: deployer_pb2.UndeployRequest, context: Call
    ) -> deployer_pb2.UndeployResponse:
        """Stop serving a model."""
        answer = await self._forwarding.unary("Undeploy", request, context)
        if answer is None:
            await self._deployer.undeploy(request.name)
            answer = deployer_pb2.UndeployResponse()
        return answer  # type: ignore[no-any-return]

    async def Approve(
        self, request: deployer_pb2.ApproveRequest, context: Call
    ) -> deployer_pb2.ApproveResponse:
        """Carry out what is proposed."""
        answer = await self._forwarding.unary("Approve", request, context)
        if answer is None:
            deployment = await self._deployer.approve(request.name)
            answer = deployer_pb2.ApproveResponse(deployment=deployment)
        return answer  # type: ignore[no-any-return]

    async def Describe(
        self, request: deployer_pb2.DescribeRequest, context: Call
    ) -> deployer_pb2.DescribeResponse:
        """Say what is where."""
        answer = await self._forwarding.unary("Describe", request, context)
        if answer is None:
            left = context.time_remaining()
            await self._deployer.survey(SURVEY_SECONDS if left is None else left / 2)
            answer = deployer_pb2.DescribeResponse(
                deployments=self._deployer.deployments,
                workers=[_status(worker) for worker in self._deployer.workers.all],
                live=await self._deployer.live(),
                loads=self._deployer.loads,
                now=timestamp(self._deployer.now),
            )
        return answer  # type: ignore[no-any-return]

    async def GetTopology(
        self, request: deployer_pb2.GetTopologyRequest, context: Call
    ) -> deployer_pb2.GetTopologyResponse:
        """Say what there is to place on."""
        answer = await self._forwarding.unary("GetTopology", request, context)
        if answer is None:
            left = context.time_remaining()
            answer = await self._deployer.topology(request, PROBE_SECONDS if left is None else left)
        return answer  # type: ignore[no-any-return]

    async def WatchDeployments(
        self, request: deployer_pb2.WatchDeploymentsRequest, context: Call
    ) -> AsyncIterator[deployer_pb2.WatchDeploymentsResponse]:
        """Say what is where, again after every change."""
        async for answer in self._forwarding.stream("WatchDeployments", request, context):
            yield answer
        if self._deployer.acting:
            async for deployments in self._deployer.watch():
                yield deployer_pb2.WatchDeploymentsResponse(deployments=deployments)


def _status(worker: Worker) -> deployer_pb2.WorkerStatus:
    return deployer_pb2.WorkerStatus(
        worker=worker.worker,
        address=worker.address,
        devices=worker.devices,
        stages=worker.stages.values(),
        last_seen=duration(max(time.monotonic() - worker.seen_at, 0.0)),
        reachable=worker.reachable,
    )
