"""The profiler as the runner sees it."""

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc

from uellm.core.errors import ConfigurationError, InvalidArgumentError
from uellm.learning.store import Manifest, load_predictor
from uellm.prediction.interface import Predictor
from uellm.prediction.registry import predictor
from uellm.service import Context, serve
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import profiler_pb2_grpc
from uellm_profiler.learning import Learner, Reader
from uellm_profiler.models import Models
from uellm_profiler.servicer import ProfilerServicer
from uellm_profiler.serving import Serving
from uellm_profiler.settings import ProfilerSettings
from uellm_profiler.store import Store


class ProfilerApplication:
    """One profiler; any number run side by side."""

    service_names: tuple[str, ...] = ("uellm.v1.ProfilerService",)

    def __init__(self, settings: ProfilerSettings, context: Context) -> None:
        begin, make = beginnings(settings)
        self._context = context
        self._store = Store(context.redis)
        self._models = Models(context, settings.poll_seconds)
        self._serving = Serving(begin)
        self._reader = Reader(self._store, self._serving, make, settings.poll_seconds)
        self._learner = Learner(context, settings, self._store, self._models, begin.state(), make)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        servicer = ProfilerServicer(self._models, self._serving, self._store)
        profiler_pb2_grpc.add_ProfilerServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Follow the deployments and what is learnt; stand for learner."""
        context = self._context
        context.spawn(context.repeat(self._models.poll, "deployments"), "deployments")
        context.spawn(context.repeat(self._reader.poll, "reader"), "reader")
        renew = context.repeat(self._learner.leadership.renew, "leadership")
        self._renewing = context.spawn(renew, "leadership")
        turns = context.repeat(self._learner.turn, "learner")
        self._learning = context.spawn(turns, "learner")

    async def drain(self) -> None:
        """Let another profiler learn; calls in progress are awaited by the runner."""
        with contextlib.suppress(*UNREACHABLE):
            await self._learner.settle()
        self._learning.cancel()
        self._renewing.cancel()
        with contextlib.suppress(*UNREACHABLE):
            await self._learner.leadership.release()

    async def close(self) -> None:
        """Predict no more, and fit no more."""
        self._serving.close()
        await self._learner.stop_fitting()


def beginnings(settings: ProfilerSettings) -> tuple[Predictor, Callable[[], Predictor]]:
    """What a profiler begins with, and what makes predictors like it that have learnt nothing.

    Raises:
        ConfigurationError: if there is none of its name, or the directory holds another.
    """
    name = settings.predictor
    try:
        if not settings.pretrained:
            return predictor(name), partial(predictor, name)
        directory = Path(settings.pretrained)
        pretrained, manifest = load_predictor(directory), Manifest.read(directory)
    except InvalidArgumentError as error:
        raise ConfigurationError(error.message, field="predictor") from error
    if pretrained.name != name:
        raise ConfigurationError(
            f"pretrained: {directory} holds {pretrained.name!r}, and predictor is {name!r}; set "
            f"UELLM_PROFILER_PREDICTOR={pretrained.name}, or train anew",
            field="pretrained",
        )
    return pretrained, partial(predictor, name, manifest.settings if manifest else None)


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
