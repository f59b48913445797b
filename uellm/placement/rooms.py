"""How much room the devices have left, and in which order they are considered."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, permutations

from uellm.placement.memory import Need
from uellm.placement.partition import Range, fits, split
from uellm.placement.topology import Device

# Up to this many devices every pair is tried as the ends; of more, only the roomiest few.
_ALL_ENDS = 8
_SOME_ENDS = 3


class Rooms:
    """The devices and what is left of their memory.

    Args:
        devices: those that may be used.
        usable: share of a device's memory that may be filled.
    """

    def __init__(self, devices: Sequence[Device], usable: float) -> None:
        self.devices = tuple(sorted(devices, key=lambda device: device.id))
        self._usable = usable
        self._left = {d.id: int(d.memory_bytes * usable) for d in self.devices}
        self._uses = Counter({d.id: d.num_stages for d in self.devices})

    @property
    def left(self) -> Mapping[str, int]:
        """Bytes left, by device."""
        return self._left

    def find(self, device_id: str) -> Device | None:
        """A device by its id, if it is there."""
        return next((device for device in self.devices if device.id == device_id), None)

    def taken(self, order: Sequence[Device], stage_bytes: Sequence[int]) -> "Rooms":
        """What is left after a replica's stages."""
        rooms = Rooms(self.devices, self._usable)
        rooms._left, rooms._uses = dict(self._left), self._uses.copy()
        for device, size in zip(order, stage_bytes, strict=True):
            rooms._left[device.id] -= size
            rooms._uses[device.id] += 1
        return rooms

    def plus(self, device: Device) -> "Rooms":
        """The same with one more device."""
        rooms = Rooms((*self.devices, device), self._usable)
        rooms._left |= self._left
        rooms._uses = self._uses.copy()
        return rooms

    def capacities(self, order: Sequence[Device], need: Need) -> list[int]:
        """Bytes for layers on each device of a replica: what is left less what is not layers."""
        return [
            self._left[device.id] - need.fixed(first=index == 0, last=index == len(order) - 1)
            for index, device in enumerate(order)
        ]

    def room(self, chosen: Sequence[Device]) -> int:
        """Bytes left on some devices together."""
        return sum(self._left[device.id] for device in chosen)

    def holds(self, order: Sequence[Device], need: Need) -> bool:
        """Whether some cut of the model fits on these devices, in this order."""
        costs = [need.layer(index) for index in range(len(need.model.layers))]
        return fits(costs, self.capacities(order, need))

    def cut(self, order: Sequence[Device], need: Need) -> list[Range] | None:
        """The most even cut that fits on these devices, in this order."""
        costs = [need.layer(index) for index in range(len(need.model.layers))]
        weights = [layer.weight_bytes for layer in need.model.layers]
        return split(weights, costs, self.capacities(order, need))

    def holds_cut(self, order: Sequence[Device], cut: Sequence[Range], need: Need) -> bool:
        """Whether a given cut fits."""
        return all(
            sum(need.layer(index) for index in range(first, last + 1)) <= capacity
            for (first, last), capacity in zip(cut, self.capacities(order, need), strict=True)
        )

    def choices(self, count: int, *, spread: bool) -> Iterator[tuple[Device, ...]]:
        """Sets of devices to try, best first: unused ones, then those with the most room.

        With ``spread`` those on different workers come first. The last set has the most memory of
        all sets of its size.
        """
        by_room = sorted(self.devices, key=lambda d: (-self._left[d.id], d.id))
        unused = sorted(by_room, key=lambda d: self._uses[d.id])
        rankings = [_round_robin(unused)] if spread else []
        rankings += [unused, by_room]
        seen: set[tuple[str, ...]] = set()
        for ranking in rankings:
            chosen = tuple(sorted(ranking[:count], key=lambda d: d.id))
            key = tuple(device.id for device in chosen)
            if len(chosen) == count and key not in seen:
                seen.add(key)
                yield chosen

    def orders(self, chosen: Sequence[Device]) -> Iterator[tuple[Device, ...]]:
        """Orders to try: by id, then every pair of ends, which need room for more than layers.

        Only such in which the devices of each worker are neighbours: they are one stage of it.
        """
        yield tuple(sorted(chosen, key=lambda d: (d.worker, d.id)))
        ends = sorted(chosen, key=lambda d: (-self._left[d.id], d.id))
        most = _ALL_ENDS if len(chosen) <= _ALL_ENDS else _SOME_ENDS
        for first, last in permutations(ends[:most], 2):
            middle = [device for device in chosen if device not in (first, last)]
            middle.sort(
                key=lambda d: ((d.worker == last.worker) - (d.worker == first.worker), d.worker)
            )
            order = (first, *middle, last)
            if neighbours(order):
                yield order

    def replacement(self, taken: Sequence[Device]) -> Device | None:
        """An unused device, on a worker that is used least, with the most room."""
        workers = Counter(device.worker for device in taken)
        spare = [device for device in self.devices if device not in taken]
        spare.sort(key=lambda d: (workers[d.worker], self._uses[d.id], -self._left[d.id], d.id))
        return spare[0] if spare else None


def neighbours(order: Sequence[Device]) -> bool:
    """Whether the devices of each worker stand side by side."""
    visits = [worker for worker, _ in groupby(order, key=lambda device: device.worker)]
    return len(visits) == len(set(visits))


def _round_robin(devices: Sequence[Device]) -> list[Device]:
    """The first of every worker, then the second of every worker, and so on."""
    seen: Counter[str] = Counter()
    rounds: list[tuple[int, Device]] = []
    for device in devices:
        rounds.append((seen[device.worker], device))
        seen[device.worker] += 1
    return [device for _, device in sorted(rounds, key=lambda pair: pair[0])]
