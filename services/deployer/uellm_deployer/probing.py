"""Having workers measure their devices and the ways between them: the calls, nothing decided."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc

from uellm.addresses import host_of
from uellm.convert import cost_to_proto, duration, timestamp
from uellm.convert_topology import link_to_proto, sample_from_proto
from uellm.core.errors import FailedPreconditionError
from uellm.placement.measuring import BlockCost, fit_block, fit_link
from uellm.placement.topology import Link
from uellm.rpc import error_from
from uellm.v1 import common_pb2, topology_pb2, worker_pb2
from uellm_deployer.holders import Holders
from uellm_deployer.links import Links
from uellm_deployer.workers import Worker

CALL_SECONDS = 30.0
"""How long a probe may take with all that goes with it."""
BLOCK_SECONDS = 2.0
LINK_SECONDS = 0.8
COPIES_SECONDS = 1.0
HIDDEN_SIZE = 2048
"""Where nothing is known of a model."""
PROBE = "probe"
"""Source of what was measured."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What travels between stages.

    Attributes:
        hidden_size: its width.
        dtype: of its numbers.
    """

    hidden_size: int = HIDDEN_SIZE
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """A way that was measured.

    Attributes:
        link: as planners take it: its latency is the transport's.
        wire_seconds: of the latency, what the network takes.
    """

    link: Link
    wire_seconds: float = 0.0


class Prober:
    """Calls workers to measure.

    Args:
        links: how to call them.
        holders: says who has the files of a model, for those that have not.
    """

    def __init__(self, links: Links, holders: Holders) -> None:
        self._links = links
        self._holders = holders

    async def link(
        self,
        src: Worker,
        dst: Worker,
        ends: tuple[str, str],
        activation: Activation,
        now: float,
    ) -> MeasuredLink:
        """Measure the way from one worker to another.

        Args:
            src: sends.
            dst: receives.
            ends: ids of a device of each.
            activation: what is sent.
            now: seconds since the epoch.

        Raises:
            UellmError: what a worker says against it.
        """
        request = worker_pb2.ProbeLinkRequest(
            src=ends[0],
            dst=ends[1],
            hidden_size=activation.hidden_size,
            dtype=activation.dtype,
            budget=duration(LINK_SECONDS),
        )
        sending = self._links.stub(src).ProbeLink(
            _with(request, host=host_of(src.address)), timeout=CALL_SECONDS
        )
        receiving: asyncio.Task[None] | None = None
        try:
            async for answer in sending:
                if answer.rendezvous:
                    request.rendezvous = answer.rendezvous
                    request.host = host_of(dst.address)
                    receiving = asyncio.create_task(self._receive(dst, request, sending))
                else:
                    return _measured(ends, answer, now)
        except grpc.aio.AioRpcError as error:
            # What the receiver says against it is the reason; the sender misses it.
            if receiving is not None:
                await receiving
            raise error_from(error) from None
        except asyncio.CancelledError:
            if receiving is not None and receiving.done():
                await receiving
            raise
        finally:
            sending.cancel()
            if receiving is not None:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)
        raise FailedPreconditionError(f"{src.worker} measured nothing", reason="PROBE_FAILED")

    async def _receive(
        self, dst: Worker, request: worker_pb2.ProbeLinkRequest, sending: grpc.aio.Call
    ) -> None:
        """Have the receiver take part; without it the sender waits in vain."""
        try:
            async for _ in self._links.stub(dst).ProbeLink(request, timeout=CALL_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            sending.cancel()
            raise error_from(error) from None

    async def block(
        self,
        worker: Worker,
        device_id: str,
        model: common_pb2.ModelRef | None,
        dtype: str,
        now: float,
    ) -> tuple[BlockCost, Sequence[topology_pb2.BlockPoint]] | None:
        """Measure layers; None where a worker computes none.

        Args:
            worker: whose device.
            device_id: which.
            model: of which the layers are; None: of a shape that stands for any.
            dtype: compute dtype.
            now: seconds since the epoch.

        Raises:
            UellmError: what the worker says against it.
        """
        request = worker_pb2.ProbeBlockRequest(
            device_id=device_id, model=model, dtype=dtype, budget=duration(BLOCK_SECONDS)
        )
        if model is not None:
            request.holders.extend(await self._holders.for_one(worker.worker, model))
        try:
            answer = await self._links.stub(worker).ProbeBlock(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None
        if not answer.points:
            return None
        return block_cost(answer, now), answer.points

    async def copies(self, worker: Worker, now: float) -> list[MeasuredLink]:
        """Measure copies between a worker's devices; nothing where they share the host's memory.

        Raises:
            UellmError: what the worker says against it.
        """
        request = worker_pb2.ProbeCopiesRequest(budget=duration(COPIES_SECONDS))
        try:
            answer = await self._links.stub(worker).ProbeCopies(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None
        return [
            MeasuredLink(_link((copies.src, copies.dst), copies.samples, "copy", now))
            for copies in answer.copies
            if copies.samples
        ]


def block_cost(answer: worker_pb2.ProbeBlockResponse, now: float) -> BlockCost:
    """The fit to what a worker measured of layers, at one point at least; ``now`` is when."""
    return fit_block(
        [sample_from_proto(point) for point in answer.points],
        answer.weight_bytes,
        answer.flops_per_token,
        now,
        leader_seconds=answer.leader_seconds,
        agent_seconds=answer.agent_seconds,
        share=answer.share or 1.0,
        period_seconds=answer.period_seconds,
    )


def measured_to_proto(measured: MeasuredLink) -> topology_pb2.Link:
    """A way that was measured, as it is kept."""
    message = link_to_proto(measured.link)
    message.wire_seconds = measured.wire_seconds
    return message


def block_to_proto(
    cost: BlockCost, points: Sequence[topology_pb2.BlockPoint] = ()
) -> topology_pb2.BlockCost:
    """A layer's cost for the wire."""
    return topology_pb2.BlockCost(
        layer=cost_to_proto(cost.layer, len(points), cost.error),
        step_seconds=cost.step_seconds,
        error=cost.error,
        points=points,
        measured_at=timestamp(cost.measured_at),
        live_ratio=cost.live.slowdown,
        live_step_seconds=cost.live.step_seconds,
        live_prefill_ratio=cost.live.prefill_ratio,
        weight_bytes=round(cost.weight_bytes),
        flops_per_token=cost.flops_per_token,
        ends=None if cost.ends is None else cost_to_proto(cost.ends),
        leader_seconds=cost.leader_seconds,
        agent_seconds=cost.agent_seconds,
        share=cost.share,
        period_seconds=cost.period_seconds,
    )


def _measured(
    ends: tuple[str, str], answer: worker_pb2.ProbeLinkResponse, now: float
) -> MeasuredLink:
    if not answer.samples:
        raise FailedPreconditionError(f"{ends[0]} measured nothing", reason="PROBE_FAILED")
    link = replace(
        _link(ends, answer.samples, "transport", now, answer.wire_seconds),
        passing_seconds=answer.passing_seconds,
    )
    return MeasuredLink(link, answer.wire_seconds)


def _link(
    ends: tuple[str, str],
    samples: Sequence[topology_pb2.LinkSample],
    kind: str,
    now: float,
    least_seconds: float = 0.0,
) -> Link:
    speed = fit_link([(float(sample.bytes), sample.seconds) for sample in samples], least_seconds)
    return Link(
        ends[0],
        ends[1],
        speed.latency_seconds,
        speed.bytes_per_second,
        source=PROBE,
        measured_at=now,
        kind=kind,
    )


def _with(request: worker_pb2.ProbeLinkRequest, *, host: str) -> worker_pb2.ProbeLinkRequest:
    copied = worker_pb2.ProbeLinkRequest()
    copied.CopyFrom(request)
    copied.host = host
    return copied
