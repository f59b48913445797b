"""One way to reach Redis, with the settings that the queue protocol needs."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from uellm.core.errors import ConfigurationError, ResourceExhaustedError

# redis-py types every reply as the union of all its modes; this project uses one (bytes).
RedisClient: TypeAlias = Any

# Longer than any blocking read, which would otherwise be taken for a lost connection.
SOCKET_TIMEOUT_SECONDS = 10.0
BLOCK_MS = 2000

UNREACHABLE = (
    RedisConnectionError,
    RedisTimeoutError,
    OSError,
    OutOfMemoryError,
    ReadOnlyError,
)
"""What a call raises when Redis is away, or there and taking no writes: to be tried again later.

Whether the call took effect is then unknown.
"""


class _Connection:
    """A connection that can be cancelled while it sends, and says when Redis takes no writes.

    redis-py sends under ``asyncio.wait_for``. Before Python 3.12 that loses a cancellation which
    comes as the sending ends: a loop of reads that is stopped then goes on for ever.
    """

    socket_timeout: float | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        seconds, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(seconds):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError:
            raise RedisTimeoutError("Timeout writing to socket") from None
        finally:
            self.socket_timeout = seconds

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except ResponseError as error:
            # Its disk is full or failing, or its replicas are gone. It answers again as before when
            # that is over.
            if str(error).startswith(("MISCONF", "NOREPLICAS")):
                raise RedisConnectionError(str(error)) from None
            raise


def connect(url: str) -> RedisClient:
    """A client without automatic retries.

    redis-py retries by default, and a lost reply then adds an entry twice. Only callers know
    which of their calls may be repeated.

    Raises:
        ConfigurationError: if ``url`` is not a Redis URL.
    """
    try:
        client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            socket_timeout=SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=3.0,
            socket_keepalive=True,
            health_check_interval=0,
            decode_responses=False,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"UELLM_REDIS_URL: {error}; for instance redis://localhost:6379/0",
            field="redis_url",
        ) from None
    pool = client.connection_pool
    pool.connection_class = type("Connection", (_Connection, pool.connection_class), {})
    return client


@contextmanager
def refused_if_full() -> Iterator[None]:
    """Writes in it that Redis has no memory for are errors that callers understand.

    Raises:
        ResourceExhaustedError: in place of Redis' own.
    """
    try:
        yield
    except OutOfMemoryError:
        raise ResourceExhaustedError(
            "Redis is at its memory limit; waiting requests free some as they end",
            reason="QUEUE_MEMORY",
            retry_after_seconds=5.0,
        ) from None


async def check(redis: RedisClient, url: str) -> None:
    """Fail unless Redis answers.

    Raises:
        ConfigurationError: naming the address and the remedy.
    """
    try:
        await redis.ping()
    except (RedisError, OSError) as error:
        raise ConfigurationError(
            f"no Redis at {url.rsplit('@', 1)[-1]} ({error}); start one, or set UELLM_REDIS_URL",
            field="redis_url",
        ) from None
