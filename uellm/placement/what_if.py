"""Other clusters than there are: devices that come or go, and what that would be worth. Pure."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from uellm.core.errors import InvalidArgumentError
from uellm.placement.topology import Device, Link, Topology
from uellm.placement.views import LayerTimes, Plan

MOST_ADDED = 64
_ADD = re.compile(r"add=(?:(?P<count>[1-9]\d{0,8})x)?(?P<kind>[^@,;\s]+)@(?P<host>[\w.:-]+)")
_REMOVE = re.compile(r"remove=(?P<name>[^,\s]+)")
_LINK = re.compile(
    r"link=(?P<one>[^~,\s]+)~(?P<other>[^~*,\s]+)(?:\*(?P<times>\d{1,6}(?:\.\d+)?))?"
)


@dataclass(frozen=True, slots=True)
class Change:
    """A cluster that might be.

    Attributes:
        added: kinds and the hosts they come to, one for each device.
        removed: ids of devices, workers or hosts.
        links: two of these each, and how many times as fast the ways between them are, both ways;
            inf: as if they took no time.
    """

    added: tuple[tuple[str, str], ...] = ()
    removed: tuple[str, ...] = ()
    links: tuple[tuple[str, str, float], ...] = ()

    def __str__(self) -> str:
        plus = [f"+{kind}@{host}" for kind, host in self.added]
        ways = [
            f"{one}~{other} {'free' if times == inf else f'{times:g}x as fast'}"
            for one, other, times in self.links
        ]
        return " ".join([*plus, *(f"-{name}" for name in self.removed), *ways])


def parse_change(text: str) -> Change:
    """``add=KIND@HOST``, ``add=2xKIND@HOST``, ``remove=HOST`` and links, separated by commas.

    ``link=HOST~HOST*4`` is a link four times as fast, ``link=HOST~HOST`` one that takes no time:
    what that brings is what the link costs.

    Raises:
        InvalidArgumentError: naming the part that is none of these.
    """
    added: list[tuple[str, str]] = []
    removed: list[str] = []
    links: list[tuple[str, str, float]] = []
    count = 0
    for part in (part.strip() for part in text.split(",")):
        if match := _ADD.fullmatch(part):
            more = int(match["count"] or 1)
            count += more
            added += [(match["kind"], match["host"])] * min(more, MOST_ADDED)
        elif match := _REMOVE.fullmatch(part):
            removed.append(match["name"])
        elif (match := _LINK.fullmatch(part)) and float(match["times"] or inf) > 0:
            links.append((match["one"], match["other"], float(match["times"] or inf)))
        else:
            raise InvalidArgumentError(
                f"what-if: {part!r} is none of add=KIND@HOST, add=2xKIND@HOST, remove=HOST, "
                "link=HOST~HOST and link=HOST~HOST*TIMES",
                field="what-if",
            )
    if count > MOST_ADDED:
        raise InvalidArgumentError(
            f"what-if: {count} devices are added; the limit is {MOST_ADDED}", field="what-if"
        )
    return Change(tuple(added), tuple(removed), tuple(links))


def changed(topology: Topology, change: Change, kinds: Mapping[str, Device]) -> Topology:
    """The cluster after a change.

    A device that comes to a host that is there hangs where that host's others do; a new host is in
    the rack that most others are in, behind the links that the topology says for such a way. Like
    a device of the topology, which is named by its id, it is behind the same ways as that one.

    Args:
        topology: before.
        change: what comes and goes.
        kinds: what devices of a kind are like. Those of the topology can be named too, by their
            names or ids.

    Raises:
        InvalidArgumentError: if a kind is not known, or there is nothing of a name.
    """
    devices = list(topology.devices)
    for name in change.removed:
        gone = _named(devices, name)
        devices = [device for device in devices if device not in gone]
    links = list(topology.links)
    for kind, host in change.added:
        new = _new(devices, topology.devices, kind, host, kinds)
        if not any(device.host == host for device in devices):
            links += _ways_of(links, kind, new.id)
        devices.append(new)
    ids = {device.id for device in devices}
    kept = tuple(link for link in links if link.src in ids and link.dst in ids)
    found = replace(topology, devices=tuple(devices), links=kept)
    for one, other, times in change.links:
        found = _faster(found, _named(devices, one), _named(devices, other), times)
    return found


def _named(devices: Sequence[Device], name: str) -> list[Device]:
    found = [device for device in devices if name in (device.id, device.worker, device.host)]
    if not found:
        hosts = ", ".join(sorted({device.host for device in devices}))
        raise InvalidArgumentError(
            f"what-if: there is no device, worker or host {name!r}; hosts: {hosts}",
            field="what-if",
        )
    return found


def _faster(
    topology: Topology, some: Sequence[Device], others: Sequence[Device], times: float
) -> Topology:
    """Ways between two groups of devices that are so many times as fast."""
    pairs = {(a.id, b.id) for a in some for b in others if a.id != b.id}
    if not pairs:
        raise InvalidArgumentError(
            f"what-if: link={some[0].id}~{others[0].id} is one device, and a link has two ends",
            field="what-if",
        )
    pairs |= {(b, a) for a, b in pairs}
    device = {each.id: each for each in (*some, *others)}
    ways = []
    for src, dst in sorted(pairs):
        link = topology.link(device[src], device[dst])
        way = Link(
            src,
            dst,
            link.latency_seconds / times,
            link.bytes_per_second * times,
            link.source,
            # A way that takes no time has no software either, as those have that were measured.
            link.measured_at if times < inf else link.measured_at or 0.0,
            link.kind,
        )
        ways.append(way)
    kept = (link for link in topology.links if (link.src, link.dst) not in pairs)
    return replace(topology, links=(*kept, *ways))


def _latency(link: Link) -> float:
    return link.latency_seconds


def _ways_of(links: Sequence[Link], like: str, new: str) -> list[Link]:
    """A device's ways as another's; the two are as near to each other as to what is nearest."""
    there = [replace(link, src=new) for link in links if link.src == like]
    back = [replace(link, dst=new) for link in links if link.dst == like]
    between = []
    if there:
        between.append(replace(min(there, key=_latency), dst=like))
    if back:
        between.append(replace(min(back, key=_latency), src=like))
    return [*there, *back, *between]


def times_of_added(
    times: Mapping[str, LayerTimes], topology: Topology, change: Change
) -> dict[str, LayerTimes]:
    """What layers take, with devices that were added as those that are like them.

    Args:
        times: by device id, before.
        topology: after the change.
        change: what came and went.
    """
    found = dict(times)
    added = topology.devices[len(topology.devices) - len(change.added) :]
    for device, (kind, _) in zip(added, change.added, strict=True):
        if kind in times:
            found[device.id] = times[kind]
    return found


def _new(
    devices: Sequence[Device],
    before: Sequence[Device],
    kind: str,
    host: str,
    kinds: Mapping[str, Device],
) -> Device:
    own = {name: device for device in before for name in (device.name, device.id) if name}
    like = kinds.get(kind) or own.get(kind)
    if like is None:
        known = ", ".join([*kinds, *sorted({d.name for d in before if d.name})])
        raise InvalidArgumentError(
            f"what-if: no kind of device {kind!r}; known: {known}", field="what-if"
        )
    beside = next((device for device in devices if device.host == host), None)
    racks = [device.place[0] for device in devices]
    rack = max(set(racks), key=racks.count) if racks else ""
    path = beside.place if beside is not None else (rack, host)
    worker = beside.worker if beside is not None else host
    taken = {device.id for device in devices}
    number = next(n for n in range(len(taken) + 1) if f"{worker}/{like.kind}:{n}" not in taken)
    return replace(
        like,
        id=f"{worker}/{like.kind}:{number}",
        worker=worker,
        host=host,
        path=path,
        num_stages=0,
        healthy=True,
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """What a plan comes to, over all its replicas.

    Attributes:
        replicas: how many.
        devices: that it uses.
        total_seconds: of a batch, on the slowest replica; inf without one.
        tokens_per_second: of all replicas together.
        link_share: of a batch's time that goes into links, on the slowest replica.
        sequences: that run at once, on all replicas together.
    """

    replicas: int
    devices: int
    total_seconds: float
    tokens_per_second: float
    link_share: float
    sequences: int


def figures(plan: Plan, output_tokens: int) -> Figures:
    """What a plan comes to.

    Args:
        plan: with predictions.
        output_tokens: of a batch's sequences.
    """
    predicted = [r for r in plan.replicas if r.prediction is not None]
    slowest = max(
        predicted, key=lambda r: r.prediction.total_seconds if r.prediction else 0.0, default=None
    )
    total, share = float("inf"), 0.0
    if slowest is not None and slowest.prediction is not None:
        total = slowest.prediction.total_seconds
        sends = sum(stage.send_seconds for stage in slowest.stages)
        share = min(sends * max(output_tokens - 1, 1) / total, 1.0) if total > 0 else 0.0
    return Figures(
        len(plan.replicas),
        len({stage.device_id for replica in plan.replicas for stage in replica.stages}),
        total,
        sum(r.prediction.tokens_per_second for r in predicted if r.prediction is not None),
        share,
        plan.slots * len(plan.replicas),
    )


@dataclass(frozen=True, slots=True)
class Enough:
    """The fewest devices of a kind that would do.

    Attributes:
        kind: of device.
        count: how many more.
        figures: of the plan with them.
    """

    kind: str
    count: int
    figures: Figures


def enough(
    kinds: Iterable[str], does: Callable[[str, int], Figures | None], most: int = 16
) -> list[Enough]:
    """For each kind, the fewest devices with which a load is served; kinds that never do left out.

    Args:
        kinds: to try.
        does: what the plan with so many of a kind comes to, or None if it does not serve the load.
        most: devices that are tried.
    """
    found = []
    for kind in kinds:
        low, high = 0, 1
        served = does(kind, high)
        while served is None and high < most:
            low, high = high, min(2 * high, most)
            served = does(kind, high)
        if served is None:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            fewer = does(kind, middle)
            low, high, served = (middle, high, served) if fewer is None else (low, middle, fewer)
        found.append(Enough(kind, high, served))
    return sorted(found, key=lambda each: (each.count, each.kind))
