"""A replica leader's side of a model's queues."""

from collections.abc import Sequence
from typing import Any

from uellm.streams.messages import (
    RETENTION_SECONDS,
    Append,
    BatchMessage,
    Finish,
    Start,
    operation_arguments,
    parse_batch,
    stream_entries,
)
from uellm.streams.queue import ModelQueue
from uellm.v1 import queue_pb2


class LeaderQueue(ModelQueue):
    """A replica leader's side of a model's queues."""

    async def read_batches(
        self, replica: str, epoch: int, count: int, block_ms: int | None, *, pending: bool = False
    ) -> list[BatchMessage]:
        """New entries for a replica, or with ``pending`` those read before and not finished."""
        streams = await self._redis.xreadgroup(
            "leader",
            str(epoch),
            {self.keys.batches(replica): "0" if pending else ">"},
            count,
            None if pending else block_ms,
        )
        return [
            parse_batch(entry_id, fields) for entry_id, fields in stream_entries(streams) if fields
        ]

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
        retention_seconds: int = RETENTION_SECONDS,
    ) -> list[str]:
        """Say everything that one engine step has to say, at once.

        Returns the ids of requests that this holder has lost (ended or taken over).

        Raises:
            AbortedError: if the replica is no longer routed to under ``epoch``.
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
                retention_seconds,
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
