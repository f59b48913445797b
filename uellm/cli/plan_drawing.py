"""A picture of a plan: devices by host, the layers on them, the ways between stages."""

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from uellm.cli.placements import short
from uellm.placement.topology import Device, Topology
from uellm.placement.views import Plan
from uellm.placement.what_if import figures

_COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3", "#937860", "#DA8BC3", "#8C8C8C")
_PER_ROW = 8
_BEND = 0.25
"""Of arrows, as a share of their length."""


def draw(path: Path, topology: Topology, plan: Plan) -> None:
    """Write the picture."""
    devices = sorted(topology.devices, key=lambda device: (device.place, device.id))
    used = {stage.device_id for replica in plan.replicas for stage in replica.stages}
    if len(devices) > 4 * _PER_ROW:
        devices = [device for device in devices if device.id in used]
    at = {device.id: (i % _PER_ROW, -(i // _PER_ROW)) for i, device in enumerate(devices)}
    rows = -(-max(len(devices), 1) // _PER_ROW)
    figure = Figure(figsize=(2.0 * min(len(devices), _PER_ROW) + 0.5, 1.7 * rows + 0.6))
    axes = figure.add_subplot()
    for device in devices:
        _box(axes, device, at[device.id])
    axes.set_xlim(-0.6, min(len(devices), _PER_ROW) - 0.4)
    axes.set_ylim(-rows + 0.4, 0.6)
    axes.set_axis_off()
    by_id = {device.id: device for device in devices}
    for index, replica in enumerate(plan.replicas):
        colour = _COLOURS[index % len(_COLOURS)]
        for stage in replica.stages:
            x, y = at[stage.device_id]
            axes.text(
                *(x, y - 0.16 - 0.1 * (index % 2)),
                f"layers {stage.first_layer}-{stage.last_layer}",
                ha="center", fontsize=8, color=colour, weight="bold",
            )  # fmt: skip
        for one, other in pairwise(replica.stages):
            link = topology.link(by_id[one.device_id], by_id[other.device_id])
            speed = f"{short(link.latency_seconds)}, {link.bytes_per_second / 1e9:.3g} GB/s"
            _way(axes, at[one.device_id], at[other.device_id], speed, colour)
    axes.set_title(_title(plan, len(used), len(topology.devices)), fontsize=8)
    figure.savefig(path, dpi=120)


def _title(plan: Plan, used: int, there: int) -> str:
    found = figures(plan, 1)
    if plan.infeasible_reason or not plan.replicas:
        return f"{plan.objective}: cannot be placed"
    return (
        f"{plan.objective}: {used} of {there} devices, {found.total_seconds:.3g} s a batch, "
        f"{found.tokens_per_second:.4g} tokens/s"
    )


def _way(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], speed: str, colour: str
) -> None:
    """An arrow that bends, with what its link is like in its middle."""
    axes.annotate(
        "", xy=end, xytext=start,
        arrowprops={"arrowstyle": "->", "color": colour, "connectionstyle": f"arc3,rad={_BEND}",
                    "shrinkA": 22, "shrinkB": 22},
    )  # fmt: skip
    (x, y), (to_x, to_y) = axes.transData.transform([start, end])
    middle = ((x + to_x) + _BEND * (to_y - y)) / 2, ((y + to_y) - _BEND * (to_x - x)) / 2
    text_x, text_y = axes.transData.inverted().transform(middle)
    axes.text(
        text_x, text_y, speed, ha="center", va="center", fontsize=6, color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )  # fmt: skip


def _box(axes: Axes, device: Device, at: tuple[float, float]) -> None:
    x, y = at
    patch = FancyBboxPatch(
        (x - 0.42, y - 0.32), 0.84, 0.64, boxstyle="round,pad=0.02",
        facecolor="#f4f4f4" if device.healthy else "#eecccc", edgecolor="#888888",
    )  # fmt: skip
    axes.add_patch(patch)
    name = device.name.removeprefix("NVIDIA ").removeprefix("GeForce ") or device.kind
    axes.text(x, y + 0.14, device.id, ha="center", fontsize=6)
    axes.text(x, y + 0.02, name, ha="center", fontsize=6, color="#555555")
