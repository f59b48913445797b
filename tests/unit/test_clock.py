"""Redis TIME as a process's clock, read over round trips of any length."""

from types import SimpleNamespace
from typing import Any

import pytest

from uellm.streams import clock as module
from uellm.streams.clock import RESYNC_SECONDS, RedisClock


class Redis:
    """A Redis whose clock is ``ahead`` of this process's; a call takes ``there`` and ``back``."""

    def __init__(self) -> None:
        self.here = 1000.0
        self.ahead = 5000.0
        self.there = self.back = 0.0001
        self.asked = 0

    async def time(self) -> tuple[int, int]:
        self.asked += 1
        self.here += self.there
        seconds, rest = divmod(self.here + self.ahead, 1)
        self.here += self.back
        return int(seconds), round(rest * 1e6)


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Redis:
    fake = Redis()
    times = SimpleNamespace(time=lambda: fake.here, monotonic=lambda: fake.here)
    monkeypatch.setattr(module, "time", times)
    return fake


def error(clock: RedisClock, redis: Redis) -> float:
    return abs(clock.now() - (redis.here + redis.ahead))


async def synced(redis: Any) -> RedisClock:
    clock = RedisClock(redis)
    await clock.sync(force=True)
    return clock


async def test_a_slow_reading_does_not_replace_a_good_one(redis: Redis) -> None:
    clock = await synced(redis)
    for redis.there, redis.back in ((0.0, 0.2), (0.2, 0.0)):
        redis.here += RESYNC_SECONDS + 1
        await clock.sync()
        assert error(clock, redis) < 0.001
    assert redis.asked == 3


async def test_a_bad_reading_is_soon_followed_by_another(redis: Redis) -> None:
    redis.back = 0.2
    clock = await synced(redis)
    assert error(clock, redis) == pytest.approx(0.1, abs=0.001)
    redis.back = 0.0001
    redis.here += 1
    await clock.sync()
    assert error(clock, redis) < 0.001
    redis.here += 1
    await clock.sync()
    assert redis.asked == 2


async def test_drift_is_followed_in_the_end(redis: Redis) -> None:
    clock = await synced(redis)
    redis.there = redis.back = 0.001
    for _ in range(20):
        redis.here += RESYNC_SECONDS + 1
        redis.ahead += 0.0005
        await clock.sync()
    assert error(clock, redis) < 0.003


async def test_a_redis_whose_clock_was_set_is_followed_at_once(redis: Redis) -> None:
    clock = await synced(redis)
    redis.ahead -= 60
    redis.back = 0.2
    await clock.sync(force=True)
    assert error(clock, redis) < 0.2
