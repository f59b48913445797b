"""What was measured is kept for the next deployer, and not for ever."""

from pytest import approx
from redis.asyncio import Redis
from uellm_deployer.measurements import BLOCKS, KEPT_SECONDS, LINKS, Measurements
from uellm_deployer.probing import PROBE, MeasuredLink
from uellm_deployer.stage_times import HALF_LIFE_SECONDS

from tests.support.deployer import COST
from uellm.placement.discovery import BlockKey, LinkKey
from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockCost
from uellm.placement.topology import Link

NOW = 2e9
OLD = NOW - KEPT_SECONDS - 1


def way(worker: str, measured_at: float) -> tuple[LinkKey, MeasuredLink]:
    link = Link("a/cpu:0", f"{worker}/cpu:0", 1e-4, 1e9, PROBE, measured_at, "transport")
    return LinkKey(("h", "a"), ("h", worker)), MeasuredLink(link)


async def test_what_is_old_is_forgotten(redis: Redis) -> None:
    before = Measurements(redis)
    await before.add_way(*way("b", NOW))
    await before.add_way(*way("gone", OLD))
    for model, measured_at in (("m", NOW), ("gone", OLD)):
        cost = BlockCost(COST, 0.0, 0.0, 1e6, 1e6, measured_at)
        await before.add_block(BlockKey("h", "cpu", model, "float32"), model, cost, [])
    after = Measurements(redis)
    await after.load(NOW)
    assert [key.dst[1] for key in after.ways_measured_at] == ["b"]
    assert [block.model for block in after.blocks] == ["m"]
    assert (await redis.hlen(LINKS), await redis.hlen(BLOCKS)) == (1, 1)


async def test_what_was_learnt_is_believed_less_and_less_by_the_next_deployer_too(
    redis: Redis,
) -> None:
    before, key = Measurements(redis), BlockKey("h", "cpu", "m", "float32")
    await before.add_block(key, "m", BlockCost(COST, 0.0, 0.0, 1e6, 1e6, NOW), [])
    for second in range(3600):
        await before.learn(key, Correction(3.0, 0.001, 2.0), NOW + second)
    after = Measurements(redis)
    await after.load(NOW + 3600)

    def live(seconds: float) -> Correction:
        found = after.knowledge([], [], {}, NOW + 3600 + seconds)
        return found.blocks[key].live

    assert live(0).slowdown == approx(3.0, rel=0.1)
    assert live(HALF_LIFE_SECONDS).slowdown == approx(2.0, rel=0.1)
    assert live(20 * HALF_LIFE_SECONDS).slowdown == approx(1.0, rel=0.01)
    assert live(20 * HALF_LIFE_SECONDS).step_seconds == approx(0.0, abs=1e-5)
    assert live(20 * HALF_LIFE_SECONDS).prefill_ratio == approx(1.0, rel=0.01)
