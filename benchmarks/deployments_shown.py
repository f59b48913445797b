"""What the benchmark of deployments shows while it runs, and finds before it places anything."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.layouts import Planner
from benchmarks.shaped_mesh import HostSpec
from uellm.placement.topology import LinkSpeed


def say(text: str) -> None:
    """A line, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def found_beside_made(
    planner: Planner, specs: Sequence[HostSpec], made: Callable[[str, str], LinkSpeed]
) -> dict[str, Any]:
    """What was found of devices and ways, beside how they were made.

    Args:
        planner: knows what was found.
        specs: the hosts as they were made.
        made: how fast the wire from a host to another was made.
    """
    times = planner.request(batch=1).layer_times
    by_host = {device.host: device.id for device in planner.topology.devices}
    devices = [
        {
            "host": spec.name,
            "cores": spec.cores,
            "layer_ms": 1e3 * times[by_host[spec.name]].decode[0][1],
        }
        for spec in specs
        if spec.name in by_host
    ]
    host = {device: name for name, device in by_host.items()}
    ways = [
        {
            "from": host[link.src],
            "to": host[link.dst],
            "made_ms": 1e3 * way.latency_seconds,
            "found_ms": 1e3 * link.latency_seconds,
            "made_mb": way.bytes_per_second / 1e6,
            "found_mb": link.bytes_per_second / 1e6,
        }
        for link in planner.topology.links
        for way in (made(host[link.src], host[link.dst]),)
    ]
    return {"devices": devices, "ways": ways}


def show_found(found: dict[str, Any]) -> None:
    """Devices and ways, beside how they were made."""
    for device in found["devices"]:
        say(f"{device['host']:6} {device['cores']:4} cores: {device['layer_ms']:.2f} ms a layer")
    for way in found["ways"]:
        say(
            f"{way['from']:>6} -> {way['to']:6} {way['made_ms']:6.2f} ms made, "
            f"{way['found_ms']:6.2f} found; {way['made_mb']:6.1f} MB/s made, "
            f"{way['found_mb']:6.1f} found"
        )


def show_plan(plan: dict[str, Any]) -> None:
    """A placement, predicted and measured."""
    where = " ".join(f"{device.split('-')[1]}:{count}" for device, count in plan["layers"])
    latency, rate = plan["predicted_seconds"], plan["predicted_tokens_per_second"]
    say(
        f"{plan['name']:20} {where:32} latency {latency['cold']:.3f} predicted, "
        f"{latency['learnt']:.3f} learnt, {plan['measured_seconds']:.3f} measured; tokens/s "
        f"{rate['cold']:.0f}, {rate['learnt']:.0f}, {plan['measured_tokens_per_second']:.0f}"
        + f"; the machine took {plan['machine']:.2f} times as long as when it was probed"
        + ("" if plan["kept"] else "; lost a host meanwhile, does not count")
    )
    for kind, stages in plan["stages"].items():
        for stage in stages:
            planned = stage["planned_ms"]
            say(
                f"    {kind:6} {stage['device'].split('-')[1]:6} {planned['cold']:6.2f} ms "
                f"planned, {planned['anew']:6.2f} anew, {planned['learnt']:6.2f} learnt, "
                f"{stage['measured_ms']:6.2f} measured "
                f"±{stage['spread']:.0%}"
            )
        used = "; ".join(
            f"{host} {took['engine']:.2f} + {took['agent']:.2f}, {took['held']:.2f}"
            for host, took in plan["used_ms_per_token"][kind].items()
        )
        say(f"    {kind:6} ms of processors for a token, engine + agent, held back: {used}")
