"""Crashes, zombies, lost replies and a dying Redis: the history stays a good one.

The checker itself is checked by mutants: queues with one safeguard taken out.
"""

import contextlib
import random
from collections.abc import Callable

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tests.support import history as histories
from tests.support.actors import Odds, World
from tests.support.chaos import Mesh
from tests.support.queues import LEASE_MS, MODEL, REPLICA, TENANT, Sides, append, finish
from tests.support.servers import MakeServer
from tests.support.waiting import HANG_SECONDS
from uellm.embedded import EmbeddedRedis
from uellm.streams import reading, scheduler_queue
from uellm.streams.connection import RedisClient, connect
from uellm.streams.scripts import Scripts, source


async def _history_of(
    seed: int,
    *,
    seconds: float,
    requests: int,
    settle: float = HANG_SECONDS,
    odds: Odds | None = None,
    make_scripts: Callable[[RedisClient], Scripts] = Scripts,
    make_server: MakeServer = EmbeddedRedis,
) -> tuple[World, histories.Remains]:
    with make_server() as server:
        world = World(server, random.Random(seed), odds or Odds(), make_scripts)  # noqa: S311
        await Mesh(world).run(requests=requests, gateways=3, seconds=seconds, settle=settle)
        client = connect(server.url)
        remains = await histories.collect(client, MODEL)
        await client.aclose()
        return world, remains


@pytest.mark.parametrize("seed", [1, 2])
async def test_faults_leave_a_good_history(seed: int, make_server: MakeServer) -> None:
    world, remains = await _history_of(seed, seconds=2.5, requests=90, make_server=make_server)
    assert histories.violations(world.history, remains) == []
    states = [record.state for record in remains.records.values()]
    assert states.count("DONE") > len(states) / 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 110))
async def test_many_faults_leave_a_good_history(seed: int) -> None:
    odds = Odds(drop=0.02, lose=0.05, pause=0.005, crash=3.0, kill=0.5)
    world, remains = await _history_of(seed, seconds=20, requests=900, odds=odds)
    assert histories.violations(world.history, remains) == []


# ---- the checker itself --------------------------------------------------------------------------


class Mutant(Scripts):
    """The scripts with something taken out: (script, what stands there, instead)."""

    def __init__(self, redis: RedisClient, change: tuple[str, str, str]) -> None:
        super().__init__(redis)
        name, there, instead = change
        text = source(name)
        assert there in text, f"{name}.lua no longer says: {there}"
        self._scripts[name] = redis.register_script(text.replace(there, instead))


ZOMBIES = Odds(pause=0.05, crash=3.0, kill=0.0, cancel=0.3)
MUTANTS = {
    "without idempotency": ("names", ("accept", "if idem ~= '' then", "if false then")),
    "without looking for the same id": (
        "not at rest",
        ("accept", "if before then", "if false then"),
    ),
    "without offsets": ("ResponseError", ("append", "if r.tokens ~= offset then", "if false then")),
    "without acknowledging": (
        "pending",
        ("dispatch", "redis.call('XACK', P .. 'requests', 'scheduler', r.queue_entry)", ""),
    ),
    "without reaping": ("not ended", ("reap", "requeue(id, r)", "")),
    "without claiming": ("not ended", ("claim", "consumer.name ~= me", "false")),
    "cancelling what ended": (
        "completion events",
        ("cancel", "if TERMINAL[r.state] then", "if false then"),
    ),
}
UNFENCED = {
    "without fencing": (
        "append",
        "if lost[id] or not r or r.generation ~= generation or not HELD[r.state]",
        "if not r",
    ),
    "without generations": ("append", "r.generation ~= generation or", ""),
}


async def _caught(make_scripts: Callable[[RedisClient], Scripts], sign: str) -> bool:
    # How many it takes depends on what meets what: on a busy machine, less.
    for seed in range(40):
        try:
            world, remains = await _history_of(
                seed,
                seconds=1.5,
                requests=60,
                settle=2.0,
                odds=ZOMBIES,
                make_scripts=make_scripts,
            )
            found = histories.violations(world.history, remains)
        except BaseExceptionGroup as failure:
            found = [repr(error) for error in failure.exceptions]
        if any(sign in what for what in found):
            return True
    return False


QUICKLY_CAUGHT = {"without idempotency", "cancelling what ended"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICKLY_CAUGHT else pytest.mark.slow)
        for name in MUTANTS
    ],
)
async def test_queues_without_a_safeguard_are_caught(name: str) -> None:
    sign, change = MUTANTS[name]
    assert await _caught(lambda redis: Mutant(redis, change), sign)


async def test_a_group_that_skips_what_waits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_the_end(redis: RedisClient, stream: str, group: str) -> None:
        with contextlib.suppress(ResponseError):
            await redis.xgroup_create(stream, group, id="$", mkstream=True)

    monkeypatch.setattr(reading, "ensure_group", at_the_end)
    monkeypatch.setattr(scheduler_queue, "ensure_group", at_the_end)
    assert await _caught(Scripts, "not ended")


async def _zombie(redis: RedisClient, scripts: Scripts) -> list[str]:
    """A holder that hangs for longer than its lease, goes on as if nothing had been, and ends."""
    sides, written = Sides(redis, scripts), list[histories.Event]()
    await sides.open()
    await sides.scheduler.route("replica-2", 1, "READY")
    request_id = (await sides.accept(max_tokens=6, seed=7)).request_id
    written.append(histories.Accepted(request_id, TENANT, ""))

    async def dispatch(replica: str) -> int:
        (entry,) = await sides.read()
        written.append(histories.Waiting(request_id, entry.generation, entry.offset))
        await sides.dispatch((request_id, entry.generation), replica=replica)
        return entry.generation + 1

    async def say(replica: str, generation: int, offset: int, *, last: bool = False) -> bool:
        tokens = append(request_id, generation, offset, histories.oracle(7, offset, 3))
        tokens.tokens.text = replica
        end = [finish(request_id, generation)] if last else []
        return request_id not in await sides.leader.append(
            replica, 1, LEASE_MS, operations=[tokens, *end]
        )

    zombie = await dispatch(REPLICA)
    await say(REPLICA, zombie, 0)
    await sides.reap()
    await sides.expire_lease(request_id)
    await sides.reap()
    holder = await dispatch("replica-2")
    if await say(REPLICA, zombie, 3, last=True) or await say("replica-2", holder, 3, last=True):
        written.append(histories.Ended(request_id, "DONE"))
    return histories.violations(written, await histories.collect(redis, sides.gateway.model))


async def test_a_zombie_leaves_a_good_history(redis: Redis) -> None:
    assert await _zombie(redis, Scripts(redis)) == []


@pytest.mark.parametrize("name", UNFENCED)
async def test_queues_without_a_fence_are_caught(redis: Redis, name: str) -> None:
    found = await _zombie(redis, Mutant(redis, UNFENCED[name]))
    assert any("it had been fenced" in what for what in found)
