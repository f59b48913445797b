"""Waiting for a condition instead of for time."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")

HANG_SECONDS = 120.0
"""What takes longer on the busiest machine never ends."""


@overload
async def eventually(
    predicate: Callable[[], Awaitable[T]], timeout: float = HANG_SECONDS, interval: float = 0.01
) -> T: ...


@overload
async def eventually(
    predicate: Callable[[], T], timeout: float = HANG_SECONDS, interval: float = 0.01
) -> T: ...


async def eventually(
    predicate: Callable[[], Any], timeout: float = HANG_SECONDS, interval: float = 0.01
) -> Any:
    """What ``predicate`` returns as soon as that is true; it may be a coroutine function.

    An AssertionError that it raises counts as not yet, and is the error if time runs out.

    Raises:
        AssertionError: if it did not come true within ``timeout`` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        failure: AssertionError | None = None
        try:
            result = predicate()
            value = await result if inspect.isawaitable(result) else result
            if value:
                return value
        except AssertionError as error:
            failure = error
        if loop.time() >= deadline:
            raise failure or AssertionError(f"not within {timeout} s: {predicate}")
        await asyncio.sleep(interval)


async def stays(
    predicate: Callable[[], bool | Awaitable[bool]], seconds: float, interval: float = 0.05
) -> None:
    """Fail as soon as ``predicate`` is false within the next ``seconds``."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while loop.time() < deadline:
        result = predicate()
        assert await result if inspect.isawaitable(result) else result
        await asyncio.sleep(interval)
