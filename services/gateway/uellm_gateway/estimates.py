"""What the model's scheduler would promise."""

import grpc

from uellm.core.errors import UellmError, UnavailableError
from uellm.rpc import CALL_SECONDS, error_from
from uellm.telemetry import traceparent
from uellm.v1 import scheduler_pb2
from uellm.v1.scheduler_pb2_grpc import SchedulerServiceStub
from uellm_gateway.peers import Peers

_TRIES = 2


class Estimates:
    """Asks a scheduler; any of them passes the question on to the model's owner."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def estimate(
        self,
        request: scheduler_pb2.SchedulerServiceEstimateRequest,
        time_remaining: float | None,
    ) -> scheduler_pb2.SchedulerServiceEstimateResponse:
        """What a request that came now could expect.

        Raises:
            UellmError: what the scheduler says, or that none answers.
        """
        parent = traceparent()
        problem: UellmError = UnavailableError(
            "no scheduler is registered; start one with uellm serve scheduler",
            reason="NO_SCHEDULER",
            retry_after_seconds=1.0,
        )
        for _ in range(_TRIES):
            peer = self._peers.next()
            if peer is None:
                break
            try:
                response: scheduler_pb2.SchedulerServiceEstimateResponse
                response = await SchedulerServiceStub(peer.channel).Estimate(
                    request,
                    timeout=min(time_remaining or CALL_SECONDS, CALL_SECONDS),
                    metadata=(("traceparent", parent),) if parent else None,
                )
            except grpc.aio.AioRpcError as error:
                found = error_from(error)
                if not isinstance(found, UnavailableError):
                    raise found from None
                peer.rest()
                problem = UnavailableError(
                    f"the scheduler at {peer.address} does not answer: {found.message}",
                    reason="SCHEDULER_UNAVAILABLE",
                    retry_after_seconds=1.0,
                )
            else:
                peer.answered()
                return response
        raise problem
