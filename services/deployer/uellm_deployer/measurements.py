"""What was measured, kept in Redis: a restart, or the deployer that acts next, knows it too."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from uellm.convert import seconds
from uellm.convert_topology import block_from_proto
from uellm.placement.discovery import ANY_MODEL, BlockKey, Knowledge, LinkKey
from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockCost
from uellm.placement.topology import Link, LinkSpeed
from uellm.streams.connection import RedisClient
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer.probing import MeasuredLink, block_to_proto, measured_to_proto
from uellm_deployer.stage_times import HALF_LIFE_SECONDS

BLOCKS = "uellm:measured:blocks"
"""Hash: MeasuredBlock by host, device, digest of the model and dtype."""
LINKS = "uellm:measured:links"
"""Hash: Link by its ends: ``host/worker`` of both, or two device ids."""
KEPT_SECONDS = 30 * 86400.0
"""Whoever has not come back for so long is measured anew, under another name perhaps."""
_SEPARATOR = "\t"
_WORTH_KEEPING = 0.05
"""What was learnt is written again when a step of one layer has moved so much by it."""

_CONFIRMED_SECONDS = 60.0
"""And that often where it has not, which keeps its age young."""


class Measurements:
    """The deployers' knowledge of speeds; every call may be repeated."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._blocks: dict[BlockKey, deployer_pb2.MeasuredBlock] = {}
        self._costs: dict[BlockKey, BlockCost] = {}
        self._ways: dict[LinkKey, MeasuredLink] = {}
        self._copies: dict[tuple[str, str], MeasuredLink] = {}

    async def load(self, now: float) -> None:
        """Read what is kept, and forget what is old; what cannot be read is measured anew.

        Args:
            now: the present by Redis TIME.
        """
        self._blocks, self._costs, self._ways, self._copies = {}, {}, {}, {}
        since = now - KEPT_SECONDS
        for field, value in (await self._redis.hgetall(BLOCKS)).items():
            parts = field.decode().split(_SEPARATOR)
            message = deployer_pb2.MeasuredBlock.FromString(value)
            if seconds(message.cost.measured_at) < since:
                await self._redis.hdel(BLOCKS, field)
            elif len(parts) == 4:
                self._note_block(BlockKey(*parts), message, block_from_proto(message.cost))
        for field, value in (await self._redis.hgetall(LINKS)).items():
            parts = field.decode().split(_SEPARATOR)
            link = _measured(topology_pb2.Link.FromString(value))
            if (link.link.measured_at or 0.0) < since:
                await self._redis.hdel(LINKS, field)
            elif len(parts) == 4:
                self._ways[LinkKey((parts[0], parts[1]), (parts[2], parts[3]))] = link
            elif len(parts) == 2:
                self._copies[parts[0], parts[1]] = link

    @property
    def blocks(self) -> Sequence[deployer_pb2.MeasuredBlock]:
        """What layers take, as it is shown."""
        return [self._blocks[key] for key in sorted(self._blocks, key=str)]

    @property
    def ways_measured_at(self) -> Mapping[LinkKey, float]:
        """When ways between workers were measured."""
        return {key: way.link.measured_at or 0.0 for key, way in self._ways.items()}

    @property
    def wire_seconds(self) -> Mapping[tuple[str, str], float]:
        """Of ways between workers, what the network takes, by the workers."""
        return {(key.src[1], key.dst[1]): way.wire_seconds for key, way in self._ways.items()}

    def block(self, key: BlockKey) -> BlockCost | None:
        """What a layer takes, if exactly that was measured."""
        return self._costs.get(key)

    def copies_measured_at(self, worker: str) -> float | None:
        """When copies between a worker's devices were measured; None: they were not."""
        ages = [
            copies.link.measured_at or 0.0
            for (src, _), copies in self._copies.items()
            if src.rpartition("/")[0] == worker
        ]
        return min(ages) if ages else None

    def knowledge(
        self,
        declared: Sequence[Link],
        overrides: Sequence[Link],
        defaults: Mapping[str, LinkSpeed],
        now: float,
    ) -> Knowledge:
        """A snapshot for planners.

        Args:
            declared: links as drivers say them.
            overrides: links from a file.
            defaults: from a file, by level.
            now: the present by Redis TIME.
        """
        return Knowledge(
            blocks={key: self._believed(key, cost, now) for key, cost in self._costs.items()},
            ways={key: way.link for key, way in self._ways.items()},
            links=(*declared, *(copies.link for copies in self._copies.values())),
            overrides=overrides,
            default_link_by_level=defaults,
        )

    async def add_block(
        self,
        key: BlockKey,
        model: str,
        cost: BlockCost,
        points: Sequence[topology_pb2.BlockPoint],
    ) -> None:
        """Keep what a layer takes.

        Args:
            key: of what on what.
            model: its served name, for people.
            cost: the fit.
            points: what it was fitted to.
        """
        message = deployer_pb2.MeasuredBlock(
            host=key.host,
            device=key.device,
            model=model if key.model != ANY_MODEL else "",
            dtype=key.dtype,
            cost=block_to_proto(cost, points),
            digest=key.model,
        )
        self._note_block(key, message, cost)
        await self._redis.hset(BLOCKS, _field(*_parts(key)), message.SerializeToString())

    async def add_way(self, key: LinkKey, way: MeasuredLink) -> None:
        """Keep a way between workers."""
        self._ways[key] = way
        value = measured_to_proto(way).SerializeToString()
        await self._redis.hset(LINKS, _field(*key.src, *key.dst), value)

    async def add_copies(self, copies: Sequence[MeasuredLink]) -> None:
        """Keep copies between devices of a worker."""
        for each in copies:
            ends = (each.link.src, each.link.dst)
            self._copies[ends] = each
            value = measured_to_proto(each).SerializeToString()
            await self._redis.hset(LINKS, _field(*ends), value)

    async def learn(self, key: BlockKey, found: Correction, now: float) -> None:
        """Keep what was learnt of steps that ran, if their layers were measured."""
        known = self._costs.get(key)
        if known is None:
            return
        self._costs[key] = replace(known, live=found)
        message = self._blocks[key]
        layer, kept = known.layer.unloaded, message.cost
        before = (kept.live_ratio or 1.0) * (layer + kept.live_step_seconds)
        moved = abs(found.slowdown * (layer + found.step_seconds) - before)
        if moved > _WORTH_KEEPING * layer or now - seconds(kept.live_at) > _CONFIRMED_SECONDS:
            message.cost.live_ratio = found.slowdown
            message.cost.live_step_seconds = found.step_seconds
            message.cost.live_prefill_ratio = found.prefill_ratio
            message.cost.live_at.FromNanoseconds(round(now * 1e9))
            await self._redis.hset(BLOCKS, _field(*_parts(key)), message.SerializeToString())

    def _believed(self, key: BlockKey, cost: BlockCost, now: float) -> BlockCost:
        """With as much of what was learnt as its age leaves."""
        age = max(now - seconds(self._blocks[key].cost.live_at), 0.0)
        return replace(cost, live=cost.live.faded(0.5 ** (age / HALF_LIFE_SECONDS)))

    def _note_block(
        self, key: BlockKey, message: deployer_pb2.MeasuredBlock, cost: BlockCost
    ) -> None:
        self._blocks[key], self._costs[key] = message, cost


def _measured(message: topology_pb2.Link) -> MeasuredLink:
    link = Link(
        message.src,
        message.dst,
        message.latency_seconds,
        message.bytes_per_second,
        message.source,
        seconds(message.measured_at),
        message.kind,
        message.passing_seconds,
    )
    return MeasuredLink(link, message.wire_seconds)


def _parts(key: BlockKey) -> tuple[str, str, str, str]:
    return key.host, key.device, key.model, key.dtype


def _field(*parts: str) -> str:
    return _SEPARATOR.join(parts)
