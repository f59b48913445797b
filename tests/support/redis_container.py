"""Redis in a container that can be killed and started again, as ``EmbeddedRedis`` can."""

import socket
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest
import yaml
from docker.errors import DockerException
from testcontainers.community.redis import PingWaitStrategy, RedisContainer
from testcontainers.core.config import testcontainers_config
from testcontainers.core.docker_client import DockerClient, get_docker_host

from tests.support.servers import MakeServer
from tests.support.waiting import HANG_SECONDS
from uellm.embedded import free_port, redis_url

COMPOSE = Path(__file__).parents[2] / "compose.yaml"
ENGINE = "unix:///var/run/docker.sock"
CONNECT_SECONDS = 2.0
PORT = 6379
# What would clean up after a killed test run is an image more to fetch, which is given the engine.
testcontainers_config.ryuk_disabled = True


class RedisInContainer(RedisContainer):
    """A server of an image, at the same port of this host whenever it is started."""

    def __init__(self, image: str, command: str) -> None:
        super().__init__(image, PORT)
        self._ready = PingWaitStrategy()
        self._ready.with_startup_timeout(int(HANG_SECONDS)).with_poll_interval(0.05)
        self._host_port = free_port()
        self.with_bind_ports(PORT, self._host_port)
        self.with_command(command)
        self.waiting_for(self._ready)

    @property
    def url(self) -> str:
        return redis_url(self.get_container_host_ip(), self._host_port)

    def start(self) -> Self:
        if self._container is None:
            return super().start()
        self._container.start()
        self._ready.wait_until_ready(self)
        return self

    def kill(self) -> None:
        container = self.get_wrapped_container()
        container.kill()
        container.wait()


def maker() -> MakeServer:
    """What starts compose.yaml's Redis; skips the test where no Docker engine does."""
    engine = get_docker_host() or ENGINE
    redis = yaml.safe_load(COMPOSE.read_text())["services"]["redis"]
    try:
        _knock(engine)
        _fetch(redis["image"])
    except (OSError, DockerException) as error:
        pytest.skip(
            f"no redis-server on PATH, and none in a container: "
            f"{redis['image']} on the Docker engine at {engine}: {error}"
        )
    return lambda: RedisInContainer(redis["image"], redis["command"])


def _knock(engine: str) -> None:
    """Connect and leave: docker's client takes long to give up, and leaves sockets open."""
    at = urlsplit(engine)
    if at.scheme == "unix":
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(CONNECT_SECONDS)
            probe.connect(at.path)
    elif at.scheme == "tcp":
        socket.create_connection((at.hostname, at.port or 2375), CONNECT_SECONDS).close()


def _fetch(image: str) -> None:
    client = DockerClient().client
    try:
        if not client.images.list(image):
            client.images.pull(image)
    finally:
        client.close()
