"""Another machine's devices for a mesh that listens: its token, and the workers that join.

The token is the password of the mesh's Redis, through which all work goes, and the port that it
listens at. It keeps strangers out of the queues, not out of the network: see docs/joining.md.
"""

import asyncio
import base64
import binascii
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from redis.exceptions import AuthenticationError, RedisError

from uellm import __version__, logs
from uellm.addresses import bare, is_host
from uellm.core.errors import ConfigurationError, UnavailableError
from uellm.embedded import redis_url
from uellm.mesh.readiness import patience
from uellm.mesh.state import home, runs
from uellm.mesh.supervision import ServiceSpec, Supervised
from uellm.rpc import CALL_SECONDS, channel
from uellm.streams.connection import UNREACHABLE, RedisClient, connect
from uellm.streams.registry import Registry
from uellm.v1 import deployer_pb2, deployer_pb2_grpc, topology_pb2

SECRET_BYTES = 18
DRAIN_SECONDS = 25.0
LOST_SECONDS = 300.0
"""A mesh that has not answered for so long is not waited for any more."""
REACH_SECONDS = 10.0
"""How long a mesh may fail to reach workers before that is said."""
_POLL_SECONDS = 0.1
_PING_SECONDS = 1.0
_log = logs.logger("mesh")


def new_secret() -> str:
    """A password for a mesh's Redis."""
    return secrets.token_urlsafe(SECRET_BYTES)


@dataclass(frozen=True, slots=True)
class Token:
    """What a machine needs beside the address, to join.

    Attributes:
        port: that the mesh's Redis listens at.
        secret: its password.
    """

    port: int
    secret: str

    def __str__(self) -> str:
        raw = self.port.to_bytes(2, "big") + self.secret.encode()
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token behind a text.

        Raises:
            ConfigurationError: if it is none.
        """
        try:
            raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            port, secret = int.from_bytes(raw[:2], "big"), raw[2:].decode()
        except (binascii.Error, ValueError):
            port, secret = 0, ""
        if not port or len(secret) != len(new_secret()):
            raise ConfigurationError(
                "--token is no mesh's; copy the whole line that `uellm up --listen` printed",
                field="token",
            )
        return cls(port, secret)


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """Workers for a mesh elsewhere.

    Attributes:
        host: where its `uellm up --listen` runs.
        token: its token.
        workers: how many worker processes.
        devices: what each may use, as UELLM_WORKER_DEVICES takes it; "": all it finds.
        address: of this machine, as the mesh reaches it; "": the one that leads to ``host``.
        allow_download: fetch models that this host's cache lacks.

    Raises:
        ConfigurationError: if ``host`` or ``address`` is neither a name nor an address.
    """

    host: str
    token: Token
    workers: int = 1
    devices: str = ""
    address: str = ""
    allow_download: bool = False

    def __post_init__(self) -> None:
        for field, text in (("host", self.host), ("--address", self.address or self.host)):
            if not is_host(text):
                raise ConfigurationError(
                    f"{field}: {text!r} is no name or address of a machine; the port is in the "
                    "token",
                    field=field,
                )

    @property
    def redis_url(self) -> str:
        """The mesh's Redis."""
        return redis_url(self.host, self.token.port, self.token.secret)

    def services(
        self, address: str, logs: Path, inherited: Mapping[str, str] = os.environ
    ) -> list[ServiceSpec]:
        """The workers.

        Args:
            address: of this machine.
            logs: where their logs go.
            inherited: environment that they start from; settings in it reach them.
        """
        settings = {
            "UELLM_REDIS_URL": self.redis_url,
            "UELLM_HOST": address,
            "UELLM_WORKER_ALLOW_DOWNLOAD": str(self.allow_download),
        }
        if self.devices:
            settings["UELLM_WORKER_DEVICES"] = self.devices
        # The process tells two calls on one host apart.
        names = [
            f"worker-{socket.gethostname()}-{os.getpid()}-{number}"
            for number in range(1, self.workers + 1)
        ]
        return [
            ServiceSpec(
                service_id=name,
                role="worker",
                command=(sys.executable, "-m", "uellm_worker"),
                log=logs / f"{name}.log",
                environment={**inherited, **settings, "UELLM_WORKER_SERVICE_ID": name},
            )
            for name in names
        ]


class Guests:
    """Workers of this machine in a mesh elsewhere.

    Args:
        options: which, and where.
    """

    def __init__(self, options: JoinOptions) -> None:
        self._options = options
        self.directory = runs(home()) / f"{time.strftime('%Y%m%d-%H%M%S')}-join-{os.getpid()}"
        self._services: list[Supervised] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._redis: Any = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[list[topology_pb2.Device]]:
        """Join; yields the devices that the mesh has gained. Leaves in order afterwards.

        Raises:
            ConfigurationError: if one of the two does not reach the other, or the token is not its.
            UnavailableError: if its deployer does not hear of the workers.
        """
        options = self._options
        self._redis = connect(options.redis_url)
        try:
            await self._check()
            address = options.address or address_towards(options.host, options.token.port)
            for spec in options.services(address, self.directory):
                service = Supervised(spec)
                self._services.append(service)
                self._tasks.append(asyncio.create_task(service.run(), name=spec.service_id))
            yield await self._joined()
        finally:
            await asyncio.gather(*(service.stop(DRAIN_SECONDS) for service in self._services))
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._redis.aclose()

    async def watch(self) -> None:
        """Return never; raise when a worker had to be given up, or the mesh."""
        # Beside the workers: it is ended with them.
        lost = until_lost(self._redis, self._options.host)
        self._tasks.append(asyncio.create_task(lost, name="mesh"))
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    def kill(self) -> None:
        """End all workers at once."""
        for service in self._services:
            service.kill()

    async def _check(self) -> None:
        host, port = self._options.host, self._options.token.port
        try:
            await self._redis.ping()
            deployers = await Registry(self._redis).find("deployer")
        except AuthenticationError:
            raise ConfigurationError(
                f"--token is not of the mesh at {host}; each start of `uellm up --listen` prints "
                "a new one",
                field="token",
            ) from None
        except (RedisError, OSError) as error:
            raise ConfigurationError(
                f"no mesh answers at {host}, port {port} ({error}); is `uellm up --listen` running "
                "there, and does its firewall let this machine in?",
                field="host",
            ) from None
        for deployer in deployers:
            if deployer.version not in ("", __version__):
                raise ConfigurationError(
                    f"the mesh at {host} is of uellm {deployer.version}, and this machine has "
                    f"{__version__}; install the same one here",
                    field="version",
                )

    async def _joined(self) -> list[topology_pb2.Device]:
        """The devices of these workers, once the deployer knows and reaches them all."""
        names = {service.spec.service_id for service in self._services}
        began = reached = time.monotonic()
        while time.monotonic() - began < patience(self._services):
            for task in self._tasks:
                if task.done():
                    task.result()
            try:
                workers = [w for w in await self._workers() if w.worker in names]
            except UNREACHABLE as error:
                host = self._options.host
                raise UnavailableError(
                    f"the mesh at {host} went away while this machine joined ({error}); join again "
                    "with what `uellm up --listen` prints there"
                ) from None
            away = [w.address for w in workers if w.HasField("reachable") and not w.reachable]
            if not away:
                reached = time.monotonic()
            elif time.monotonic() - reached > REACH_SECONDS:
                raise ConfigurationError(
                    f"the mesh at {self._options.host} cannot reach this machine at "
                    f"{', '.join(away)}; name an address that leads here with --address, and let "
                    "this machine's firewall let the mesh in, at all ports",
                    field="address",
                )
            if len(workers) == len(names) and all(worker.reachable for worker in workers):
                return [device for worker in workers for device in worker.devices]
            await asyncio.sleep(_POLL_SECONDS)
        raise UnavailableError(
            f"the mesh's deployer has not heard of this machine's workers within "
            f"{patience(self._services):.0f} s; "
            f"{'; '.join(filter(None, (s.ended for s in self._services))) or 'none has ended'}; "
            f"their logs: {self.directory}"
        )

    async def _workers(self) -> list[deployer_pb2.WorkerStatus]:
        for deployer in await Registry(self._redis).find("deployer"):
            async with channel(deployer.address) as connection:
                stub: Any = deployer_pb2_grpc.DeployerServiceStub(connection)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    described = await stub.Describe(
                        deployer_pb2.DescribeRequest(), timeout=CALL_SECONDS
                    )
                    return list(described.workers)
        return []


async def until_lost(redis: RedisClient, host: str, seconds: float = LOST_SECONDS) -> None:
    """Return never; say when a mesh does not answer, and when it does again.

    Args:
        redis: of the mesh.
        host: where it runs.
        seconds: how long it is waited for.

    Raises:
        UnavailableError: if it has not answered for so long.
    """
    answered, away = time.monotonic(), False
    while True:
        try:
            await redis.ping()
        except (RedisError, OSError) as error:
            silent = time.monotonic() - answered
            if silent > seconds:
                raise UnavailableError(
                    f"the mesh at {host} has not answered for {silent:.0f} s ({error}); start it "
                    "there, and run here what `uellm up --listen` prints then"
                ) from None
            if not away:
                _log.warning("the mesh does not answer; trying on", host=host, error=str(error))
            away = True
        else:
            if away:
                _log.warning("the mesh answers again", host=host)
            answered, away = time.monotonic(), False
        await asyncio.sleep(min(_PING_SECONDS, seconds / 4))


def address_towards(host: str, port: int) -> str:
    """This machine's address, as connections to ``host`` carry it.

    Raises:
        ConfigurationError: if no way leads there.
    """
    try:
        found = socket.getaddrinfo(bare(host), port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # Of datagrams, connecting sends none: it only looks up the route.
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigurationError(
            f"no way leads to {host} ({error}); correct the address", field="host"
        ) from None
