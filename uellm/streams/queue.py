"""One model's queues and records: the typed face of the Lua scripts.

Who calls what: gateways ``accept``, ``watch``, ``cancel`` and read logs and frames; the model's
scheduler ``own``s it, reads ``requests``, ``promise``s, ``dispatch``es, ``reap``s and ``finish``es;
a replica's leader reads ``batches`` and ``append``s; the deployer ``route``s.

A call that raises a connection error may or may not have taken effect. ``accept`` (same id),
``append``, ``dispatch``, ``finish``, ``cancel``, ``hand_back``, ``promise``, ``route`` and
``watch`` may all be repeated as they were: a second run finds the first one's effect, does nothing
more and answers as the first would have. Reads may be repeated too: see ``reading``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from uellm.convert import load_from_proto
from uellm.core.errors import AbortedError
from uellm.core.load import OfferedLoad
from uellm.streams.connection import RedisClient
from uellm.streams.keys import Keys
from uellm.streams.messages import (
    RETENTION_SECONDS,
    Record,
    ReplicaRoute,
    not_found,
    parse_policy,
    parse_record,
)
from uellm.streams.reading import ensure_group
from uellm.streams.scripts import Scripts
from uellm.v1 import common_pb2, queue_pb2


class ModelQueue:
    """The queues and records of one model.

    Args:
        redis: the client.
        model: which model.
        scripts: shared with others, or its own.
        retention_seconds: how long records, logs and keys are kept of those that end here.
    """

    def __init__(
        self,
        redis: RedisClient,
        model: str,
        scripts: Scripts | None = None,
        retention_seconds: int = RETENTION_SECONDS,
    ) -> None:
        self.keys = Keys(model)
        self.model = model
        self._retention_seconds = retention_seconds
        self._redis = redis
        self._scripts = scripts or Scripts(redis)

    async def _run(self, script: str, *arguments: Any) -> list[Any]:
        return await self._scripts(script, self.keys.prefix, *arguments)

    def _fenced(self, reply: list[Any]) -> list[Any]:
        if reply[0] == b"stale":
            raise AbortedError(f"another holder took over {self.model}")
        return reply

    async def policy(self) -> common_pb2.ModelPolicy | None:
        """What was chosen for the model while running; None: nothing was."""
        return parse_policy(await self._redis.get(self.keys.policy))

    async def offered(self) -> OfferedLoad | None:
        """What the model's scheduler last saw of its load; None: no scheduler owns it."""
        packed = await self._redis.get(self.keys.offered)
        return load_from_proto(queue_pb2.OfferedLoad.FromString(packed)) if packed else None

    async def record(self, request_id: str) -> Record:
        """A request's record.

        Raises:
            NotFoundError: if there is none.
        """
        raw = await self._redis.hgetall(self.keys.request(request_id))
        if not raw:
            raise not_found(request_id)
        return parse_record(request_id, raw)

    async def records(self, request_ids: Sequence[str]) -> list[Record | None]:
        """Several records in one round trip; None where there is none."""
        pipeline = self._redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hgetall(self.keys.request(request_id))
        return [
            parse_record(request_id, raw) if raw else None
            for request_id, raw in zip(request_ids, await pipeline.execute(), strict=True)
        ]

    async def read_log(self, request_id: str, next_offset: int) -> list[queue_pb2.LogChunk]:
        """The logged chunks that hold tokens from ``next_offset`` on, in order."""
        start = f"{next_offset + 1}-0"
        entries = await self._redis.xrange(self.keys.log(request_id), min=start)
        return [queue_pb2.LogChunk.FromString(fields[b"payload"]) for _, fields in entries]

    async def routes(self, replicas: Iterable[str]) -> dict[str, ReplicaRoute]:
        """Routes and reports of those of ``replicas`` that have any."""
        names = list(replicas)
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.hmget(self.keys.replica(name), ["epoch", "state", "report", "reported_ms"])
        routes = {}
        for name, (epoch, state, report, reported) in zip(
            names, await pipeline.execute(), strict=True
        ):
            if epoch is not None:
                routes[name] = ReplicaRoute(
                    replica=name,
                    epoch=int(epoch),
                    state=state.decode(),
                    report=queue_pb2.ReplicaReport.FromString(report or b""),
                    reported_at=int(reported or 0) / 1000,
                )
        return routes

    async def route(
        self, replica: str, epoch: int, state: str, report: queue_pb2.ReplicaReport | None = None
    ) -> bool:
        """Point a replica's route to an epoch; returns False if a newer one is routed."""
        await ensure_group(self._redis, self.keys.batches(replica), "leader")
        (taken,) = await self._run(
            "route", replica, epoch, state, report.SerializeToString() if report else b""
        )
        return bool(taken)
