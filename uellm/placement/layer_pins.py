"""Layers that are pinned to devices, workers or hosts: what pins say, and who keeps them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.placement.arrays import Bools
from uellm.placement.costs import usable_devices
from uellm.placement.topology import Device
from uellm.placement.views import LayerPin, PlannedReplica, PlanRequest


def on(device: Device, name: str) -> bool:
    """Whether a name is a device's, its worker's or its host's."""
    return name in (device.id, device.worker, device.host)


def in_words(pins: Sequence[LayerPin]) -> str:
    """Pins for people."""
    return " and ".join(
        f"layers {pin.first_layer} to {pin.last_layer} on {pin.name}" for pin in pins
    )


def allowed(devices: Sequence[Device], pins: Sequence[LayerPin], num_layers: int) -> Bools:
    """[n, L], whether a device may have a layer."""
    may = np.ones((len(devices), num_layers), dtype=np.bool_)
    for pin in pins:
        others = [index for index, device in enumerate(devices) if not on(device, pin.name)]
        may[others, pin.first_layer : pin.last_layer + 1] = False
    return may


def check(request: PlanRequest) -> None:
    """Refuse pins that cannot be.

    Raises:
        InvalidArgumentError: naming what they say, and the remedy.
    """
    num_layers, workload = len(request.model.layers), request.workload
    if workload.replicas > 1 or workload.stages or request.pins or request.objective == "goodput":
        _refuse(
            "they place one copy, stage by stage; leave out replicas, stages, other pins and the "
            "objective goodput"
        )
    pins = sorted(request.layer_pins, key=lambda pin: pin.first_layer)
    for pin in pins:
        if not 0 <= pin.first_layer <= pin.last_layer < num_layers:
            _refuse(f"{_option(pin)}: the model has layers 0 to {num_layers - 1}")
    for before, after in pairwise(pins):
        if after.first_layer <= before.last_layer:
            _refuse(f"{_option(before)} and {_option(after)} have layers in common")
    usable = usable_devices(request)
    for pin in pins:
        if not any(on(device, pin.name) for device in usable):
            names = sorted({device.host for device in usable} | {device.id for device in usable})
            _refuse(
                f"{_option(pin)}: {pin.name} has no device that may be used, and nothing is placed "
                f"until it has; start its worker, or pin to another of {', '.join(names) or 'none'}"
            )


def _option(pin: LayerPin) -> str:
    return f"{pin.first_layer}-{pin.last_layer}={pin.name}"


def _refuse(problem: str) -> None:
    raise InvalidArgumentError(f"layer pins: {problem}", field="pins")


def keeps(replica: PlannedReplica, request: PlanRequest) -> bool:
    """Whether a replica keeps pins and SLO."""
    devices = {device.id: device for device in request.topology.devices}
    for pin in request.layer_pins:
        for stage in replica.stages:
            outside = stage.last_layer < pin.first_layer or pin.last_layer < stage.first_layer
            if not outside and not on(devices[stage.device_id], pin.name):
                return False
    ids = [stage.device_id for stage in replica.stages]
    places = {"any": ids, "first": ids[:1], "last": ids[-1:]}
    slo = request.workload.slo_seconds
    total = replica.prediction.total_seconds if replica.prediction else 0.0
    return (not slo or total <= slo) and all(
        pin.device_id in places[pin.end] for pin in request.pins
    )
