"""A deployer that stands by passes calls on to the one that acts."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from uellm.core.errors import UnavailableError
from uellm.leadership import LEASE_SECONDS, Leadership
from uellm.rpc import CALL_SECONDS, channel, error_from
from uellm.v1 import deployer_pb2_grpc
from uellm_deployer.deployer import Deployer

FORWARDED = "uellm-forwarded"
"""Metadata of a call that was passed on once; it is not passed on again."""
_POLL_SECONDS = 0.05
_MARGIN_SECONDS = 0.2

Call = grpc.aio.ServicerContext[Any, Any]


class Forwarding:
    """Answers for the deployer that acts, whichever it is.

    Between two leaders a call waits for the next one, as far as its deadline allows.
    """

    def __init__(self, leadership: Leadership, deployer: Deployer) -> None:
        self._leadership = leadership
        self._deployer = deployer
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def unary(self, method: str, request: Any, call: Call) -> Any:
        """The leader's answer, or None if this deployer acts itself.

        Raises:
            UnavailableError: if there is no leader within the call's deadline.
            UellmError: what the leader answered.
        """
        deadline = _deadline(call)
        while await self._wait(deadline, call):
            left = deadline - time.monotonic()
            try:
                return await getattr(self._stub(), method)(
                    request, timeout=left, metadata=((FORWARDED, "1"),)
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise error_from(error) from None
                # The leader is gone, and its lease has not run out yet.
                await asyncio.sleep(_POLL_SECONDS)
        return None

    async def stream(self, method: str, request: Any, call: Call) -> AsyncIterator[Any]:
        """The leader's answers; none if this deployer acts itself."""
        if await self._wait(_deadline(call), call):
            try:
                answers = getattr(self._stub(), method)(
                    request, timeout=call.time_remaining(), metadata=((FORWARDED, "1"),)
                )
                async for answer in answers:
                    yield answer
            except grpc.aio.AioRpcError as error:
                raise error_from(error) from None

    async def _wait(self, deadline: float, call: Call) -> bool:
        """Wait for a leader; True if it is another deployer."""
        forwarded = any(key == FORWARDED for key, _ in call.invocation_metadata() or ())
        while True:
            if self._deployer.acting:
                return False
            elsewhere = self._leadership.leader and not self._leadership.token
            if elsewhere and not forwarded:
                return True
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "no deployer acts at the moment; one will within seconds",
                    reason="NO_LEADER",
                    retry_after_seconds=1.0,
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _stub(self) -> Any:
        address = self._leadership.leader
        if address not in self._channels:
            self._channels[address] = channel(address)
        return deployer_pb2_grpc.DeployerServiceStub(self._channels[address])

    async def close(self) -> None:
        """Close all channels."""
        for way in self._channels.values():
            await way.close()


def _deadline(call: Call) -> float:
    left = call.time_remaining()
    most = LEASE_SECONDS + CALL_SECONDS
    return time.monotonic() + min(most if left is None else left - _MARGIN_SECONDS, most)
