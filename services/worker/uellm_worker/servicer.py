"""WorkerService: between messages and what the worker does."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from uellm.core.errors import InvalidArgumentError
from uellm.v1 import topology_pb2, worker_pb2, worker_pb2_grpc
from uellm_worker.agent import Agent
from uellm_worker.probing import Probes
from uellm_worker.stages import Stages

MOST_PROBE_BYTES = 32 << 20
GRACE_SHARE = 0.8
"""Of a call's remaining time, what running work is given before it is handed back."""

Call = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """See worker.proto.

    Args:
        worker: its id.
        agent: knows devices and states.
        stages: does the work.
        probes: measures.
        drain_seconds: longest time that running work is given when a stage is let go.
    """

    def __init__(
        self, worker: str, agent: Agent, stages: Stages, probes: Probes, drain_seconds: float
    ) -> None:
        self._worker = worker
        self._agent = agent
        self._stages = stages
        self._probes = probes
        self._drain_seconds = drain_seconds

    async def Prepare(
        self, request: worker_pb2.PrepareRequest, context: Call
    ) -> AsyncIterator[worker_pb2.PrepareResponse]:
        """Loads a stage."""
        del context
        _check(request.assignment)
        async for progress in self._stages.prepare(request.assignment, request.holders):
            yield progress

    async def Commit(
        self, request: worker_pb2.CommitRequest, context: Call
    ) -> worker_pb2.CommitResponse:
        """Joins the peers."""
        del context
        await self._stages.commit(
            request.replica,
            request.generation,
            request.rendezvous,
            request.cost if request.HasField("cost") else None,
        )
        return worker_pb2.CommitResponse()

    async def Release(
        self, request: worker_pb2.ReleaseRequest, context: Call
    ) -> worker_pb2.ReleaseResponse:
        """Lets a stage go."""
        grace = 0.0 if request.immediate else self._drain_seconds / 2
        remaining = context.time_remaining()
        if remaining is not None:
            grace = min(grace, GRACE_SHARE * remaining)
        await self._stages.release(request.replica, request.generation, grace)
        return worker_pb2.ReleaseResponse()

    async def Probe(
        self, request: worker_pb2.ProbeRequest, context: Call
    ) -> worker_pb2.ProbeResponse:
        """Sends the same bytes back."""
        del context
        if len(request.payload) > MOST_PROBE_BYTES:
            raise InvalidArgumentError(
                f"payload: {len(request.payload)} bytes; at most {MOST_PROBE_BYTES}",
                field="payload",
            )
        return worker_pb2.ProbeResponse(payload=request.payload)

    async def ProbeBlock(
        self, request: worker_pb2.ProbeBlockRequest, context: Call
    ) -> worker_pb2.ProbeBlockResponse:
        """Measures layers."""
        del context
        return await self._probes.block(request)

    async def ProbeLink(
        self, request: worker_pb2.ProbeLinkRequest, context: Call
    ) -> AsyncIterator[worker_pb2.ProbeLinkResponse]:
        """Takes part in measuring a way."""
        del context
        async for response in self._probes.link(request):
            yield response

    async def ProbeCopies(
        self, request: worker_pb2.ProbeCopiesRequest, context: Call
    ) -> worker_pb2.ProbeCopiesResponse:
        """Measures copies between devices."""
        del context
        return await self._probes.copies(request)

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Call
    ) -> worker_pb2.GetStatusResponse:
        """What the worker holds."""
        del request, context
        return worker_pb2.GetStatusResponse(
            worker=self._worker, devices=self._agent.devices(), stages=self._agent.statuses()
        )


def _check(assignment: topology_pb2.ShardAssignment) -> None:
    """Raise InvalidArgumentError for an assignment that no stage could follow."""
    if not assignment.replica or not assignment.deployment:
        raise InvalidArgumentError(
            "assignment: replica and deployment must be named", field="assignment.replica"
        )
    if assignment.generation < 1:
        raise InvalidArgumentError(
            "assignment.generation: 0; generations count from 1", field="assignment.generation"
        )
    if not 0 <= assignment.stage_index < assignment.stage_count:
        raise InvalidArgumentError(
            f"assignment.stage_index: {assignment.stage_index} of {assignment.stage_count} stages",
            field="assignment.stage_index",
        )
    after = assignment.first_layer
    for shard in assignment.shards:
        if not shard.device_id or shard.first_layer != after or shard.last_layer < after:
            raise InvalidArgumentError(
                f"assignment.shards: layers {shard.first_layer} to {shard.last_layer} on "
                f"{shard.device_id!r}, where a device for layer {after} on is due",
                field="assignment.shards",
            )
        after = shard.last_layer + 1
    if assignment.shards and after != assignment.last_layer + 1:
        raise InvalidArgumentError(
            f"assignment.shards end at layer {after - 1}, and the stage at {assignment.last_layer}",
            field="assignment.shards",
        )
