"""Clusters and models by name, for benchmarks of placement: datasheet speeds, typical links."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from uellm.core.model import LayerProfile, ModelProfile
from uellm.placement.topology import Device, Link, LinkSpeed, Topology

GB = 1 << 30
# Of what a datasheet says, what a decoder's layers are taken to reach.
_OF_FLOPS, _OF_BANDWIDTH = 0.5, 0.8
_LAUNCH_SECONDS = 30e-6


@dataclass(frozen=True)
class Card:
    """A kind of device: bytes, peak 16-bit FLOP/s, peak memory bandwidth."""

    memory: int
    flops: float
    bandwidth: float
    kind: str = "cuda"


CARDS: Mapping[str, Card] = {
    "T4": Card(15 * GB, 65e12, 300e9),
    "L4": Card(22 * GB, 121e12, 300e9),
    "A10G": Card(22 * GB, 125e12, 600e9),
    "RTX 3090": Card(24 * GB, 71e12, 936e9),
    "V100": Card(32 * GB, 125e12, 900e9),
    "A100 40GB": Card(39 * GB, 312e12, 1555e9),
    "A100 80GB": Card(79 * GB, 312e12, 2039e9),
    "laptop": Card(14 * GB, 0.6e12, 60e9, "cpu"),
}

ETHERNET_1 = LinkSpeed(150e-6, 0.117e9)
ETHERNET_10 = LinkSpeed(50e-6, 1.17e9)
PCIE_3 = LinkSpeed(15e-6, 11e9)
SOCKET = LinkSpeed(20e-6, 6e9)
NVLINK = LinkSpeed(8e-6, 20e9)


def decoder(
    layers: int, hidden: int, feed_forward: int, kv_heads: int, vocab: int, gated: int = 3
) -> ModelProfile:
    """A decoder in 16 bits: attention with heads of 128, and a (gated) feed-forward part."""
    weights = 2 * hidden * hidden + 2 * hidden * kv_heads * 128 + gated * hidden * feed_forward
    layer = LayerProfile(2 * weights, 2 * 2 * kv_heads * 128, 2.0 * weights)
    return ModelProfile(
        layers=(layer,) * layers,
        embed_bytes=2 * vocab * hidden,
        head_bytes=2 * vocab * hidden,
        tied=False,
        activation_bytes_per_token=2 * hidden,
        max_tokens=4096,
        vocab_size=vocab,
        hidden_size=hidden,
    )


MODELS: Mapping[str, ModelProfile] = {
    "6B (ChatGLM2)": decoder(28, 4096, 13696, 2, 65024),
    "7B (Llama 2)": decoder(32, 4096, 11008, 32, 32000),
    "13B (Llama 2)": decoder(40, 5120, 13824, 40, 32000),
    "70B (Llama 2)": decoder(80, 8192, 28672, 8, 32000),
}


def card(name: str, worker: str, index: int, path: tuple[str, ...]) -> Device:
    """A device of a kind."""
    spec = CARDS[name]
    return Device(
        id=f"{worker}/{spec.kind}:{index}",
        worker=worker,
        host=path[1],
        kind=spec.kind,
        memory_bytes=spec.memory,
        flops_per_second=_OF_FLOPS * spec.flops,
        memory_bytes_per_second=_OF_BANDWIDTH * spec.bandwidth,
        name=name,
        path=path,
        launch_seconds=_LAUNCH_SECONDS,
    )


def hosts(cards: Iterable[tuple[str, int, str]], network: LinkSpeed) -> Topology:
    """Hosts as (kind, number, rack), every device behind a switch of its NUMA node."""
    devices = []
    for number, (kind, count, rack) in enumerate(cards):
        host = f"h{number:03}"
        for index in range(count):
            numa = str(2 * index // max(count, 2))
            devices.append(card(kind, host, index, (rack, host, numa)))
    defaults = {"numa": PCIE_3, "host": SOCKET, "rack": network}
    slower = LinkSpeed(2 * network.latency_seconds, network.bytes_per_second / 2)
    return Topology(tuple(devices), default_link_by_level={**defaults, "network": slower})


def dgx_1() -> Topology:
    """Eight V100 in a cube mesh: pairs with one or two NVLinks, others over the sockets."""
    double = {(0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7)}
    single = {(0, 1), (0, 2), (1, 3), (2, 6), (3, 7), (4, 5), (4, 6), (5, 7)}
    devices = tuple(card("V100", "dgx", i, ("", "dgx", str(i // 4))) for i in range(8))
    links = tuple(
        Link(devices[a].id, devices[b].id, NVLINK.latency_seconds, number * 20e9, kind="nvlink")
        for pairs, number in ((single, 1), (double, 2))
        for a, b in sorted(pairs)
    )
    return Topology(devices, links, {"numa": PCIE_3, "host": SOCKET})


def dgx_a100() -> Topology:
    """Eight A100 on one switch."""
    devices = tuple(card("A100 40GB", "dgx", i, ("", "dgx", "0", "nvswitch")) for i in range(8))
    return Topology(devices, (), {"switch": LinkSpeed(8e-6, 235e9)})


def mixed(count: int) -> Topology:
    """Hosts of four to eight cards of one kind each, in racks of eight hosts."""
    pattern = (("T4", 4), ("A10G", 4), ("A100 40GB", 8), ("L4", 8), ("V100", 8))
    cards = []
    while sum(number for _, number, _ in cards) < count:
        kind, number = pattern[len(cards) % len(pattern)]
        number = min(number, count - sum(each for _, each, _ in cards))
        cards.append((kind, number, f"r{len(cards) // 8}"))
    return hosts(cards, ETHERNET_10)


def geometric(count: int, seed: int) -> Topology:
    """Single cards at sites on a plane: a wide area, whose links are no tree."""
    rng = random.Random(seed)
    kinds = ["T4", "L4", "A10G", "RTX 3090", "A100 40GB"]
    devices = tuple(card(rng.choice(kinds), f"s{i:03}", 0, ("", f"s{i:03}")) for i in range(count))
    at = {device.id: complex(rng.random(), rng.random()) for device in devices}
    links = tuple(
        Link(a.id, b.id, 1e-3 + 0.03 * abs(at[a.id] - at[b.id]), 0.1e9, kind="wan")
        for a in devices
        for b in devices
        if a.id != b.id
    )
    return Topology(devices, links)


def named() -> dict[str, tuple[Topology, str]]:
    """Clusters and the model that each is asked to hold."""
    singles = [("T4", 1, ""), ("L4", 1, ""), ("A100 40GB", 1, "")]
    four = [each for each in singles for _ in range(4)]
    helix = [("A100 40GB", 1, "")] * 4 + [("L4", 1, "")] * 8 + [("T4", 1, "")] * 12
    return {
        "4x3090 PCIe, 2 NUMA nodes": (hosts([("RTX 3090", 4, "")], ETHERNET_10), "6B (ChatGLM2)"),
        "DGX-1 (8 V100)": (dgx_1(), "70B (Llama 2)"),
        "DGX A100": (dgx_a100(), "70B (Llama 2)"),
        "2 hosts of 8 A100": (
            hosts([("A100 40GB", 8, "")] * 2, ETHERNET_10),
            "70B (Llama 2)",
        ),
        "4 T4 + 4 L4 + 4 A100, 13B": (hosts(four, ETHERNET_10), "13B (Llama 2)"),
        "4 T4 + 4 L4 + 4 A100, 70B": (hosts(four, ETHERNET_10), "70B (Llama 2)"),
        "24 mixed (Helix)": (hosts(helix, ETHERNET_10), "70B (Llama 2)"),
        "64 mixed": (mixed(64), "70B (Llama 2)"),
        "256 mixed": (mixed(256), "70B (Llama 2)"),
        "6 laptops, CPU only": (hosts([("laptop", 1, "")] * 6, ETHERNET_1), "7B (Llama 2)"),
    }
