"""A replica leader's side of a model's queues."""

from collections.abc import Sequence
from typing import Any

from uellm.streams.connection import RedisClient
from uellm.streams.messages import (
    RETENTION_SECONDS,
    Append,
    BatchMessage,
    Finish,
    Start,
    operation_arguments,
    parse_batch,
)
from uellm.streams.queue import ModelQueue
from uellm.streams.reading import GroupReader, ensure_group
from uellm.streams.scripts import Scripts
from uellm.v1 import queue_pb2


class LeaderQueue(ModelQueue):
    """A replica leader's side of a model's queues."""

    def __init__(
        self,
        redis: RedisClient,
        model: str,
        scripts: Scripts | None = None,
        retention_seconds: int = RETENTION_SECONDS,
    ) -> None:
        super().__init__(redis, model, scripts, retention_seconds)
        self._batches: dict[str, GroupReader] = {}

    async def read_batches(
        self, replica: str, epoch: int, count: int, block_ms: int | None, *, pending: bool = False
    ) -> list[BatchMessage]:
        """New entries for a replica, at most ``count``.

        With ``pending``: all that were read under this epoch before and are not finished.
        After a call that failed, and after Redis lost its data, an entry may come twice, with the
        same generation. A group that is gone is created again, at 0.
        """
        stream = self.keys.batches(replica)
        reader = self._batches.setdefault(stream, GroupReader(self._redis, stream, "leader"))
        entries = await (
            reader.read_pending(str(epoch), count)
            if pending
            else reader.read(str(epoch), count, block_ms)
        )
        return [parse_batch(entry_id, fields) for entry_id, fields in entries if fields]

    async def ensure_batches_group(self, replica: str) -> None:
        """Create the leaders' group of a replica, at 0: nothing that waits is skipped."""
        await ensure_group(self._redis, self.keys.batches(replica), "leader")

    async def drop_batch_entries(self, replica: str, entry_ids: Sequence[str]) -> None:
        """Acknowledge entries that need no more work: cancellations, other epochs' leftovers."""
        key = self.keys.batches(replica)
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xack(key, "leader", *entry_ids)
            pipeline.xdel(key, *entry_ids)
            await pipeline.execute()

    async def append(
        self,
        replica: str,
        epoch: int,
        lease_ms: int,
        *,
        report: queue_pb2.ReplicaReport | None = None,
        renew: Sequence[str] = (),
        operations: Sequence[Start | Append | Finish] = (),
    ) -> list[str]:
        """Say everything that one engine step has to say, at once.

        A call whose reply was lost may be repeated with the same operations, in the same order;
        others may follow them in the same call. What took effect the first time, the end of a
        request included, is neither done again nor reported as lost. ``renew`` names requests
        that this replica holds under ``epoch``; leases of others are left alone.

        Returns the ids of requests that this holder has lost: they ended by another hand or were
        taken over. Operations on them had no effect.

        Raises:
            AbortedError: if the replica is no longer routed to under ``epoch``.
            ValueError: if an Append has no tokens.
        """
        arguments: list[Any] = [len(renew), *renew]
        for operation in operations:
            arguments += operation_arguments(operation)
        reply = self._fenced(
            await self._run(
                "append",
                replica,
                epoch,
                report.SerializeToString() if report is not None else b"",
                lease_ms,
                self._retention_seconds,
                *arguments,
            )
        )
        return [request_id.decode() for request_id in reply[1]]

    async def hand_back(
        self, replica: str, epoch: int, requests: Sequence[tuple[str, int]]
    ) -> list[bool]:
        """Return requests, given as (id, generation), to the scheduler with what they have.

        Raises:
            AbortedError: if the replica is no longer routed to under ``epoch``.
        """
        arguments = [part for request in requests for part in request]
        reply = self._fenced(await self._run("hand_back", replica, epoch, *arguments))
        return [bool(returned) for returned in reply[1]]
