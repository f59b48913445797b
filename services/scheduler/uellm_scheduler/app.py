"""The scheduler as the runner sees it."""

import asyncio
from collections.abc import Callable

import grpc

from uellm.core.errors import ConfigurationError, InvalidArgumentError
from uellm.heap import keep_freed_memory
from uellm.policy.registry import dispatch_policy
from uellm.service import Context, serve
from uellm.v1 import scheduler_pb2_grpc
from uellm_scheduler.forwarding import Forwarding
from uellm_scheduler.ownership import Ownership
from uellm_scheduler.servicer import SchedulerServicer
from uellm_scheduler.settings import SchedulerSettings


class SchedulerApplication:
    """One scheduler; several share the models among them."""

    service_names: tuple[str, ...] = ("uellm.v1.SchedulerService",)

    def __init__(self, settings: SchedulerSettings, context: Context) -> None:
        self._context = context
        self._ownership = Ownership(context, settings)
        self._forwarding = Forwarding(context)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        servicer = SchedulerServicer(self._context, self._ownership, self._forwarding)
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Begin to contest models."""
        await self._ownership.start()

    async def drain(self) -> None:
        """Stop dispatching and let every model go to its next owner."""
        await self._ownership.release()

    async def close(self) -> None:
        """Close what was opened."""
        await self._forwarding.close()


async def start(
    settings: SchedulerSettings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run a scheduler until a signal, ``stop``, or a failure of its own.

    Raises:
        ConfigurationError: if it cannot start as it was told to.
    """
    try:
        dispatch_policy(settings.policy, settings.dispatch_settings)
    except InvalidArgumentError as error:
        raise ConfigurationError(
            f"UELLM_SCHEDULER_POLICY: {error.message}", field="policy"
        ) from None
    keep_freed_memory()
    await serve(
        settings, lambda context: SchedulerApplication(settings, context), stop=stop, ready=ready
    )
