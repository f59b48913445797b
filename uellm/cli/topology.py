"""`uellm topology`: devices, the ways between them, and how well both are known."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from uellm.cli import exits
from uellm.cli.durations import ago
from uellm.cli.service_calls import deployer
from uellm.convert import seconds
from uellm.placement.explain import size
from uellm.streams.connection import check, connect
from uellm.streams.registry import Registry
from uellm.topology_file import to_yaml
from uellm.v1 import deployer_pb2, topology_pb2

_MOST_LINKS = 64
"""Ways that the table has room for; --json and --yaml have all."""


async def show(  # noqa: D417 (as the command's options)
    redis_url: str, *, probe: bool, model: str, timeout: float, form: str
) -> int:
    """Ask the deployer, and print what it says.

    Args:
        form: "table", "json" or "yaml".

    Raises:
        UnavailableError: if there is no deployer.
        UellmError: what it says against it.
    """
    redis = connect(redis_url)
    try:
        await check(redis, redis_url)
        workers = [worker.service_id for worker in await Registry(redis).find("worker")]
        now = (await redis.time())[0]
    finally:
        await redis.aclose()
    request = deployer_pb2.GetTopologyRequest(probe=probe, model=model)
    async with deployer(redis_url) as stub:
        answer = await stub.GetTopology(request, timeout=timeout)
    if form == "yaml":
        sys.stdout.write(to_yaml(answer.topology))
    elif form == "json":
        facts = MessageToDict(answer, preserving_proto_field_name=True)
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    else:
        _print(answer, workers, now)
    return exits.OK


def _print(answer: deployer_pb2.GetTopologyResponse, workers: Sequence[str], now: float) -> None:
    console = Console()
    topology = answer.topology
    if not topology.devices:
        console.print(
            f"no device yet: {', '.join(workers)} will tell theirs when they have loaded what "
            "computes models"
            if workers
            else "no device: start a worker with `uellm serve worker`",
            soft_wrap=True,
        )
        return
    console.print(_devices(topology.devices, now))
    if topology.links:
        console.print(_links(topology.links, now))
    elif len(topology.devices) > 1:
        console.print("no way between them was measured; `uellm topology --probe` does")
    hidden = len(topology.links) - _MOST_LINKS
    if hidden > 0:
        console.print(f"and {hidden} more ways; --json shows them")
    if answer.blocks:
        console.print(_blocks(answer.blocks, now))
    for device in topology.devices:
        for note in device.notes:
            console.print(f"{device.id}: {note}", markup=False)
    for note in answer.notes:
        console.print(f"not measured: {note}", markup=False)


def _devices(devices: Sequence[topology_pb2.Device], now: float) -> Table:
    columns = ("device", "name", "free", "FLOP/s", "memory/s", "slowed", "where", "measured")
    table = Table(*columns, box=None)
    for device in devices:
        slowed = ", ".join(device.throttled_by)
        factor = f"{device.slowdown:.2f}x" if device.slowdown > 1.005 else "no"
        table.add_row(
            device.id if device.healthy else f"[red]{device.id} (not usable)",
            device.name,
            f"{size(device.memory_free_bytes)} of {size(device.memory_total_bytes)}",
            _rate(device.flops_per_second),
            _rate(device.memory_bytes_per_second, "B"),
            f"{factor} ({slowed})" if slowed else factor,
            "/".join(part or "-" for part in device.path),
            _age(device, now),
        )
    return table


def _links(links: Sequence[topology_pb2.Link], now: float) -> Table:
    columns = ("from", "to", "kind", "latency", "of it the network", "bytes/s", "by", "measured")
    table = Table(*columns, box=None)
    for link in links[:_MOST_LINKS]:
        table.add_row(
            link.src,
            link.dst,
            link.kind,
            _short(link.latency_seconds),
            _short(link.wire_seconds) if link.wire_seconds else "",
            _rate(link.bytes_per_second, "B"),
            link.source,
            _age(link, now),
        )
    return table


def _blocks(blocks: Sequence[deployer_pb2.MeasuredBlock], now: float) -> Table:
    columns = ("layers on", "host", "of", "in", "decode of 1", "of 16", "per prompt token")
    table = Table(*columns, "fit's error", "live", "measured", box=None)
    for block in blocks:
        cost, layer = block.cost, block.cost.layer
        table.add_row(
            block.device,
            block.host,
            block.model or "any model",
            block.dtype,
            *(
                _short(
                    layer.overhead_seconds
                    + max(layer.weights_seconds, layer.token_seconds * sequences)
                )
                for sequences in (1, 16)
            ),
            _short(layer.token_seconds),
            f"{cost.error:.1%}",
            f"{cost.live_ratio:.2f}x" if cost.HasField("live_at") else "",
            ago(now - seconds(cost.measured_at)),
        )
    return table


def _rate(value: float, unit: str = "") -> str:
    if not value:
        return "not known"
    for prefix, power in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= power:
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _short(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _age(message: Any, now: float) -> str:
    if not message.HasField("measured_at"):
        return "declared"
    return ago(now - seconds(message.measured_at))
