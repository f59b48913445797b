"""What the profilers keep in Redis: what was learnt, its versions, how far completions were read.

One profiler writes, under its lease; all read. Everything is written by one script in one go, so
that no reader finds the predictions of one version under the name of another.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from uellm.core.errors import AbortedError
from uellm.prediction.interface import Predictor, State
from uellm.prediction.states import pack, unpack
from uellm.streams.connection import RedisClient
from uellm.streams.keys import Keys
from uellm.streams.messages import entries_by_stream
from uellm.streams.scripts import Scripts
from uellm.v1 import profiler_pb2, queue_pb2

PREFIX = "uellm:{:profilers}:"
"""No model's keys: their names begin with a letter or a digit."""
LEARNT, PAST, VERSIONS, STATES = "learnt", "past", "versions", "states"
WANTED = f"{PREFIX}wanted"
KEPT_VERSIONS = 8


@dataclass(frozen=True, slots=True)
class Learnt:
    """What serves.

    Attributes:
        kind: of predictor, see ``kind_of``.
        number: of the version.
        revision: rises with every change.
        state: what it predicts by.
    """

    kind: str
    number: int
    revision: int
    state: State


@dataclass(frozen=True, slots=True)
class Past:
    """What a learner goes on from.

    Attributes:
        kind: of predictor, see ``kind_of``.
        state: all that it has learnt.
        places: how far the completions of each model have been read for it.
    """

    kind: str
    state: State
    places: Mapping[str, str]


def kind_of(predictor: Predictor) -> str:
    """What states are of: those of another predictor, or of another version of it, do not fit."""
    return f"{predictor.name}/{predictor.version}"


class Store:
    """The profilers' part of Redis."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._scripts = Scripts(redis)

    async def revision(self) -> int:
        """Which revision serves; 0: nothing has been kept yet."""
        return int(await self._redis.hget(PREFIX + LEARNT, "revision") or 0)

    async def learnt(self) -> Learnt | None:
        """What serves; None before the first.

        Raises:
            InvalidArgumentError: if it cannot be read.
        """
        raw = await self._redis.hgetall(PREFIX + LEARNT)
        if not raw:
            return None
        return Learnt(
            raw[b"kind"].decode(),
            int(raw[b"number"]),
            int(raw[b"revision"]),
            unpack(raw[b"state"]),
        )

    async def past(self) -> Past | None:
        """What a learner goes on from; None before the first.

        Raises:
            InvalidArgumentError: if it cannot be read.
        """
        raw = await self._redis.hgetall(PREFIX + PAST)
        if not raw:
            return None
        return Past(raw[b"kind"].decode(), unpack(raw[b"state"]), json.loads(raw[b"places"]))

    async def keep(
        self,
        token: int,
        learnt: Learnt,
        past: Past | None = None,
        version: profiler_pb2.PredictorVersion | None = None,
    ) -> None:
        """Let it serve; as a new version, if one is given.

        Args:
            token: of the learner's lease.
            learnt: what serves from now on.
            past: what a learner goes on from; None: as before.
            version: to be remembered, with its past, under its number; the oldest are forgotten.

        Raises:
            AbortedError: if another profiler is the learner now.
        """
        packed = await asyncio.to_thread(pack, learnt.state)
        fields: list[tuple[str, str | int, bytes | str | int]] = [
            (LEARNT, "kind", learnt.kind),
            (LEARNT, "number", learnt.number),
            (LEARNT, "revision", learnt.revision),
            (LEARNT, "state", packed),
        ]
        if past is not None:
            packed = await asyncio.to_thread(pack, past.state)
            fields += [
                (PAST, "kind", past.kind),
                (PAST, "state", packed),
                (PAST, "places", json.dumps(dict(past.places))),
                (STATES, learnt.number, packed),
            ]
        if version is not None:
            fields.append((VERSIONS, learnt.number, version.SerializeToString()))
            for old in (await self.versions())[: -KEPT_VERSIONS + 1]:
                fields += [(VERSIONS, old.number, ""), (STATES, old.number, "")]
        flat = [part for field in fields for part in field]
        if (await self._scripts("learnt", PREFIX, token, *flat))[0] == b"stale":
            raise AbortedError("another profiler learns now")

    async def versions(self) -> list[profiler_pb2.PredictorVersion]:
        """The versions that are kept, the latest last."""
        raw = await self._redis.hgetall(PREFIX + VERSIONS)
        found = [profiler_pb2.PredictorVersion.FromString(value) for value in raw.values()]
        return sorted(found, key=lambda version: version.number)

    async def completions(
        self, places: Mapping[str, str], models: Iterable[str], count: int, block_ms: int
    ) -> list[tuple[str, str, queue_pb2.CompletionEvent]]:
        """What finished: the model, the place behind it, and the event; in the order of each model.

        Args:
            places: how far each model was read; those that are missing from the start.
            models: which.
            count: at most so many of each.
            block_ms: how long to wait for the first.
        """
        keys = {Keys(model).completions.encode(): model for model in models}
        after = {key: places.get(model, "0") for key, model in keys.items()}
        found = await self._redis.xread(after, count, block_ms)
        return [
            (
                keys[key],
                entry.decode(),
                queue_pb2.CompletionEvent.FromString(fields.get(b"payload", b"")),
            )
            for key, entries in entries_by_stream(found).items()
            for entry, fields in entries
        ]

    async def state(self, number: int) -> State | None:
        """What a version had learnt when that was kept last; None if it is not kept."""
        packed = await self._redis.hget(PREFIX + STATES, number)
        return unpack(packed) if packed else None

    async def want(self, number: int) -> None:
        """Ask the learner to let an earlier version serve."""
        await self._redis.set(WANTED, number)

    async def wanted(self) -> int:
        """The version that was asked for, once; 0: none was."""
        return int(await self._redis.getdel(WANTED) or 0)
