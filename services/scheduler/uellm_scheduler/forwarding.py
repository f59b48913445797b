"""Passing calls on to the scheduler that owns a model."""

from typing import Any

import grpc

from uellm.core.errors import NotFoundError, UnavailableError
from uellm.rpc import CALL_SECONDS, channel, error_from
from uellm.service import Context
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import scheduler_pb2_grpc

FORWARDED = "uellm-forwarded"
"""Metadata of a call that was passed on once; it is not passed on again."""

Call = grpc.aio.ServicerContext[Any, Any]


class Forwarding:
    """Finds the owner of a model and passes calls on to it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def to_owner(self, method: str, request: Any, call: Call) -> Any:
        """The owner's answer to ``method``.

        Raises:
            NotFoundError: if the model is not deployed.
            UnavailableError: if nobody owns it at the moment.
            UellmError: what the owner answered.
        """
        address = await self._address_of_owner(request.model, call)
        if address not in self._channels:
            self._channels[address] = channel(address)
        stub = scheduler_pb2_grpc.SchedulerServiceStub(self._channels[address])
        left = call.time_remaining()
        try:
            return await getattr(stub, method)(
                request,
                timeout=CALL_SECONDS if left is None else min(left, CALL_SECONDS),
                metadata=((FORWARDED, "1"),),
            )
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None

    async def _address_of_owner(self, model: str, call: Call) -> str:
        deployments = await self._context.registry.deployments()
        if model not in deployments:
            served = ", ".join(deployments) or "none"
            raise NotFoundError(
                f"model: {model!r} is not deployed; deployed: {served}",
                field="model",
                reason="MODEL_NOT_FOUND",
            )
        holder, _ = await SchedulerQueue(self._context.redis, model).owner()
        forwarded = any(key == FORWARDED for key, _ in call.invocation_metadata() or ())
        if holder != self._context.identity and not forwarded:
            for service in await self._context.registry.find("scheduler"):
                if service.service_id == holder:
                    return service.address
        raise UnavailableError(
            f"no scheduler owns {model} at the moment; one will within seconds",
            reason="NO_OWNER",
            retry_after_seconds=1.0,
        )

    async def close(self) -> None:
        """Close all channels."""
        for open_channel in self._channels.values():
            await open_channel.close()
