"""The deployer as the runner sees it."""

import asyncio
import contextlib
from collections.abc import Callable

import grpc

from uellm.leadership import Leadership
from uellm.service import Context, serve
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import deployer_pb2_grpc
from uellm_deployer.deployer import Deployer
from uellm_deployer.forwarding import Forwarding
from uellm_deployer.servicer import DeployerServicer
from uellm_deployer.settings import DeployerSettings

LEASE_PREFIX = "uellm:deployer:"


class DeployerApplication:
    """One deployer: it acts, or stands by for the one that does."""

    service_names: tuple[str, ...] = ("uellm.v1.DeployerService",)

    def __init__(self, settings: DeployerSettings, context: Context) -> None:
        self._context = context
        self._leadership = Leadership(context, LEASE_PREFIX)
        self._deployer = Deployer(settings, context, self._leadership)
        self._forwarding = Forwarding(self._leadership, self._deployer)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        servicer = DeployerServicer(self._deployer, self._forwarding)
        deployer_pb2_grpc.add_DeployerServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Stand for leader."""
        renewing = self._context.repeat(self._leadership.renew, "leadership")
        self._renewing = self._context.spawn(renewing, "leadership")
        self._context.spawn(self._context.repeat(self._deployer.turn, "deployer"), "deployer")
        self._context.spawn(self._context.repeat(self._deployer.listen, "listening"), "listening")

    async def drain(self) -> None:
        """Let go of the lease: what runs goes on without a deployer, and another takes over."""
        self._renewing.cancel()
        await asyncio.gather(self._renewing, return_exceptions=True)
        self._deployer.step_down()
        with contextlib.suppress(*UNREACHABLE):  # It runs out by itself.
            await self._leadership.release()

    async def close(self) -> None:
        """Close all channels."""
        await self._forwarding.close()
        await self._deployer.close()


async def start(
    settings: DeployerSettings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run a deployer until a signal, ``stop``, or a failure of its own."""
    await serve(
        settings, lambda context: DeployerApplication(settings, context), stop=stop, ready=ready
    )
