"""What a layer of a model takes on a device, by what a step computes: a few layers, timed.

One layer and then several are run through the very code that serves, on weights of the checkpoint.
Their difference is what a layer takes; what is left of the one is what a step takes besides.
Several, because a single small layer would stay in the processor's caches, as no model does. The
one once more with embedding and head says what the ends of a replica take, and what its leader does
between two steps.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from uellm.models.manifest import read_manifest
from uellm.models.profile import layer_of, read_profile
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import BlockProbed, PrepareShard, ProbeBlock, StepReport
from uellm.v1.topology_pb2 import BlockPoint, ShardAssignment
from uellm_worker.engine.capacity import Capacity
from uellm_worker.engine.device import Device
from uellm_worker.engine.loop_probe import leader_seconds
from uellm_worker.engine.part import Part, shard_capacity
from uellm_worker.engine.plan import Admission, Chunk, StepPlan
from uellm_worker.engine.runner import Tell
from uellm_worker.engine.shard import DTYPES, Shard, load_shard
from uellm_worker.engine.shard_stage import ShardStage
from uellm_worker.engine.step_timing import LEAST_REPEATS, StepTimer, TimedSteps, turns
from uellm_worker.engine.weights import ShardSpec

_CACHED_BYTES = 96 << 20
"""Weights beyond this are in no cache."""
_MOST_LAYERS = 8
_LEAST_LAYERS = 3
"""One and two: without room for these besides, embedding and head are not measured."""
_LEAST_POINTS = 7
"""Fewer would not tell weights from arithmetic: a slow device takes longer than it was to."""
_OVERTIME = 4.0
"""So many times the budget at most."""
_PREFILL_TOKENS = (16, 64, 256, 1024)
_DECODES = ((1, 64), (1, 1024), (4, 256), (8, 64), (16, 512), (32, 128))
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


def probe_block(command: ProbeBlock, tell: Tell) -> BlockProbed:
    """Measure.

    Args:
        command: what.
        tell: told the steps that are timed of a leader, where the command wants them said.

    Raises:
        ConfigurationError: if the device is not there.
        MemoryError: if not even two layers fit.
        ModelFilesError: if the model cannot be served.
    """
    if command.shard.model_dir:
        return _probe(command, Path(command.shard.model_dir), tell)
    with tempfile.TemporaryDirectory() as directory:
        _write_generic(Path(directory), DTYPES[command.shard.assignment.dtype or "float32"])
        return _probe(command, Path(directory), tell)


def _probe(command: ProbeBlock, directory: Path, tell: Callable[[StepReport], None]) -> BlockProbed:
    if command.shard.threads:
        torch.set_num_threads(command.shard.threads)
    dtype = command.shard.assignment.dtype or "float32"
    profile = read_profile(directory, dtype)
    middle = len(profile.layers) // 2
    layer = profile.layers[middle]
    ends = layer.weight_bytes + profile.embed_bytes + profile.head_bytes
    left = command.room_bytes - ends
    with_ends = not command.room_bytes or left >= _LEAST_LAYERS * layer.weight_bytes
    room = left if command.room_bytes and with_ends else command.room_bytes
    count = _layer_count(len(profile.layers), layer.weight_bytes, room)
    longest = min(profile.max_tokens, max(_PREFILL_TOKENS) + 1)
    first = min(middle, len(profile.layers) - count)
    if command.stand_in:
        _fill(directory, {middle, *range(first, first + count)})
    one = _part(command.shard, directory, dtype, (middle, middle), longest)
    many = None
    if count > 1:
        many = _part(command.shard, directory, dtype, (first, first + count - 1), longest)
    timer = StepTimer(one.device.place)
    subjects = _Subjects(one, many, count, profile.hidden_size)
    if with_ends:
        whole = _part(command.shard, directory, dtype, (middle, middle), longest, ends=True)
        subjects.whole = ShardStage([whole], _capacity(whole.shard, longest))
    told = tell if command.steps else StepReport.SerializeToString
    led = leader_seconds(subjects.whole, told) if subjects.whole else 0.0
    return BlockProbed(
        points=_points(subjects, timer, longest, command.budget_seconds),
        weight_bytes=layer.weight_bytes,
        flops_per_token=layer.flops_per_token,
        leader_seconds=led / timer.share,
        share=timer.share,
        period_seconds=timer.period_seconds,
    )


def _layer_count(layers: int, weight_bytes: int, room_bytes: int) -> int:
    """How many layers are to be measured beside the one."""
    fit = room_bytes // max(weight_bytes, 1) - 1 if room_bytes else layers
    if fit < 1:
        raise MemoryError(f"two layers of {weight_bytes} bytes do not fit the {room_bytes} there")
    wanted = max(2, min(_MOST_LAYERS, -(-_CACHED_BYTES // max(weight_bytes, 1))))
    return min(layers, fit, wanted)


def _part(
    shard: PrepareShard,
    directory: Path,
    dtype: str,
    layers: tuple[int, int],
    longest: int,
    *,
    ends: bool = False,
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
        has_embed=ends,
        has_head=ends,
    )
    loaded = load_shard(spec, None, lambda done, total: None)
    part = Part(loaded, _capacity(loaded, longest), device)
    # Memory that was never written is one page of zeros, and read faster than any other.
    for cached in (*part.cache.keys, *part.cache.values):
        cached[:_SLOTS, :, :longest].fill_(0.1)
    return part


def _capacity(shard: Shard, longest: int) -> Capacity:
    return shard_capacity(shard, ShardAssignment(slots=_SLOTS, max_tokens=longest))


class _Subjects:
    """What steps are computed on.

    Args:
        one: a layer.
        many: several, so many; None: there is but one.
        count: how many.
        hidden: width of activations.

    Attributes:
        whole: a layer with embedding and head; None: there is no room for these.
    """

    def __init__(self, one: Part, many: Part | None, count: int, hidden: int) -> None:
        self._one, self._many, self._count, self._hidden = one, many, count, hidden
        self.whole: ShardStage | None = None

    def timed(self, timer: StepTimer, plan: StepPlan) -> TimedSteps:
        """A step on all of them."""
        place, dtype = self._one.device.place, self._one.shard.spec.dtype
        activation = torch.randn(plan.rows, self._hidden, device=place).to(dtype)
        steps: list[Callable[[], object]] = [lambda: self._one.compute(plan, activation)]
        if self._many is not None:
            many = self._many
            steps.append(lambda: many.compute(plan, activation))
        if self.whole is not None:
            steps.append(partial(_compute, self.whole, plan))
        return TimedSteps(timer, steps)

    def point(self, plan: StepPlan, seconds: Sequence[float], share: float) -> BlockPoint:
        """What a step takes of a layer and besides, by what it took; see ``StepTimer.share``."""
        alone = seconds[0]
        layer = alone
        if self._many is not None:
            layer = (seconds[1] - alone) / (self._count - 1)
        layer = min(max(layer, alone / 100), alone)
        ends = max(seconds[-1] - alone, 0.0) if self.whole is not None else 0.0
        decodes = [chunk for chunk in plan.chunks if chunk.count == 1]
        return BlockPoint(
            tokens=plan.rows,
            context_tokens=sum(chunk.start + 1 for chunk in decodes),
            pairs=sum(
                chunk.count * (chunk.count + 1) / 2 for chunk in plan.chunks if chunk.count > 1
            ),
            layer_seconds=layer / share,
            step_seconds=(alone - layer) / share,
            ends_seconds=ends / share,
        )


def _compute(stage: ShardStage, plan: StepPlan) -> None:
    """A step from token ids to tokens."""
    stage.sample(plan, stage.compute(plan, None))


def _points(
    subjects: _Subjects, timer: StepTimer, longest: int, budget_seconds: float
) -> list[BlockPoint]:
    """Compositions of steps, as many as the time allows; at least one."""
    begun = time.perf_counter()
    chosen = _chosen(subjects, timer, longest, budget_seconds)
    left = begun + budget_seconds - time.perf_counter()
    for index in turns([timed.turn_seconds for _, timed in chosen], left):
        chosen[index][1].turn()
        if time.perf_counter() > begun + _OVERTIME * budget_seconds:
            break
    return [subjects.point(plan, timed.seconds, timer.share) for plan, timed in chosen]


def _chosen(
    subjects: _Subjects, timer: StepTimer, longest: int, budget_seconds: float
) -> list[tuple[StepPlan, TimedSteps]]:
    """Small ones first, until the time would be over; each has had a turn."""
    plans = sorted(_plans(longest), key=lambda plan: plan.rows)
    subjects.timed(timer, plans[0]).turn()  # Kernels are loaded, and memory is touched.
    spent = 0.0
    chosen: list[tuple[StepPlan, TimedSteps]] = []
    for left, plan in zip(range(len(plans), 0, -1), plans, strict=True):
        limit = 3 * max(budget_seconds - spent, 0.0) / left
        if len(chosen) < _LEAST_POINTS:
            limit = max(limit, _OVERTIME * budget_seconds - spent)
        found = [(each.rows, timed.turn_seconds) for each, timed in chosen]
        if _expected(found, plan.rows) * (LEAST_REPEATS + 2) > limit:
            continue
        timed = subjects.timed(timer, plan)
        timed.warm_up()
        spent += (LEAST_REPEATS + 2) * timed.turn_seconds
        chosen.append((plan, timed))
    return chosen


def _expected(found: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds of a turn of more rows, as smaller ones grew; of a first one nothing is known."""
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
            yield _plan((Chunk(0, 0, tokens, True),))
    for sequences, context in _DECODES:
        start = min(context, longest) - 1
        yield _plan(tuple(Chunk(slot, start, 1, True) for slot in range(sequences)))


def _plan(chunks: tuple[Chunk, ...]) -> StepPlan:
    """A step of these, whose tokens are the likeliest ones."""
    rows = sum(chunk.count for chunk in chunks)
    given = tuple(Admission(chunk.slot, 1, Sampling()) for chunk in chunks)
    return StepPlan(0, chunks, given, token_ids=(1,) * rows)


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
