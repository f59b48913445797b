"""How every service runs: telemetry, Redis, server, SERVING; and on SIGTERM the way back.

The order of going is uvicorn's: say so (NOT_SERVING, off the registry), take no new work, finish
or hand back what runs, then close. A second signal forces.
"""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from uellm import __version__, logs
from uellm.addresses import joined
from uellm.config import ServiceSettings
from uellm.core.errors import ConfigurationError, UellmError
from uellm.faults import Faults, pause
from uellm.rpc import SERVER_OPTIONS, ClosingInterceptor, ErrorInterceptor
from uellm.streams.clock import RedisClock
from uellm.streams.connection import UNREACHABLE, RedisClient, check, connect
from uellm.streams.registry import RENEW_SECONDS, Registry, ServiceAddress
from uellm.telemetry import Telemetry

_log = logs.logger("service")
RETRY_SECONDS = 0.5
COLLECTED_AFTER = 10_000
"""New objects after which those that refer to each other are looked for."""


class Context:
    """What the runner gives a service's application.

    Attributes:
        identity: the service's name among its role.
        address: where others reach its gRPC server.
        redis: the mesh's Redis.
        registry: who else is there.
        clock: Redis TIME.
        faults: what failed unforeseen.
    """

    def __init__(self, settings: ServiceSettings, redis: RedisClient, address: str) -> None:
        self.identity = settings.identity
        self.address = address
        self.redis = redis
        self.registry = Registry(redis)
        self.clock = RedisClock(redis)
        self.faults = Faults()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run ``work`` beside the server. If it fails, the service fails."""
        return self._begin(work, name, self._fail)

    def aside(
        self,
        work: Coroutine[Any, Any, None],
        name: str,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> asyncio.Task[None]:
        """Run ``work`` that is one model's or one caller's: the service outlives its failure.

        Args:
            work: what to do.
            name: of the work.
            failed: called with what nobody foresaw, once that is noted.
        """

        def ended(error: BaseException) -> None:
            if not isinstance(error, Exception):
                self._fail(error)
                return
            self.faults.note(name, error)
            failed(error)

        return self._begin(work, name, ended)

    def _begin(
        self, work: Coroutine[Any, Any, None], name: str, failed: Callable[[BaseException], None]
    ) -> asyncio.Task[None]:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                failed(error)

        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    async def repeat(self, step: Callable[[], Awaitable[None]], name: str) -> None:
        """Call ``step`` for ever, whatever fails.

        While Redis is away, log once and go on trying. What nobody foresaw is noted, and tried
        again later each time.

        Raises:
            ConfigurationError: trying again helps nothing.
        """
        away = False
        while True:
            try:
                await step()
            except UNREACHABLE as error:
                if not away:
                    _log.warning("Redis does not answer; trying on", loop=name, error=str(error))
                away = True
                await asyncio.sleep(RETRY_SECONDS)
            except ConfigurationError:
                raise
            except Exception as error:
                away = False
                await asyncio.sleep(pause(self.faults.note(name, error)))
            else:
                away = False
                self.faults.clear(name)

    async def stop_tasks(self) -> None:
        """Cancel everything spawned and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Application(Protocol):
    """One service: what it serves and does beside serving."""

    service_names: tuple[str, ...]

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicers."""
        ...

    async def start(self) -> None:
        """Start background work; the server is not serving yet."""
        ...

    async def drain(self) -> None:
        """Take no new work; finish or hand back what runs."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...


async def _bind(server: grpc.aio.Server, settings: ServiceSettings) -> int:
    address = joined(settings.host, settings.port)
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        raise ConfigurationError(
            f"cannot listen on {address}: the port is taken or the address is not this host's; "
            f"set UELLM_{settings.role.upper()}_PORT (0: any free one)",
            field="port",
        ) from None


async def _keep_registered(context: Context, role: str) -> None:
    async def renew() -> None:
        service = ServiceAddress(
            role,
            context.identity,
            context.address,
            os.getpid(),
            tuple(context.faults.lasting),
            __version__,
        )
        await context.registry.register(service)
        await context.clock.sync()
        await asyncio.sleep(RENEW_SECONDS)

    await context.repeat(renew, "registration")


def _interceptors(telemetry: Telemetry) -> list[grpc.aio.ServerInterceptor]:
    interceptors: list[grpc.aio.ServerInterceptor] = [ClosingInterceptor(), ErrorInterceptor()]
    if telemetry.enabled:
        from opentelemetry.instrumentation.grpc import (  # noqa: PLC0415
            aio_server_interceptor,
            filters,
        )

        # Who asks whether it lives asks for ever: a trace each would bury the others.
        traced = filters.negate(filters.health_check())
        interceptors.insert(1, aio_server_interceptor(filter_=traced))
    return interceptors


async def serve(
    settings: ServiceSettings,
    build: Callable[[Context], Application],
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[str], None] | None = None,
    interceptors: tuple[grpc.aio.ServerInterceptor, ...] = (),
) -> None:
    """Run a service until a signal, ``stop``, or a failure of its own.

    Args:
        settings: the service's settings.
        build: makes the application; called once Redis answers and the port is known.
        stop: set it to drain and end, as SIGTERM does.
        ready: called with the address once the service is SERVING.
        interceptors: server interceptors of the service's own.

    Raises:
        ConfigurationError: if it cannot start as it was told to.
    """
    telemetry = Telemetry(
        settings.role, settings.identity, settings.otel_exporter, settings.otel_file
    )
    redis = connect(settings.redis_url)
    stopping = stop or asyncio.Event()
    try:
        await check(redis, settings.redis_url)
        server = grpc.aio.server(
            interceptors=[*_interceptors(telemetry), *interceptors], options=SERVER_OPTIONS
        )
        port = await _bind(server, settings)
        context = Context(settings, redis, joined(settings.advertised_host, port))
        await context.clock.sync(force=True)
        application = build(context)
        with _signals(stopping):
            await _run(settings, context, application, server, stopping, ready)
    finally:
        await redis.aclose()
        telemetry.close()


async def _run(
    settings: ServiceSettings,
    context: Context,
    application: Application,
    server: grpc.aio.Server,
    stopping: asyncio.Event,
    ready: Callable[[str], None] | None,
) -> None:
    application.add_to(server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (*application.service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        await application.start()
        await server.start()
        for name in ("", *application.service_names):
            await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        registration = context.spawn(_keep_registered(context, settings.role), "registration")
        _log.info("serving", address=context.address, identity=context.identity)
        if ready is not None:
            ready(context.address)
        waiting: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({waiting, context.failed}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if context.failed.done():
            _log.error("a background task failed", exc_info=context.failed.exception())
        _log.info("draining", seconds=settings.drain_seconds)
        await servicer.enter_graceful_shutdown()
        registration.cancel()
        await _quietly(context.registry.unregister(settings.role, context.identity), 2.0)
        await _quietly(application.drain(), settings.drain_seconds)
        await server.stop(settings.drain_seconds)
    finally:
        await context.stop_tasks()
        await application.close()
        await server.stop(0)
    if context.failed.done():
        await context.failed


async def _quietly(work: Coroutine[Any, Any, None], seconds: float) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except (TimeoutError, UellmError, *UNREACHABLE) as error:
        _log.warning("not finished before stopping", error=str(error) or type(error).__name__)


class _signals:
    """SIGTERM and SIGINT set ``stopping``; a second one ends the process at once."""

    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        self._loop = asyncio.get_running_loop()

    def _handle(self) -> None:
        if self._stopping.is_set():
            os._exit(1)
        self._stopping.set()

    def __enter__(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(name, self._handle)

    def __exit__(self, *_: object) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(name)


def _settle(_: str) -> None:
    """Have what was loaded to serve, hundreds of thousands of objects, never be looked at again.

    Each full collection stopped a gateway, or a scheduler, for 70 to 100 ms. What requests make is
    mostly gone by itself: looking for cycles after every 700 objects finds little and costs 2 %.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_AFTER)


def main(
    settings_class: type[ServiceSettings],
    start: Callable[..., Coroutine[Any, Any, None]],
) -> None:
    """The whole of a service's ``__main__``: settings, logs, run; errors as one line."""
    try:
        settings = settings_class.load()
        logs.configure(settings.identity, settings.log_level, settings.log_format)
        asyncio.run(start(settings, ready=_settle))
    except ConfigurationError as error:
        sys.stderr.write(f"uellm {settings_class.role}: {error.message}\n")
        raise SystemExit(2) from None
