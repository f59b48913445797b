"""Devices, links and models to place, drawn or named."""

import random

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
