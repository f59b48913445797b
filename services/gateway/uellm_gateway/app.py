"""The gateway as the runner sees it."""

import asyncio
from collections.abc import Callable

import grpc

from uellm.service import Context, serve
from uellm.v1 import inference_pb2_grpc
from uellm_gateway.admission import Admission
from uellm_gateway.auth import AuthInterceptor
from uellm_gateway.calls import Calls
from uellm_gateway.estimates import Estimates
from uellm_gateway.models import ModelView
from uellm_gateway.peers import Peers
from uellm_gateway.profiling import Profiling
from uellm_gateway.queues import ModelQueues
from uellm_gateway.servicer import InferenceServicer
from uellm_gateway.settings import GatewaySettings
from uellm_gateway.turned_away import TurnedAway

PEER_POLL_SECONDS = 1.0
TURNED_AWAY_SECONDS = 1.0
"""How often it is said how many were refused before they were accepted, where some were."""
# The rest of the time to drain is for streams that have to be ended.
_SHARE_OF_DRAIN_TO_FINISH = 0.8


class GatewayApplication:
    """One gateway; any number run side by side."""

    service_names: tuple[str, ...] = ("uellm.v1.InferenceService",)

    def __init__(self, settings: GatewaySettings, context: Context) -> None:
        self._settings = settings
        self._context = context
        self._profilers = Peers(context.registry, "profiler")
        self._schedulers = Peers(context.registry, "scheduler")
        self._models = ModelView(context.registry)
        self._turned_away = TurnedAway(lambda name: self._models.find(name) is not None)
        self._queues = ModelQueues(context, self._models, settings.retention_seconds)
        self._calls = Calls(context, context.identity, settings.stream_interval_seconds)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        profiling = Profiling(self._profilers, self._settings.profile_budget_seconds)
        servicer = InferenceServicer(
            self._context,
            self._models,
            Admission(self._context, self._settings, self._models, profiling, self._turned_away),
            self._queues,
            self._calls,
            Estimates(self._schedulers),
            self._settings.buffered_entries,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Learn what is served and who is there, and keep on doing so."""
        await self._models.refresh()
        await self._refresh_peers()
        for name, step in (
            ("models", self._models.poll),
            ("peers", self._poll_peers),
            ("frames", self._queues.check),
            ("turned away", self._say_turned_away),
        ):
            self._context.spawn(self._context.repeat(step, name), name)

    async def _refresh_peers(self) -> None:
        await self._profilers.refresh()
        await self._schedulers.refresh()

    async def _poll_peers(self) -> None:
        await asyncio.sleep(PEER_POLL_SECONDS)
        await self._refresh_peers()

    async def _say_turned_away(self) -> None:
        await asyncio.sleep(TURNED_AWAY_SECONDS)
        for model, count in self._turned_away.take().items():
            await self._queues.queue(model).turn_away(count)

    async def drain(self) -> None:
        """Let streams end; requests themselves are durable and go on without this gateway."""
        await self._calls.drain(self._settings.drain_seconds * _SHARE_OF_DRAIN_TO_FINISH)

    async def close(self) -> None:
        """Let go of everything."""
        await self._queues.close()
        await self._models.close()
        await self._profilers.close()
        await self._schedulers.close()


async def start(
    settings: GatewaySettings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run a gateway until a signal, ``stop``, or a failure of its own."""
    await serve(
        settings,
        lambda context: GatewayApplication(settings, context),
        stop=stop,
        ready=ready,
        interceptors=(AuthInterceptor(),),
    )
