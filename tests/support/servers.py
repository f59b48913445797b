"""Servers that queues run on: processes of this host, or Redis as compose.yaml has it."""

import shutil
from collections.abc import Callable
from typing import Protocol, Self

from uellm.embedded import EmbeddedRedis, find_server


class Server(Protocol):
    """One that can be killed, and comes back with what it has written down."""

    @property
    def url(self) -> str: ...
    def start(self) -> object: ...
    def kill(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *failure: object) -> None: ...


MakeServer = Callable[[], Server]


def maker_of(kind: str) -> MakeServer:
    """What makes servers of a kind; skips the test where there is none."""
    binary = find_server() if kind == "valkey" else shutil.which("redis-server")
    if binary is None:
        # Slow to import, and of no use where there is a redis-server.
        from tests.support.redis_container import maker  # noqa: PLC0415

        return maker()
    return lambda: EmbeddedRedis(binary=binary)
