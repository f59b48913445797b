"""How fast devices are taken to be, and a first guess at a replica until it reports for itself."""

from collections.abc import Mapping
from itertools import pairwise

from uellm.core.cost import StepCost
from uellm.core.model import ModelProfile
from uellm.placement.topology import Device
from uellm.placement.views import PlannedReplica

# Where a device has not been measured: a few cores of a server, a mid-range accelerator.
_FLOPS = {"cpu": 2e10, "cuda": 2e13}
_BANDWIDTH = {"cpu": 1e10, "cuda": 5e11}
HOP_SECONDS = 0.0005
"""From one worker to the next: mostly software, whatever the link."""
PAIR_FLOPS = 4
"""Of attention between two tokens, by width of the residual stream: scores and their sums."""


def flops_per_second(device: Device) -> float:
    """As measured, or by its kind; throttling counted in."""
    nominal = device.flops_per_second or _FLOPS.get(device.kind, _FLOPS["cpu"])
    return nominal / device.slowdown


def memory_bytes_per_second(device: Device) -> float:
    """As measured, or by its kind; throttling counted in."""
    nominal = device.memory_bytes_per_second or _BANDWIDTH.get(device.kind, _BANDWIDTH["cpu"])
    return nominal / device.slowdown


def first_guess(
    replica: PlannedReplica, model: ModelProfile, devices: Mapping[str, Device]
) -> StepCost:
    """What a replica's steps take.

    A step is taken to read all weights once, or to be bound by arithmetic if that takes longer.
    """
    per_token = weights = per_context = per_pair = 0.0
    for stage in replica.stages:
        device = devices[stage.device_id]
        speed, bandwidth = flops_per_second(device), memory_bytes_per_second(device)
        layers = model.layers[stage.first_layer : stage.last_layer + 1]
        streamed = sum(layer.weight_bytes for layer in layers)
        streamed += model.head_bytes if stage.has_head else 0
        weights += streamed / bandwidth
        per_token += sum(layer.flops_per_token for layer in layers) / speed
        per_context += sum(layer.kv_bytes_per_token for layer in layers) / bandwidth
        per_pair += PAIR_FLOPS * model.hidden_size * len(layers) / speed
    workers = [devices[stage.device_id].worker for stage in replica.stages]
    hops = sum(before != after for before, after in pairwise(workers))
    return StepCost(HOP_SECONDS * hops, weights, per_token, per_context, per_pair)
