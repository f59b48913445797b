"""What was measured is kept for the next deployer, and not for ever."""

from redis.asyncio import Redis
from uellm_deployer.measurements import BLOCKS, KEPT_SECONDS, LINKS, Measurements
from uellm_deployer.probing import PROBE, MeasuredLink

from tests.integration.test_deployer_discovery import COST
from uellm.placement.discovery import BlockKey, LinkKey
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
