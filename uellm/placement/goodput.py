"""Disjoint replicas over a whole cluster: the most tokens per second that keep the SLO.

Devices are dealt into groups in several ways, each group is placed for throughput, and devices that
are left over go where they help most. The bound is what all devices would do if each were always
busy and links and ends cost nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from uellm.placement import held_karp
from uellm.placement.chain import chain_of
from uellm.placement.costs import Costs
from uellm.placement.hierarchy import hierarchy
from uellm.placement.placing import Placed, Wish, place
from uellm.placement.prediction import Layout, predict
from uellm.placement.views import Certificate

_MOST_GROUPS = 64
_SECONDS_PER_SET = 0.5 / (1 << held_karp.MOST_DEVICES)
"""Of placing a group by all sets of its devices."""
_MOST_OF_SEARCH = 0.5


@dataclass(frozen=True, slots=True)
class Spread:
    """Replicas that share no device.

    Attributes:
        replicas: one by one, devices by their numbers in all costs.
        tokens_per_second: of all.
        certificate: how good it is at least.
    """

    replicas: tuple[Placed, ...]
    tokens_per_second: float
    certificate: Certificate


def spread(costs: Costs, wish: Wish, rate: float = 0.0) -> Spread | None:
    """Place as many replicas as pay; None if not even one keeps the SLO.

    Args:
        costs: of the model on all devices.
        wish: of each replica; its objective is throughput.
        rate: tokens per second that are wanted, met with as little cost as is found; 0: the most.
    """
    search = _Search(costs, replace(wish, objective="throughput"), rate)
    for groups in search.deals():
        if search.best and search.spent:
            break
        search.try_groups(groups)
    if not search.best:
        return None
    search.improve()
    replicas = tuple(sorted(search.best, key=lambda each: each.layout.order))
    total = search.total(replicas)
    bound, proof = fluid_bound(costs), "every device always busy, links and ends free"
    if 0 < rate < bound:
        # More than comes is not sought.
        bound, proof = rate, "all that is offered is served"
    bound = max(bound, total)
    return Spread(replicas, total, Certificate("tokens per second", total, bound, proof))


def fluid_bound(costs: Costs) -> float:
    """Tokens per second if no device ever waited: one layer on each is a step of the work."""
    fits = costs.room >= int(costs.layer_bytes.min())
    per_layer = costs.layer.mean(axis=1) if costs.uniform else costs.layer.min(axis=1)
    speed = 1.0 / np.maximum(per_layer[fits], 1e-300)
    return float(costs.batch * costs.output_tokens * speed.sum() / costs.num_layers)


class _Search:
    def __init__(self, costs: Costs, wish: Wish, rate: float) -> None:
        self._costs, self._wish, self._rate = costs, wish, rate
        self._known: dict[tuple[int, ...], Placed | None] = {}
        self.best: list[Placed] = []

    @property
    def spent(self) -> bool:
        """Whether the budget is."""
        return self._wish.budget.spent

    def total(self, replicas: Sequence[Placed]) -> float:
        """Tokens per second of replicas together."""
        return sum(predict(self._costs, each.layout).tokens_per_second for each in replicas)

    def deals(self) -> Iterator[list[list[int]]]:
        """Ways to deal the devices into groups."""
        n = len(self._costs.devices)
        speed = 1.0 / np.maximum(self._costs.layer.mean(axis=1), 1e-300)
        by_speed = sorted(range(n), key=lambda d: (-speed[d], d))
        near = self._neighbourhood()
        total = int(self._costs.layer_bytes.sum()) + self._costs.need.fixed(first=True, last=True)
        most = min(n, max(1, int(self._costs.room.sum()) // max(total, 1)), _MOST_GROUPS)
        counts = sorted({int(count) for count in np.geomspace(1, most, 16)})
        yield [list(range(n))]
        # Many small groups first: they are placed faster, and one by one they lose least on links.
        for count in reversed(counts):
            yield _runs(near, speed, count)
            # Dealt like cards, to and fro: groups of equal speed, each with devices of every kind.
            hands: list[list[int]] = [[] for _ in range(count)]
            for at, device in enumerate(by_speed):
                lap, place_ = divmod(at, count)
                hands[place_ if lap % 2 == 0 else count - 1 - place_].append(device)
            yield hands
        kinds = sorted({round(float(s), 12) for s in speed}, reverse=True)
        if len(kinds) > 1:
            yield [[d for d in near if round(float(speed[d]), 12) == kind] for kind in kinds]

    def try_groups(self, groups: Sequence[Sequence[int]]) -> None:
        """Place each group; devices that one does not use are offered to the next."""
        placed: list[Placed] = []
        spare: list[int] = []
        for group in groups:
            found = self._place([*spare, *group]) if group else None
            if found is None:
                spare += group
                continue
            placed.append(found)
            spare = [d for d in (*spare, *group) if d not in set(found.layout.order)]
        while spare and not self.spent and (found := self._place(spare)) is not None:
            placed.append(found)
            spare = [d for d in spare if d not in set(found.layout.order)]
        self._consider(placed)

    def improve(self) -> None:
        """Hand devices that are left over, then devices of other replicas, to each replica."""
        improved = True
        while improved and not self.spent:
            improved = False
            before = self._score(self.best)
            used = {d for each in self.best for d in each.layout.order}
            spare = [d for d in range(len(self._costs.devices)) if d not in used]
            for index, each in enumerate(self.best):
                rest = [one for i, one in enumerate(self.best) if i != index]
                found = self._place([*each.layout.order, *spare]) if spare else None
                if found is not None:
                    self._consider([*rest, found])
                self._merge(each, rest)
                if self._score(self.best) > before:
                    improved = True
                    break

    def _merge(self, one: Placed, rest: Sequence[Placed]) -> None:
        """Deal the devices of two replicas anew."""
        for index, other in enumerate(rest):
            if self.spent:
                return
            pool = [*one.layout.order, *other.layout.order]
            first = self._place(pool)
            if first is None:
                continue
            left = [d for d in pool if d not in set(first.layout.order)]
            second = self._place(left) if left else None
            others = [each for i, each in enumerate(rest) if i != index]
            self._consider([*others, first, *([second] if second else [])])

    def _consider(self, placed: list[Placed]) -> None:
        if self._rate:
            placed = self._enough(placed)
        if placed and self._score(placed) > self._score(self.best):
            self.best = placed

    def _score(self, placed: Sequence[Placed]) -> tuple[float, float]:
        """More tokens, up to those that are wanted; then less cost."""
        total = self.total(placed)
        useful = min(total, self._rate) if self._rate else total
        cost = sum(float(self._costs.price[list(each.layout.order)].sum()) for each in placed)
        return round(useful, 9), -cost

    def _enough(self, placed: list[Placed]) -> list[Placed]:
        """As few of the replicas as serve what is wanted, the fastest first."""
        order = sorted(placed, key=lambda each: -self.total([each]))
        for count in range(1, len(order) + 1):
            if self.total(order[:count]) >= self._rate:
                return order[:count]
        return order

    def _place(self, group: Sequence[int]) -> Placed | None:
        key = tuple(sorted(set(group)))
        if key not in self._known:
            budget = self._wish.budget
            if len(key) <= held_karp.MOST_DEVICES:
                budget.spend(_SECONDS_PER_SET * (1 << len(key)))
            keep = list(key)
            names = {self._costs.devices[d].id for d in keep}
            pins = tuple(pin for pin in self._wish.pins if pin.device_id in names)
            part = budget.part(min(budget.seconds / 8, _MOST_OF_SEARCH))
            small = replace(self._wish, pins=pins, budget=part)
            found = place(self._costs.only(keep), small)
            if found is not None:
                order = tuple(keep[d] for d in found.layout.order)
                found = replace(found, layout=Layout(order, found.layout.layers))
            self._known[key] = found
        return self._known[key]

    def _neighbourhood(self) -> list[int]:
        """The devices in the order of the tree: neighbours stand near each other."""
        n = len(self._costs.devices)
        runs: list[list[int]] = [[d] for d in range(n)]
        for merge in hierarchy(chain_of(self._costs)).merges:
            runs.append(runs[merge.left] + runs[merge.right])
        return runs[-1]


def _runs(near: Sequence[int], speed: Sequence[float], count: int) -> list[list[int]]:
    """Neighbours, cut into groups of about equal speed."""
    total = sum(speed[d] for d in near)
    groups: list[list[int]] = [[] for _ in range(count)]
    done = 0.0
    for device in near:
        middle = done + speed[device] / 2
        groups[min(int(middle / total * count), count - 1)].append(device)
        done += speed[device]
    return groups
