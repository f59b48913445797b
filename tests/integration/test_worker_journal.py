"""Appends whose replies are lost, on real servers: each token is logged once, no end is missed."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from uellm_worker import journal as module
from uellm_worker.journal import Journal

from tests.support.queues import LEASE_MS, MODEL, REPLICA, Sides, append, finish
from uellm.core.errors import AbortedError
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Start


class LossyQueue(LeaderQueue):
    """Loses calls on the way there or back."""

    def __init__(self, redis: Any, seed: int) -> None:
        super().__init__(redis, MODEL)
        self._random = random.Random(seed)  # noqa: S311 - repeatable
        self.lost = 0

    async def append(self, *arguments: Any, **named: Any) -> list[str]:
        fate = self._random.choice(["kept", "call lost", "reply lost", "refused"])
        self.lost += fate != "kept"
        if fate == "call lost":
            raise RedisConnectionError("lost on the way there")
        if fate == "refused":
            raise ResponseError("MISCONF Redis is configured to save RDB snapshots")
        reply = await super().append(*arguments, **named)
        if fate == "reply lost":
            raise RedisConnectionError("lost on the way back")
        return reply


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)


@pytest.mark.parametrize("seed", range(5))
async def test_each_token_is_logged_once(sides: Sides, seed: int) -> None:
    first = await sides.held()
    second = await sides.held()
    queue = LossyQueue(sides.redis, seed)
    journal = Journal(queue, REPLICA, 1, LEASE_MS / 1000)
    expected: Sequence[int] = []
    for offset in range(0, 40, 4):
        run = list(range(offset, offset + 4))
        operations = [
            Start(first, 1),
            append(first, 1, offset, run),
            append(second, 1, offset, run),
        ]
        if offset == 36:
            operations.append(finish(first, 1))
        assert await journal.append(operations, None, [second]) == []
        expected = [*expected, *run]
    assert queue.lost > 0
    assert await sides.logged(first) == expected == await sides.logged(second)
    assert (await sides.gateway.record(first)).state == "DONE"
    assert (await sides.gateway.record(second)).state == "RUNNING"


@pytest.mark.parametrize("seed", range(5))
async def test_what_was_taken_away_is_reported_lost(sides: Sides, seed: int) -> None:
    cancelled = await sides.held()
    kept = await sides.held()
    journal = Journal(LossyQueue(sides.redis, seed), REPLICA, 1, LEASE_MS / 1000)
    await sides.cancel(cancelled)
    operations = [append(cancelled, 1, 0, [1]), append(kept, 1, 0, [1])]
    assert await journal.append(operations, None, []) == [cancelled]
    assert await sides.logged(kept) == [1]
    assert await sides.logged(cancelled) == []


async def test_another_epoch_ends_it(sides: Sides) -> None:
    request_id = await sides.held()
    assert await sides.scheduler.route(REPLICA, 2, "READY")
    journal = Journal(sides.leader, REPLICA, 1, LEASE_MS / 1000)
    with pytest.raises(AbortedError):
        await journal.append([append(request_id, 1, 0, [1])], None, [])


async def test_a_broken_call_is_not_tried_for_ever(sides: Sides) -> None:
    class Broken(LeaderQueue):
        async def append(self, *arguments: Any, **named: Any) -> list[str]:
            raise ResponseError("ERR wrong number of arguments")

    journal = Journal(Broken(sides.redis, MODEL), REPLICA, 1, LEASE_MS / 1000)
    with pytest.raises(ResponseError):
        await journal.append([], None, [])
