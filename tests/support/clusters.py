"""Devices, links and models to place, drawn or named."""

import random
from collections.abc import Callable
from functools import cache

from uellm.core.model import LayerProfile, ModelProfile
from uellm.placement.topology import Device, Link, LinkSpeed, Topology
from uellm.placement.views import Objective, PlanRequest, Workload

MIB = 1 << 20


def small_model(
    layers: int = 6, weight: int = 400 * MIB, embed: int = 100 * MIB, tied: bool = False
) -> ModelProfile:
    """Equal layers."""
    return ModelProfile(
        layers=(LayerProfile(weight, 1 << 16, float(weight)),) * layers,
        embed_bytes=embed,
        head_bytes=embed,
        tied=tied,
        activation_bytes_per_token=1 << 14,
        max_tokens=4096,
        vocab_size=32000,
        hidden_size=4096,
    )


def random_devices(rng: random.Random, count: int, shared: bool) -> tuple[Device, ...]:
    """Devices of all speeds and sizes; with ``shared`` some belong to one worker."""
    found = []
    for index in range(count):
        worker = f"w{rng.randrange(max(1, count // 2)) if shared else index}"
        found.append(
            Device(
                id=f"{worker}/cuda:{index}",
                worker=worker,
                host=worker,
                kind="cuda",
                memory_bytes=rng.randrange(600, 4000) * MIB,
                flops_per_second=rng.uniform(1e12, 1e14),
                memory_bytes_per_second=rng.uniform(1e11, 2e12),
                path=(f"r{rng.randrange(2)}", worker),
                cost=rng.choice([1.0, 1.0, 2.0, 2.5]),
            )
        )
    return tuple(found)


def random_topology(
    rng: random.Random, count: int, *, tree: bool = False, shared: bool = False
) -> Topology:
    """A cluster whose links are anything, or those of a tree."""
    devices = random_devices(rng, count, shared)
    if tree:
        if shared:
            devices = tuple(_in_rack(device) for device in devices)
        near, far = rng.uniform(1e-5, 1e-4), rng.uniform(1e-3, 2e-2)
        speeds = {"host": near, "rack": 10 * near, "network": far}
        defaults = {level: LinkSpeed(seconds, 1e10) for level, seconds in speeds.items()}
        return Topology(devices, default_link_by_level=defaults)
    links = tuple(
        Link(a.id, b.id, rng.uniform(0, 2e-2), rng.uniform(1e8, 1e10), "probe", measured_at=1.0)
        for a in devices
        for b in devices
        if a.id != b.id
    )
    return Topology(devices, links)


def wide_area(rng: random.Random, count: int) -> Topology:
    """Sites anywhere on a plane; a way takes what its length does."""
    devices = random_devices(rng, count, shared=False)
    at = {device.id: complex(rng.random(), rng.random()) for device in devices}
    links = tuple(
        Link(a.id, b.id, 0.05 * abs(at[a.id] - at[b.id]), 1e9, "probe", measured_at=1.0)
        for a in devices
        for b in devices
        if a.id != b.id
    )
    return Topology(devices, links)


def _in_rack(device: Device) -> Device:
    """A worker is in one rack."""
    rack = f"r{int(device.worker[1:]) % 2}"
    return Device(
        device.id,
        device.worker,
        device.host,
        device.kind,
        device.memory_bytes,
        flops_per_second=device.flops_per_second,
        memory_bytes_per_second=device.memory_bytes_per_second,
        path=(rack, device.host),
        cost=device.cost,
    )


def random_request(
    seed: int, count: int, objective: Objective = "lr", *, tree: bool = False
) -> PlanRequest:
    """A request on a random cluster, reproducible by its seed."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    topology = random_topology(rng, count, tree=tree, shared=rng.random() < 0.5)
    model = small_model(
        layers=rng.randrange(3, 8),
        embed=rng.choice([0, 50, 300]) * MIB,
        tied=rng.random() < 0.3,
    )
    workload = Workload(
        batch=rng.randrange(1, 5),
        in_flight=rng.randrange(1, 4),
        prompt_tokens=rng.randrange(16, 300),
        output_tokens=rng.randrange(2, 40),
    )
    return PlanRequest(topology, model, workload, objective)


def odd_model(rng: random.Random) -> ModelProfile:
    """Layers as of experts, of states and caches by turns, of few bits, or of next to nothing."""
    count, weight = rng.randrange(1, 7), rng.choice([1, 7 * MIB + 3, 33 * MIB + 1, 400 * MIB])
    kinds: dict[str, Callable[[int], LayerProfile]] = {
        "alike": lambda _: LayerProfile(weight, 1 << 16, float(weight)),
        "experts": lambda i: LayerProfile(weight * (8 if i % 2 else 1), 4096, float(weight)),
        "states": lambda _: LayerProfile(
            weight, rng.choice([0, 576, 1 << 16]), float(weight), rng.choice([0, MIB])
        ),
        "quantised": lambda _: LayerProfile(weight // 4, 1 << 16, float(weight)),
        "empty": lambda _: LayerProfile(0, 0, 0.0),
    }
    layer = kinds[rng.choice(list(kinds))]
    return ModelProfile(
        layers=tuple(layer(i) for i in range(count)),
        embed_bytes=rng.choice([0, 1, 300 * MIB]),
        head_bytes=rng.choice([0, 1, 300 * MIB]),
        tied=rng.random() < 0.4,
        activation_bytes_per_token=rng.choice([2, 1 << 14, MIB]),
        max_tokens=4096,
        vocab_size=rng.choice([2, 32000]),
        hidden_size=rng.choice([8, 4096]),
    )


def odd_topology(rng: random.Random, count: int) -> Topology:
    """Devices without memory or with a byte, not measured, unhealthy, free; ways of any kind.

    Ways may be one-sided, next to dead (a byte a second, 100 s) or take no time at all.
    """
    devices = []
    for index in range(count):
        worker = f"w{rng.randrange(max(1, count // 2))}"
        memory = rng.choice([0, 1]) if rng.random() < 0.1 else rng.randrange(300, 5000) * MIB + 1
        devices.append(
            Device(
                id=f"{worker}/cuda:{index}",
                worker=worker,
                host=rng.choice([worker, "host"]),
                kind="cuda",
                memory_bytes=memory,
                num_stages=rng.choice([0, 0, 1]),
                flops_per_second=rng.choice([0.0, 1e12, 1e14, 1e20]),
                memory_bytes_per_second=rng.choice([0.0, 1e3, 1e11, 1e12]),
                path=rng.choice([(), ("r0",), ("r1", worker), ("", worker, "0", "s")]),
                launch_seconds=rng.choice([0, 1e-4]),
                slowdown=rng.choice([1.0, 0.5, 9.0]),
                healthy=rng.random() > 0.05,
                cost=rng.choice([0, 1, 1, 2.5]),
            )
        )
    links = tuple(
        Link(
            a.id,
            b.id,
            rng.choice([0.0, 1e-5, rng.uniform(0, 0.02), 100.0]),
            rng.choice([1e-3, 1.0, 1e8, rng.uniform(1e8, 1e10), float("inf")]),
            "probe",
            measured_at=rng.choice([None, 1.0]),
        )
        for a in devices
        for b in devices
        if a.id != b.id and rng.random() < 0.5
    )
    return Topology(tuple(devices), links)


def odd_request(seed: int, objective: Objective, most_devices: int = 4) -> PlanRequest:
    """A request that nobody would expect, reproducible by its seed."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    workload = Workload(
        batch=rng.choice([1, 2, 64]),
        in_flight=rng.randrange(1, 4),
        prompt_tokens=rng.randrange(1, 300),
        output_tokens=rng.choice([1, 2, 40]),
    )
    topology = odd_topology(rng, rng.randrange(1, most_devices + 1))
    return PlanRequest(topology, odd_model(rng), workload, objective, budget_seconds=1.0)


@cache
def cuts(layers: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """All ways to cut layers into so many parts, none of them empty."""
    if parts == 1:
        return ((layers,),)
    return tuple(
        (first, *rest)
        for first in range(1, layers - parts + 2)
        for rest in cuts(layers - first, parts - 1)
    )
