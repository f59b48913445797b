"""The process tree of a mesh: up in one go, kept up, and down in order."""

import asyncio
import contextlib
import errno
import shutil
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from uellm import logs
from uellm.addresses import bare, from_here, is_anywhere, is_host, joined, listening
from uellm.core.errors import ConfigurationError
from uellm.embedded import EmbeddedRedis, free_port
from uellm.mesh.joining import Token, new_secret
from uellm.mesh.options import DRAIN_ORDER, MeshOptions
from uellm.mesh.readiness import (
    Placement,
    Report,
    deploy,
    placement,
    wait_for_gateway,
    wait_for_services,
)
from uellm.mesh.state import MeshState, home, read_state, runs
from uellm.mesh.supervision import Supervised
from uellm.mesh.tether import tethered
from uellm.streams.connection import RedisClient, check, connect
from uellm.streams.registry import Registry

DRAIN_SECONDS = 25.0
KEPT_RUNS = 5
_REDIS_POLL_SECONDS = 0.2
_log = logs.logger("mesh")


class Mesh:
    """A mesh in processes of its own, below this one.

    Args:
        options: what it consists of.
        report: told about progress, in words for people.
        trace_directory: where services write their spans; None: with their logs.
        announce: told how others join, which is not to be lost among the progress; None: as that.
    """

    def __init__(
        self,
        options: MeshOptions,
        report: Report = lambda _: None,
        trace_directory: Path | None = None,
        announce: Report | None = None,
    ) -> None:
        # Fixed from here on: a gateway that is started again is found where it was.
        self.options = replace(options, port=options.port or free_port())
        run = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.options.port}"
        self.directory = runs(home()) / run
        self.trace_directory = trace_directory or self.directory / "spans"
        self._report = report
        self._announce = announce or report
        self._redis_server: EmbeddedRedis | None = None
        self._services: list[Supervised] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._redis: RedisClient = None

    @property
    def address(self) -> str:
        """The gateway's address, for clients on this host."""
        return joined(from_here(self.options.host), self.options.port)

    @property
    def redis_url(self) -> str:
        """The mesh's Redis."""
        return self._redis_server.url if self._redis_server else self.options.redis_url

    def pids(self) -> dict[str, int]:
        """Process ids of the services that run, by service id."""
        return {s.spec.service_id: s.pid for s in self._services if s.pid is not None}

    @property
    def redis_pid(self) -> int | None:
        """Process id of the mesh's own Redis, if it has one."""
        return self._redis_server.pid if self._redis_server else None

    @property
    def invitation(self) -> str:
        """What another machine runs to join; "" if none can."""
        server = self._redis_server
        if server is None or not self.options.listens:
            return ""
        host = self.options.host
        host = socket.gethostname() if is_anywhere(host) else bare(host)
        return f"uellm join {host} --token {Token(server.port, server.password)}"

    async def placements(self, model: str) -> list[Placement]:
        """Which layers of a model's replicas are where now."""
        deployment = (await Registry(self._redis).deployments())[model]
        return [placement(replica) for replica in deployment.replicas]

    async def address_of(self, role: str) -> str:
        """Where a service of a role is reached."""
        (service, *_) = await Registry(self._redis).find(role)
        return service.address

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Start it; drain and end it afterwards, whatever happened.

        Raises:
            UellmError: why it could not start; nothing of it is left then.
        """
        try:
            await self._start()
            yield self
        finally:
            await self._stop()

    async def watch(self) -> None:
        """Return never; raise when a service had to be given up."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def while_alive(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work``, unless a service has to be given up meanwhile."""
        tasks = [asyncio.create_task(self.watch()), asyncio.create_task(work)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self) -> None:
        """End all services at once, their work unfinished."""
        for service in self._services:
            service.kill()

    async def _start(self) -> None:
        self._check_port()
        self._prepare_directory()
        if not self.options.redis_url:
            self._report("starting Redis")
            # Forked by this thread: the tether holds as long as the thread that forked.
            listens = self.options.listens
            server = EmbeddedRedis(
                self.directory / "redis",
                host=self.options.host if listens else "127.0.0.1",
                password=new_secret() if listens else "",
                wrap=tethered,
            )
            self._redis_server = server.start()
            if listens:
                self._announce(f"other machines join by: {self.invitation}")
            self._tasks.append(asyncio.create_task(_keep(server)))
        self._redis = connect(self.redis_url)
        await check(self._redis, self.redis_url)
        for spec in self.options.services(self.redis_url, self.directory, self.trace_directory):
            service = Supervised(spec, self._write_state)
            self._services.append(service)
            self._tasks.append(asyncio.create_task(service.run(), name=spec.service_id))
        await self.while_alive(self._make_ready())

    async def _make_ready(self) -> None:
        registry = Registry(self._redis)
        await wait_for_services(registry, self._services, self._report)
        await deploy(registry, self.options, self._services, self._report)
        await wait_for_gateway(self.address, self.options)

    def _check_port(self) -> None:
        option = "--listen" if self.options.listens else "--host"
        if not is_host(self.options.host):
            raise ConfigurationError(
                f"{option}: {self.options.host!r} is no name or address of a machine; its port is "
                "told by --port",
                field="host",
            )
        try:
            listening(self.options.host, self.options.port).close()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            remedy = (
                "choose another with --port, or stop what is there"
                if taken
                else f"correct {option} or --port"
            )
            raise ConfigurationError(
                f"cannot listen on {joined(self.options.host, self.options.port)} "
                f"({error.strerror}); {remedy}",
                field="port" if taken else "host",
            ) from None

    def _prepare_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {self.directory.parent} ({error.strerror}); set UELLM_HOME to a "
                "directory of yours"
            ) from None
        finished = sorted(path for path in runs(home()).iterdir() if not self._in_use(path))
        for old in finished[:-KEPT_RUNS]:
            shutil.rmtree(old, ignore_errors=True)

    def _in_use(self, directory: Path) -> bool:
        state = read_state(directory)
        return directory == self.directory or (state is not None and state.alive)

    def _write_state(self) -> None:
        state = MeshState.of_this_process((self.address,), self.redis_url, self.pids())
        state.write(self.directory)

    async def _stop(self) -> None:
        for role in DRAIN_ORDER:
            leaving = [s.stop(DRAIN_SECONDS) for s in self._services if s.spec.role == role]
            await asyncio.gather(*leaving)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._redis is not None:
            await self._redis.aclose()
        if self._redis_server is not None:
            self._redis_server.stop()
            shutil.rmtree(self.directory / "redis", ignore_errors=True)
        MeshState.remove(self.directory)


async def _keep(server: EmbeddedRedis) -> None:
    while True:
        await asyncio.sleep(_REDIS_POLL_SECONDS)
        if not server.running:
            _log.warning("Redis ended; starting it again with what its file holds")
            server.start()
