"""What layers and ends take on devices: as measured, or by the roofline.

A layer takes what its arithmetic or its memory traffic does, whichever is longer, and a launch.
"""

from collections.abc import Callable, Sequence

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.model import LayerProfile, ModelProfile
from uellm.placement.arrays import Array
from uellm.placement.speed import PAIR_FLOPS, flops_per_second, memory_bytes_per_second
from uellm.placement.topology import Device
from uellm.placement.views import LayerTimes, Workload


def layer_seconds(
    devices: Sequence[Device],
    model: ModelProfile,
    batch: int,
    workload: Workload,
    times: Sequence[LayerTimes | None],
) -> tuple[Array, Array]:
    """[n, L] seconds of prefill and of one decode step.

    A layer of a model that is not uniform takes its share of what was measured, by its FLOPs.
    """
    flops_rate = np.array([[flops_per_second(device)] for device in devices]).reshape(-1, 1)
    byte_rate = np.array([[memory_bytes_per_second(d)] for d in devices]).reshape(-1, 1)
    launch = np.array([[device.launch_seconds] for device in devices]).reshape(-1, 1)
    prompt = workload.prompt_tokens
    # In the middle of its prompt, and of its answer.
    found = []
    for tokens, context in ((prompt, prompt / 2), (1, prompt + workload.output_tokens / 2)):
        flops = np.array([_flops(layer, model, context) for layer in model.layers])
        moved = np.array([_bytes(layer, batch, context, tokens) for layer in model.layers])
        roof = np.maximum(batch * tokens * flops / flops_rate, moved / byte_rate)
        found.append(roof + launch)
    flops = np.array([layer.flops_per_token for layer in model.layers])
    share = flops / flops.mean() if flops.any() else np.ones(len(flops))
    for index, measured in enumerate(times):
        if measured is not None:
            slow = devices[index].slowdown * share
            found[0][index] = slow * _interpolate(measured.prefill, batch * prompt)
            found[1][index] = slow * _interpolate(measured.decode, batch)
        found[0][index] *= devices[index].prefill_ratio
    return found[0], found[1]


def _flops(layer: LayerProfile, model: ModelProfile, context: float) -> float:
    attention = PAIR_FLOPS * model.hidden_size * context if layer.kv_bytes_per_token else 0.0
    return layer.flops_per_token + attention


def _bytes(layer: LayerProfile, batch: int, context: float, tokens: int) -> float:
    cache = layer.kv_bytes_per_token * (context if tokens == 1 else tokens) + layer.state_bytes
    return layer.weight_bytes + batch * cache


def _interpolate(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Between two points, or on from the last two; before the first, the first."""
    if not points:
        raise InvalidArgumentError(
            "layer_times: a table without points; leave the device out of it, or measure it",
            field="layer_times",
        )
    at, seconds = zip(*sorted(points), strict=True)
    if tokens <= at[-1]:
        return float(np.interp(tokens, at, seconds))
    if len(at) == 1:
        return float(seconds[0] * tokens / at[0])
    slope = (seconds[-1] - seconds[-2]) / (at[-1] - at[-2])
    return float(seconds[-1] + max(slope, 0.0) * (tokens - at[-1]))


def head_seconds(
    devices: Sequence[Device],
    model: ModelProfile,
    batch: int,
    times: Sequence[LayerTimes | None],
) -> Array:
    """[n] seconds of the logits of a step; measured: with embedding and the choosing of tokens."""
    flops = 2.0 * model.hidden_size * model.vocab_size * batch
    return np.array(
        [
            d.slowdown * _interpolate(t.ends, batch)
            if t is not None and t.ends
            else max(flops / flops_per_second(d), model.head_bytes / memory_bytes_per_second(d))
            for d, t in zip(devices, times, strict=True)
        ]
    )


def beside_layers(
    devices: Sequence[Device],
    times: Sequence[LayerTimes | None],
    seconds: Callable[[LayerTimes], float],
) -> Array:
    """[n] seconds of what only measuring tells; 0 where nothing was measured."""
    return np.array(
        [d.slowdown * seconds(t) if t else 0.0 for d, t in zip(devices, times, strict=True)]
    )


def stage_seconds(devices: Sequence[Device], times: Sequence[LayerTimes | None]) -> Array:
    """[n] seconds of any step beside layers and ends, as measured and as learnt since."""
    measured = beside_layers(devices, times, lambda t: t.stage)
    learnt = np.array([d.slowdown * d.step_seconds for d in devices])
    found: Array = np.maximum(measured + learnt, 0.0)
    return found
