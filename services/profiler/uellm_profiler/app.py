"""The profiler as the runner sees it."""

import asyncio
from collections.abc import Callable

import grpc

from uellm.service import Context, serve
from uellm.v1 import profiler_pb2_grpc
from uellm_profiler.learning import Learning
from uellm_profiler.servicer import ProfilerServicer
from uellm_profiler.settings import ProfilerSettings


class ProfilerApplication:
    """One profiler; any number run side by side."""

    service_names: tuple[str, ...] = ("uellm.v1.ProfilerService",)

    def __init__(self, settings: ProfilerSettings, context: Context) -> None:
        self._learning = Learning(context, settings.poll_seconds)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        servicer = ProfilerServicer(self._learning)
        profiler_pb2_grpc.add_ProfilerServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Begin to learn."""
        await self._learning.start()

    async def drain(self) -> None:
        """Calls in progress are awaited by the runner; there is nothing else to finish."""

    async def close(self) -> None:
        """Nothing is held."""


async def start(
    settings: ProfilerSettings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run a profiler until a signal, ``stop``, or a failure of its own."""
    await serve(
        settings, lambda context: ProfilerApplication(settings, context), stop=stop, ready=ready
    )
