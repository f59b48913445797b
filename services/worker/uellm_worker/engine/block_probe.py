"""What a layer of a model takes on a device, by what a step computes: a few layers, timed.

One layer and then several are run through the very code that serves, on weights of the checkpoint.
Their difference is what a layer takes; what is left of the one is what a step takes besides.
Several, because a single small layer would stay in the processor's caches, as no model does.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from uellm.models.manifest import read_manifest
from uellm.models.profile import layer_of, read_profile
from uellm.v1.engine_pb2 import BlockProbed, PrepareShard, ProbeBlock
from uellm.v1.topology_pb2 import BlockPoint, ShardAssignment
from uellm_worker.cores import quota
from uellm_worker.engine.device import Device, on_host
from uellm_worker.engine.part import Part, shard_capacity
from uellm_worker.engine.plan import Chunk, StepPlan
from uellm_worker.engine.shard import DTYPES, load_shard
from uellm_worker.engine.weights import ShardSpec

_CACHED_BYTES = 96 << 20
"""Weights beyond this are in no cache."""
_MOST_LAYERS = 8
_LEAST_REPEATS, _MOST_REPEATS = 3, 15
_LEAST_POINTS = 7
"""Fewer would not tell weights from arithmetic: a slow device takes longer than it was to."""
_OVERTIME = 4.0
"""So many times the budget at most."""
_PREFILL_TOKENS = (16, 64, 256, 1024)
_DECODES = ((1, 64), (1, 1024), (4, 256), (16, 512), (32, 128))
"""Sequences, and tokens of context of each."""
_PATTERN = 1 << 20
"""Numbers that are repeated where any will do."""
_SLOTS = max(sequences for sequences, _ in _DECODES)

GENERIC = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
"""The shape that stands for any model of which nothing is known."""


def probe_block(command: ProbeBlock) -> BlockProbed:
    """Measure.

    Raises:
        ConfigurationError: if the device is not there.
        MemoryError: if not even two layers fit.
        ModelFilesError: if the model cannot be served.
    """
    if command.shard.model_dir:
        return _probe(command, Path(command.shard.model_dir))
    with tempfile.TemporaryDirectory() as directory:
        _write_generic(Path(directory), DTYPES[command.shard.assignment.dtype or "float32"])
        return _probe(command, Path(directory))


def _probe(command: ProbeBlock, directory: Path) -> BlockProbed:
    if command.shard.threads:
        torch.set_num_threads(command.shard.threads)
    dtype = command.shard.assignment.dtype or "float32"
    profile = read_profile(directory, dtype)
    middle = len(profile.layers) // 2
    layer = profile.layers[middle]
    count = _layer_count(len(profile.layers), layer.weight_bytes, command.room_bytes)
    longest = min(profile.max_tokens, max(_PREFILL_TOKENS) + 1)
    first = min(middle, len(profile.layers) - count)
    if command.stand_in:
        _fill(directory, {middle, *range(first, first + count)})
    one = _part(command.shard, directory, dtype, (middle, middle), longest)
    many = _part(command.shard, directory, dtype, (first, first + count - 1), longest)
    parts = (one, many) if count > 1 else (one,)
    return BlockProbed(
        points=_points(parts, count, longest, profile.hidden_size, command.budget_seconds),
        weight_bytes=layer.weight_bytes,
        flops_per_token=layer.flops_per_token,
    )


def _layer_count(layers: int, weight_bytes: int, room_bytes: int) -> int:
    """How many layers are to be measured beside the one."""
    fit = room_bytes // max(weight_bytes, 1) - 1 if room_bytes else layers
    if fit < 1:
        raise MemoryError(f"two layers of {weight_bytes} bytes do not fit the {room_bytes} there")
    wanted = max(2, min(_MOST_LAYERS, -(-_CACHED_BYTES // max(weight_bytes, 1))))
    return min(layers, fit, wanted)


def _part(
    shard: PrepareShard, directory: Path, dtype: str, layers: tuple[int, int], longest: int
) -> Part:
    (device_id,) = shard.assignment.device_ids
    device = Device.named(device_id, shard.simulated)
    spec = ShardSpec(
        model_dir=directory,
        digest="",
        dtype=DTYPES[dtype],
        device=device.place,
        first_layer=layers[0],
        last_layer=layers[1],
        has_embed=False,
        has_head=False,
    )
    loaded = load_shard(spec, None, lambda done, total: None)
    assignment = ShardAssignment(slots=_SLOTS, max_tokens=longest)
    part = Part(loaded, shard_capacity(loaded, assignment), device)
    # Memory that was never written is one page of zeros, and read faster than any other.
    for cached in (*part.cache.keys, *part.cache.values):
        cached[:_SLOTS, :, :longest].fill_(0.1)
    return part


def _points(
    parts: tuple[Part, ...], count: int, longest: int, hidden: int, budget_seconds: float
) -> Iterator[BlockPoint]:
    """Compositions of steps, small ones first, until the time is over; at least one."""
    plans = sorted(_plans(longest), key=lambda plan: plan.rows)
    _time(parts, plans[0], hidden, 0.0)  # Kernels are loaded, and memory is touched.
    begun = time.perf_counter()
    found: list[tuple[int, float]] = []
    for left, plan in zip(range(len(plans), 0, -1), plans, strict=True):
        spent = time.perf_counter() - begun
        share = max(budget_seconds - spent, 0.0) / left
        limit = 3 * share
        if len(found) < _LEAST_POINTS:
            limit = max(limit, _OVERTIME * budget_seconds - spent)
        if _expected(found, plan.rows) * (_LEAST_REPEATS + 1) > limit:
            continue
        seconds = _time(parts, plan, hidden, share)
        found.append((plan.rows, sum(seconds)))
        alone, together = seconds[0], seconds[-1]
        layer = (together - alone) / (count - 1) if count > 1 else alone
        layer = min(max(layer, alone / 100), alone)
        decodes = [chunk for chunk in plan.chunks if chunk.count == 1]
        yield BlockPoint(
            tokens=plan.rows,
            context_tokens=sum(chunk.start + 1 for chunk in decodes),
            pairs=sum(
                chunk.count * (chunk.count + 1) / 2 for chunk in plan.chunks if chunk.count > 1
            ),
            layer_seconds=layer,
            step_seconds=alone - layer,
        )


def _expected(found: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds of a step of more rows, as smaller ones grew; of a first one nothing is known."""
    if not found:
        return 0.0
    most, took = found[-1]
    fewer = [(count, seconds) for count, seconds in found if count < most]
    if not fewer:
        return took * rows / most
    slope = max(took - fewer[-1][1], 0.0) / (most - fewer[-1][0])
    return took + slope * (rows - most)


def _plans(longest: int) -> Iterator[StepPlan]:
    for tokens in _PREFILL_TOKENS:
        if tokens <= longest:
            yield StepPlan(0, (Chunk(0, 0, tokens, True),))
    for sequences, context in _DECODES:
        start = min(context, longest) - 1
        yield StepPlan(0, tuple(Chunk(slot, start, 1, True) for slot in range(sequences)))


def _time(parts: tuple[Part, ...], plan: StepPlan, hidden: int, share: float) -> list[float]:
    """Median seconds of each part, taken in turn so that both see the same disturbances.

    A quota on the processors holds a process back now and then, for longer than a step takes: the
    median would not feel it. A step takes no less than what its processor time does of the quota.
    """
    place, dtype = parts[0].device.place, parts[0].shard.spec.dtype
    activation = torch.randn(plan.rows, hidden, device=place).to(dtype)
    found: list[list[tuple[float, float]]] = [[] for _ in parts]
    end = time.perf_counter() + share
    for repeat in range(_MOST_REPEATS + 1):
        for seconds, part in zip(found, parts, strict=True):
            started, used = time.perf_counter(), time.process_time()
            part.compute(plan, activation)
            if not on_host(place):
                torch.accelerator.synchronize(place)
            if repeat:  # The first is to warm up.
                seconds.append((time.perf_counter() - started, time.process_time() - used))
        if repeat >= _LEAST_REPEATS and time.perf_counter() > end:
            break
    granted = quota() if on_host(place) else math.inf
    return [
        max(statistics.median(wall), statistics.median(used) / granted)
        for wall, used in (zip(*seconds, strict=True) for seconds in found)
    ]


def _fill(directory: Path, layers: set[int]) -> None:
    """Fill the holes of files that stand in for a model's, where these layers are.

    With small numbers, as weights are: of zeros an expert is as good as another.
    """
    rng = np.random.default_rng(0)
    numbers = rng.normal(0, 0.02, _PATTERN).astype(np.float32)
    patterns = {
        "F32": numbers.tobytes(),
        "F16": numbers.astype(np.float16).tobytes(),
        "BF16": (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }
    codes = rng.bytes(4 * _PATTERN)
    for tensor in read_manifest(directory).tensors.values():
        if layer_of(tensor.name) not in layers:
            continue
        pattern = patterns.get(tensor.info.dtype, codes)
        with (directory / tensor.file).open("r+b") as file:
            file.seek(tensor.start)
            for start in range(0, tensor.size, len(pattern)):
                file.write(pattern[: tensor.size - start])


def _write_generic(directory: Path, dtype: torch.dtype) -> None:
    """A checkpoint of the generic shape, of weights that are all the same."""
    (directory / "config.json").write_text(json.dumps(GENERIC))
    hidden, between = 1024, 2816
    kv = hidden // 4
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    for layer in range(4):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (between, hidden),
            f"{at}.mlp.up_proj.weight": (between, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, between),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    tensors = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
