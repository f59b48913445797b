"""Few connections for many calls: scripts called at the same time share a round trip.

A gateway under load calls ``accept`` from hundreds of tasks at once. One connection each would be
a connection storm, and most of the cost is per round trip: in a pipeline a script costs a third.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError, ResponseError

from uellm.streams.connection import RedisClient
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.messages import Record, Standing
from uellm.streams.scripts import NAMES, Scripts, source
from uellm.v1 import queue_pb2

MOST_PER_ROUND_TRIP = 64
CONCURRENT_READS = 16
ROUND_TRIPS = 2
"""How many may be under way at once: one on its way while the next is put together."""

_Call = tuple[str, str, tuple[Any, ...], "asyncio.Future[Any]"]


class BatchedScripts(Scripts):
    """All scripts on one client, sent in pipelines.

    A caller that is cancelled does not take its script back: it may still run, as with a lost
    reply.
    """

    def __init__(self, redis: RedisClient) -> None:
        super().__init__(redis)
        self._redis = redis
        self._waiting: list[_Call] = []
        self._senders: set[asyncio.Task[None]] = set()

    async def __call__(self, name: str, prefix: str, *arguments: Any) -> list[Any]:
        """Run script ``name`` on the keys behind ``prefix``."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((name, prefix, arguments, future))
        if len(self._senders) < ROUND_TRIPS:
            sender = asyncio.create_task(self._send(), name="scripts")
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        result = await future
        return result if isinstance(result, list) else [result]

    async def _send(self) -> None:
        while self._waiting:
            calls = self._waiting[:MOST_PER_ROUND_TRIP]
            del self._waiting[:MOST_PER_ROUND_TRIP]
            try:
                results = await self._round_trip(calls)
                if any(isinstance(result, NoScriptError) for result in results):
                    results = await self._again(calls, results)
            except BaseException as error:
                _fail(calls, error)
                if not isinstance(error, Exception):
                    raise
                continue
            for (_, _, _, future), result in zip(calls, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    async def _round_trip(self, calls: list[_Call]) -> list[Any]:
        commands = [
            ("EVALSHA", self._scripts[name].sha, 1, prefix, *arguments)
            for name, prefix, arguments, _ in calls
        ]
        if len(commands) == 1:
            # A pipeline of one costs half as much again.
            try:
                return [await self._redis.execute_command(*commands[0])]
            except ResponseError as error:
                return [error]
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        results: list[Any] = await pipeline.execute(raise_on_error=False)
        return results

    async def _again(self, calls: list[_Call], results: list[Any]) -> list[Any]:
        """Load the scripts into a server that lost them; repeat what did not run."""
        for name in NAMES:
            await self._redis.script_load(source(name))
        missing = [i for i, result in enumerate(results) if isinstance(result, NoScriptError)]
        for i, result in zip(
            missing, await self._round_trip([calls[i] for i in missing]), strict=True
        ):
            results[i] = result
        return results


def _fail(calls: list[_Call], error: BaseException) -> None:
    for _, _, _, future in calls:
        if future.done():
            continue
        if isinstance(error, Exception):
            future.set_exception(error)
        else:
            future.cancel()


class SharedQueue(GatewayQueue):
    """A model's queues over few connections.

    A read takes a connection for itself; a thousand clients that resume at once wait for some.

    Args:
        redis: the client.
        model: which model.
        scripts: shared by all models.
        reads: bounds the reads of all models.
        retention_seconds: see ModelQueue.
    """

    def __init__(
        self,
        redis: RedisClient,
        model: str,
        scripts: Scripts,
        reads: asyncio.Semaphore,
        retention_seconds: int,
    ) -> None:
        super().__init__(redis, model, scripts, retention_seconds)
        self._reads = reads

    async def record(self, request_id: str) -> Record:
        """See ModelQueue."""
        async with self._reads:
            return await super().record(request_id)

    async def read_log(self, request_id: str, next_offset: int) -> list[queue_pb2.LogChunk]:
        """See ModelQueue."""
        async with self._reads:
            return await super().read_log(request_id, next_offset)

    async def standings(self, request_ids: Sequence[str]) -> list[Standing | None]:
        """See GatewayQueue."""
        async with self._reads:
            return await super().standings(request_ids)
