"""Stages of several devices each: any device of a stage may send to any of the next. Planning only.

A stage's devices hold the same layers and share its tokens, as in Helix (ASPLOS 2025), whose plans
a maximum flow rates. Chains, which are what runs, are the case of one device a stage; their figure
stands beside. Within a region, where links are fast enough for all that flows, only the numbers of
devices of each kind matter, and a program over these finds the most layers that keep a rate.
Where stages of two regions meet, enough devices must stand on both sides that the links carry it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, permutations, product
from statistics import median

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.costs import Costs
from uellm.placement.disjoint import ABOUT, chains_rate
from uellm.placement.flow import max_flow
from uellm.placement.views import FullStage, SharedStage

_PROBES = 60
_CLOSE = 1e-4
_MOST_STATES = 2_000
_MOST_REGIONS = 4
_MOST_ABREAST = 4


@dataclass(frozen=True, slots=True)
class Server:
    """A device by its rates.

    Attributes:
        id: of the device.
        kind: devices of one kind have equal rates.
        rates: tokens per second with 1, 2, ... layers, as many as it has room for.
    """

    id: str
    kind: str
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Devices, by number, that hold the same layers."""

    servers: tuple[int, ...]
    num_layers: int


@dataclass(frozen=True, slots=True)
class Flow:
    """A plan.

    Attributes:
        stages: in order.
        tokens_per_second: the maximum flow through them.
        chain_tokens_per_second: of disjoint chains, each device a stage of one, links counted.
    """

    stages: tuple[Stage, ...]
    tokens_per_second: float
    chain_tokens_per_second: float


def full_stage_of(costs: Costs) -> FullStage | None:
    """How far stages of several devices would come on what a request may use, always busy.

    None if the layers do not fit.
    """
    servers, capacity = servers_of(costs)
    found = plan_full_stage(servers, costs.num_layers, capacity)
    if found is None:
        return None
    ends = list(accumulate(stage.num_layers for stage in found.stages))
    stages = tuple(
        SharedStage(
            tuple(servers[number].id for number in stage.servers), end - stage.num_layers, end - 1
        )
        for stage, end in zip(found.stages, ends, strict=True)
    )
    return FullStage(stages, found.tokens_per_second, found.chain_tokens_per_second)


def plan_full_stage(servers: Sequence[Server], num_layers: int, capacity: Array) -> Flow | None:
    """The stages with the most throughput that are found; None if the layers do not fit.

    Args:
        servers: the devices.
        num_layers: of the model.
        capacity: [n, n], tokens per second that a link carries.
    """
    best: tuple[float, tuple[Stage, ...]] = (0.0, ())
    low, high = 0.0, sum(server.rates[0] for server in servers if server.rates)
    for _ in range(_PROBES):
        rate = (low + high) / 2
        found = _at_rate(servers, num_layers, capacity, rate)
        if found is None:
            high = rate
            continue
        flow = rating(servers, found, capacity)
        best = max(best, (flow, found), key=lambda each: each[0])
        low = max(rate, min(flow, high))
        if high - low <= _CLOSE * high:
            break
    if not best[1]:
        return None
    return Flow(
        best[1], best[0], chains_rate([each.rates for each in servers], num_layers, capacity)
    )


def servers_of(costs: Costs) -> tuple[list[Server], Array]:
    """A request's devices by their rates, and its links by what they carry; ends cost nothing."""
    tokens = costs.batch * costs.output_tokens
    work = np.cumsum(np.sort(costs.layer, axis=1)[:, ::-1], axis=1)
    size = int(costs.layer_bytes.max())
    servers = []
    for index, device in enumerate(costs.devices):
        room = int(costs.room[index]) - costs.need.fixed(first=True, last=True)
        most = min(max(room, 0) // max(size, 1), costs.num_layers)
        rates = tuple(float(tokens / seconds) for seconds in work[index, :most])
        servers.append(Server(device.id, f"{device.name} {rates}", rates))
    with np.errstate(divide="ignore"):
        capacity: Array = tokens / costs.busy
    return servers, capacity


def rating(servers: Sequence[Server], stages: Sequence[Stage], capacity: Array) -> float:
    """The maximum flow through stages: every device is as fast as its layers let it be."""
    source, sink = -1, -2
    edges: dict[tuple[int, int], float] = {}
    for index, stage in enumerate(stages):
        for server in stage.servers:
            # A device is two nodes, with what it computes between them.
            edges[2 * server, 2 * server + 1] = servers[server].rates[stage.num_layers - 1]
            if index == 0:
                edges[source, 2 * server] = float("inf")
            if index == len(stages) - 1:
                edges[2 * server + 1, sink] = float("inf")
            else:
                for other in stages[index + 1].servers:
                    edges[2 * server + 1, 2 * other] = float(capacity[server, other])
    return max_flow(edges, source, sink)


def _at_rate(
    servers: Sequence[Server], num_layers: int, capacity: Array, rate: float
) -> tuple[Stage, ...] | None:
    """Stages that each keep a rate, and links between regions that carry it."""
    regions = [_Region(servers, members, rate) for members in _regions(capacity, rate)]
    regions = [region for region in regions if region.most_layers > 0]
    regions.sort(key=lambda region: -region.most_layers)
    regions = regions[:_MOST_REGIONS]
    if sum(region.most_layers for region in regions) < num_layers:
        return None
    if regions and regions[0].most_layers >= num_layers:
        return _shortened(regions[0].stages(1, 1), num_layers)
    best: tuple[float, tuple[Stage, ...]] | None = None
    for order in permutations(regions):
        for stages in _joined(order, num_layers, capacity, rate):
            flow = rating(servers, stages, capacity)
            if best is None or flow > best[0]:
                best = (flow, stages)
    return best[1] if best else None


def _joined(
    order: Sequence["_Region"], num_layers: int, capacity: Array, rate: float
) -> Iterator[tuple[Stage, ...]]:
    """Regions one after the other, with enough devices abreast where they meet."""
    meetings = []
    for one, other in pairwise(order):
        link = median(float(capacity[a, b]) for a in one.members for b in other.members)
        wide = range(1, _MOST_ABREAST + 1)
        pairs = [(p, q) for p, q in product(wide, wide) if p * q * link >= rate]
        meetings.append([(p, q) for p, q in pairs if (p - 1) * q * link < rate or p == 1])
    for abreast in product(*meetings):
        ends = [1, *(side for pair in abreast for side in pair), 1]
        stages: list[Stage] = []
        for index, region in enumerate(order):
            stages += region.stages(ends[2 * index], ends[2 * index + 1])
        if sum(stage.num_layers for stage in stages) >= num_layers:
            yield _shortened(stages, num_layers)


def _shortened(stages: Sequence[Stage], num_layers: int) -> tuple[Stage, ...]:
    """Layers that are too many taken off, where there are most."""
    layers = [stage.num_layers for stage in stages]
    while sum(layers) > num_layers:
        layers[layers.index(max(layers))] -= 1
    return tuple(
        Stage(stage.servers, count) for stage, count in zip(stages, layers, strict=True) if count
    )


def _regions(capacity: Array, rate: float) -> list[list[int]]:
    """Devices that links fast enough for the whole rate join."""
    n = len(capacity)
    fast = np.minimum(capacity, capacity.T) >= rate
    left, found = set(range(n)), []
    while left:
        region, pending = [], [min(left)]
        left.discard(pending[0])
        while pending:
            at = pending.pop()
            region.append(at)
            near = [d for d in sorted(left) if fast[at, d]]
            left.difference_update(near)
            pending += near
        found.append(sorted(region))
    return found


class _Region:
    """Devices that links join which are fast enough: pools of kinds, each with stages of its own.

    Kinds are pooled as long as the combinations of their numbers are few enough to look at all.
    """

    def __init__(self, servers: Sequence[Server], members: Sequence[int], rate: float) -> None:
        self.members = list(members)
        by_kind: dict[str, list[int]] = {}
        for member in members:
            by_kind.setdefault(servers[member].kind, []).append(member)
        pools: list[list[list[int]]] = []
        states = _MOST_STATES + 1
        for kind in sorted(by_kind, key=lambda kind: (-len(by_kind[kind]), kind)):
            states *= len(by_kind[kind]) + 1
            if states > _MOST_STATES:
                pools.append([])
                states = len(by_kind[kind]) + 1
            pools[-1].append(by_kind[kind])
        self._pools = [_Pool(servers, kinds, rate) for kinds in pools]
        self.most_layers = sum(pool.most_layers for pool in self._pools)

    def stages(self, first: int, last: int) -> list[Stage]:
        """Stages with the most layers, the outer two of so many devices at least."""
        options = []
        for a, begin in enumerate(self._pools):
            for b, end in enumerate(self._pools):
                rest = [pool for i, pool in enumerate(self._pools) if i not in (a, b)]
                middle = [stage for pool in rest for stage in pool.stages(1, 1)]
                if a == b:
                    whole = begin.stages(first, last)
                    options.append([*whole[:1], *middle, *whole[1:]] if whole else [])
                else:
                    ends = begin.stages(first, 1), end.stages(1, last)
                    options.append([*ends[0], *middle, *ends[1]] if all(ends) else [])
        return max(options, key=lambda stages: sum(stage.num_layers for stage in stages))


class _Pool:
    """The most layers that stages of some kinds hold at a rate, by numbers of each kind."""

    def __init__(
        self, servers: Sequence[Server], kinds: Sequence[Sequence[int]], rate: float
    ) -> None:
        self._kinds = kinds
        self._rate = rate
        self._rates = [servers[members[0]].rates for members in kinds]
        self._states = np.array(list(product(*(range(len(members) + 1) for members in kinds))))
        self._layers = self._stage_layers()
        self._lean = self._without_waste()

    @property
    def most_layers(self) -> int:
        """Of all its devices."""
        return int(self._table[0][-1])

    def stages(self, first: int, last: int) -> list[Stage]:
        """Stages with the most layers, the outer two of so many devices at least."""
        if first == last == 1:
            return self._built(self._unpacked(len(self._states) - 1))
        sizes = self._states.sum(axis=1)
        best, _ = self._table
        whole = self._states[-1]
        alone = np.where(sizes >= max(first, last), self._layers, 0)
        top = int(alone.max())
        chosen: tuple[int, ...] = (int(alone.argmax()),) if top else ()
        ends = self._ends(last)
        for a in self._ends(first):
            rest = whole - self._states[a]
            fit = ends[(self._states[ends] <= rest).all(axis=1)]
            if not len(fit):
                continue
            left = self._index(rest - self._states[fit])
            total = self._layers[a] + self._layers[fit] + best[left]
            at = int(total.argmax())
            if total[at] > top:
                top = int(total[at])
                chosen = (int(a), *self._unpacked(int(left[at])), int(fit[at]))
        return self._built(chosen)

    def _ends(self, width: int) -> Integers:
        """States that are worth being an outer stage."""
        sizes = self._states.sum(axis=1)
        worth = (self._lean & (sizes >= width)) | (sizes == width)
        return np.flatnonzero(worth & (self._layers > 0))

    @cached_property
    def _table(self) -> tuple[Integers, Integers]:
        """[states] most layers of stages of so many devices, and the last of these stages."""
        best = np.zeros(len(self._states), dtype=np.int64)
        choice = np.full(len(self._states), -1)
        patterns = np.flatnonzero(self._lean)
        for state in range(1, len(self._states)):
            left = self._states[state] - self._states[patterns]
            fit = (left >= 0).all(axis=1)
            if fit.any():
                total = self._layers[patterns[fit]] + best[self._index(left[fit])]
                at = int(total.argmax())
                best[state], choice[state] = total[at], patterns[fit][at]
        return best, choice

    def _index(self, counts: Integers) -> Integers:
        """Numbers of states."""
        number = np.zeros(len(counts), dtype=np.int64)
        for kind, members in enumerate(self._kinds):
            number = number * (len(members) + 1) + counts[:, kind]
        return number

    def _stage_layers(self) -> Integers:
        """[states] most layers of one stage of these devices."""
        most = np.zeros(len(self._states), dtype=np.int64)
        for count in range(1, max((len(rates) for rates in self._rates), default=0) + 1):
            each = np.array([r[count - 1] if len(r) >= count else 0.0 for r in self._rates])
            able = np.array([len(rates) >= count for rates in self._rates])
            hold = (self._states[:, ~able] == 0).all(axis=1)
            most[hold & (self._states @ each >= self._rate * ABOUT)] = count
        most[0] = 0
        return most

    def _without_waste(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """[states] stages that would hold fewer layers with any one device less."""
        lean = self._layers > 0
        for kind in range(len(self._kinds)):
            has = np.flatnonzero(self._states[:, kind] > 0)
            fewer = self._states[has].copy()
            fewer[:, kind] -= 1
            lean[has] &= self._layers[self._index(fewer)] < self._layers[has]
        return lean

    def _unpacked(self, state: int) -> list[int]:
        """The stages behind the best of a state."""
        _, choice = self._table
        found = []
        while choice[state] >= 0:
            found.append(int(choice[state]))
            state = int(self._index((self._states[state] - self._states[choice[state]])[None])[0])
        return found

    def _built(self, chosen: Sequence[int]) -> list[Stage]:
        """Numbers of devices made devices."""
        pools = [list(members) for members in self._kinds]
        stages = []
        for state in chosen:
            servers = [
                pools[kind].pop(0)
                for kind, count in enumerate(self._states[state])
                for _ in range(int(count))
            ]
            stages.append(Stage(tuple(servers), int(self._layers[state])))
        return stages
