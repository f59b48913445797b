"""What a leader says to the log, said once even when replies are lost."""

import asyncio
from collections.abc import Mapping, Sequence

from redis.exceptions import ResponseError

from uellm.logs import logger
from uellm.streams.connection import UNREACHABLE
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append, Finish, Record
from uellm.v1 import queue_pb2
from uellm_worker.answer import Operation

_log = logger("journal")
RETRY_SECONDS = 0.2
_REFUSALS = (
    *("MISCONF", "NOREPLICAS", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "OOM", "READONLY"),
    *("command not allowed when", "You can't write"),
)


def passing(error: Exception) -> bool:
    """Whether Redis is away, or refuses for now: a full disk, full memory, a failover."""
    if isinstance(error, UNREACHABLE):
        return True
    return isinstance(error, ResponseError) and str(error).startswith(_REFUSALS)


def remaining(
    operations: Sequence[Operation], records: Mapping[str, Record | None]
) -> tuple[list[Operation], list[str]]:
    """Which operations have not taken effect yet, by the records, and which requests are lost.

    A request that ended or was taken over after an append of unknown outcome is only called lost
    where its holder would still go on with it: after a finish of its own it does not care whose.
    """
    left: list[Operation] = []
    lost: dict[str, None] = {}
    for operation in operations:
        record = records.get(operation.request_id)
        if record is None or record.ended or record.generation != operation.generation:
            lost[operation.request_id] = None
            continue
        if isinstance(operation, Append):
            tokens = operation.tokens
            if tokens.offset + len(tokens.ids) <= record.tokens:
                continue
        left.append(operation)
    finished = {o.request_id for o in operations if isinstance(o, Finish)}
    return left, [request_id for request_id in lost if request_id not in finished]


class Journal:
    """Appends of one replica under one epoch.

    Args:
        queue: the model's.
        replica: whose.
        epoch: under which it is routed to.
        lease_seconds: how long a holder may be silent.
    """

    def __init__(self, queue: LeaderQueue, replica: str, epoch: int, lease_seconds: float) -> None:
        self._queue = queue
        self._replica = replica
        self._epoch = epoch
        self._lease_ms = round(lease_seconds * 1000)

    async def append(
        self,
        operations: Sequence[Operation],
        report: queue_pb2.ReplicaReport | None,
        renew: Sequence[str],
    ) -> list[str]:
        """Say it, however long Redis is away; returns the ids of requests that were lost.

        Raises:
            AbortedError: if the replica is no longer routed to under the epoch.
        """
        left = list(operations)
        lost: list[str] = []
        unsure = False
        while True:
            try:
                if unsure:
                    left, gone = remaining(left, await self._records(left))
                    lost += gone
                reply = await self._queue.append(
                    self._replica,
                    self._epoch,
                    self._lease_ms,
                    report=report,
                    renew=renew,
                    operations=left,
                )
                if unsure and reply:
                    reply = await self._really_lost(left, reply)
                return lost + reply
            except (*UNREACHABLE, ResponseError) as error:
                if not passing(error):
                    raise
                if not unsure:
                    _log.warning(
                        "an append got no answer; trying on",
                        replica=self._replica,
                        error=str(error),
                    )
                unsure = True
                await asyncio.sleep(RETRY_SECONDS)

    async def _records(self, operations: Sequence[Operation]) -> dict[str, Record | None]:
        ids = list(dict.fromkeys(operation.request_id for operation in operations))
        return dict(zip(ids, await self._queue.records(ids), strict=True)) if ids else {}

    async def _really_lost(self, operations: Sequence[Operation], ids: list[str]) -> list[str]:
        """Of ``ids``, reported lost by a repeat, those that are.

        A server that was stopped may have carried out the first append only after the records
        were read; its effect is then what the repeat stumbled over.
        """
        theirs = [operation for operation in operations if operation.request_id in ids]
        left, gone = remaining(theirs, await self._records(theirs))
        unapplied = [o.request_id for o in left if isinstance(o, Append | Finish)]
        return [i for i in dict.fromkeys(ids) if i in gone or i in unapplied]
