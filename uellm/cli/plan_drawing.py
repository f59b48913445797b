"""A picture of a plan: devices by host, the layers on them, the ways between stages."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from uellm.placement.topology import Device, Topology
from uellm.placement.views import Plan

_COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3", "#937860", "#DA8BC3", "#8C8C8C")
_PER_ROW = 8


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
    for index, replica in enumerate(plan.replicas):
        colour = _COLOURS[index % len(_COLOURS)]
        for stage in replica.stages:
            x, y = at[stage.device_id]
            axes.text(
                *(x, y - 0.16 - 0.1 * (index % 2)),
                f"layers {stage.first_layer}-{stage.last_layer}",
                ha="center", fontsize=8, color=colour, weight="bold",
            )  # fmt: skip
        for one, other in zip(replica.stages, replica.stages[1:], strict=False):
            axes.annotate(
                "", xy=at[other.device_id], xytext=at[one.device_id],
                arrowprops={"arrowstyle": "->", "color": colour, "connectionstyle": "arc3,rad=0.25",
                            "shrinkA": 22, "shrinkB": 22},
            )  # fmt: skip
    axes.set_xlim(-0.6, min(len(devices), _PER_ROW) - 0.4)
    axes.set_ylim(-rows + 0.4, 0.6)
    axes.set_axis_off()
    axes.set_title(f"{plan.objective}: {plan.explanation[:120]}", fontsize=7)
    figure.savefig(path, dpi=120)


def _box(axes: "object", device: Device, at: tuple[float, float]) -> None:
    x, y = at
    patch = FancyBboxPatch(
        (x - 0.42, y - 0.32), 0.84, 0.64, boxstyle="round,pad=0.02",
        facecolor="#f4f4f4" if device.healthy else "#eecccc", edgecolor="#888888",
    )  # fmt: skip
    axes.add_patch(patch)  # type: ignore[attr-defined]
    name = device.name.removeprefix("NVIDIA ").removeprefix("GeForce ") or device.kind
    axes.text(x, y + 0.14, device.id, ha="center", fontsize=6)  # type: ignore[attr-defined]
    axes.text(x, y + 0.02, name, ha="center", fontsize=6, color="#555555")  # type: ignore[attr-defined]
