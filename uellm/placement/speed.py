"""A first guess at how fast a replica runs, until it reports how fast it does."""

from collections.abc import Mapping
from itertools import pairwise

from uellm.core.model import ModelProfile
from uellm.placement.topology import Device
from uellm.placement.views import PlannedReplica

# Where a device has not been measured: a few cores of a server, a mid-range accelerator.
_FLOPS = {"cpu": 2e10, "cuda": 2e13}
_BANDWIDTH = {"cpu": 1e10, "cuda": 5e11}
HOP_SECONDS = 0.0005
"""From one worker to the next: mostly software, whatever the link."""


def first_guess(
    replica: PlannedReplica, model: ModelProfile, devices: Mapping[str, Device]
) -> tuple[float, float]:
    """Seconds per prefilled token and seconds per decode step.

    Prefill is taken to be bound by arithmetic; a decode step to read all weights once.
    """
    prefill = decode = 0.0
    for stage in replica.stages:
        device = devices[stage.device_id]
        layers = model.layers[stage.first_layer : stage.last_layer + 1]
        flops = sum(layer.flops_per_token for layer in layers)
        weights = sum(layer.weight_bytes for layer in layers)
        weights += model.head_bytes if stage.has_head else 0
        prefill += flops / (device.flops_per_second or _FLOPS.get(device.kind, _FLOPS["cpu"]))
        decode += weights / (
            device.memory_bytes_per_second or _BANDWIDTH.get(device.kind, _BANDWIDTH["cpu"])
        )
    workers = [devices[stage.device_id].worker for stage in replica.stages]
    hops = sum(before != after for before, after in pairwise(workers))
    return prefill, decode + HOP_SECONDS * hops
