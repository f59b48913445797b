"""How well the probe of a few layers predicts what a stage of all of them takes.

Usage: ``python -m benchmarks.probes --random small|large | --model DIR [--threads N] [--json]``

A model's layers are probed as workers do it, for as long as deployers have them. Then all of its
layers are timed at compositions of steps that the probe did not see, and compared with what the fit
says, and with what a roofline says whose arithmetic and bandwidth are measured apart from any
model, as devices are described until they are probed. Medians; errors are relative to what was
measured.
"""
# ruff: noqa: PLC0415 - model libraries are loaded once the number of threads is set.

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uellm_deployer.probing import BLOCK_SECONDS
from uellm_worker.cores import WAITING

from benchmarks.arguments import count, directory, parser_of
from benchmarks.engine import RANDOM, write_random

if TYPE_CHECKING:
    from uellm_worker.engine.part import Part
    from uellm_worker.engine.plan import StepPlan

    from uellm.placement.measuring import BlockCost

DECODES = ((2, 128), (8, 384), (12, 96), (24, 200))
PREFILLS = (32, 96, 200, 448)
_REPEATS = 7
_SLOTS, _LONGEST = 32, 512


def probe(directory: Path, threads: int) -> "BlockCost":
    """What a worker's probe and the deployer's fit come to."""
    from uellm_worker.engine.block_probe import probe_block

    from uellm.placement.measuring import BlockSample, fit_block
    from uellm.v1.engine_pb2 import PrepareShard, ProbeBlock
    from uellm.v1.topology_pb2 import ShardAssignment

    assignment = ShardAssignment(device_ids=["w/cpu:0"], dtype="float32")
    shard = PrepareShard(assignment=assignment, model_dir=str(directory), threads=threads)
    probed = probe_block(ProbeBlock(shard=shard, budget_seconds=BLOCK_SECONDS), lambda report: None)
    samples = [
        BlockSample(p.tokens, p.context_tokens, p.pairs, p.layer_seconds, p.step_seconds)
        for p in probed.points
    ]
    return fit_block(samples, probed.weight_bytes, probed.flops_per_token, time.time())


def load(directory: Path, layers: int) -> "Part":
    """All layers as a ``Part``, with a cache that was written to."""
    import torch
    from uellm_worker.engine.device import Device
    from uellm_worker.engine.part import Part, shard_capacity
    from uellm_worker.engine.shard import load_shard
    from uellm_worker.engine.weights import ShardSpec

    from uellm.v1.topology_pb2 import ShardAssignment

    spec = ShardSpec(
        model_dir=directory,
        digest="",
        dtype=torch.float32,
        device=torch.device("cpu"),
        first_layer=0,
        last_layer=layers - 1,
        has_embed=False,
        has_head=False,
    )
    loaded = load_shard(spec, None, lambda done, total: None)
    capacity = shard_capacity(loaded, ShardAssignment(slots=_SLOTS, max_tokens=_LONGEST))
    part = Part(loaded, capacity, Device.named("w/cpu:0"))
    for cached in (*part.cache.keys, *part.cache.values):
        cached[:_SLOTS, :, :_LONGEST].fill_(0.1)
    return part


def steps() -> "dict[str, StepPlan]":
    """The compositions that are compared, by what they are called."""
    from uellm_worker.engine.plan import Chunk, StepPlan

    decodes = {
        f"{n} decode at {c}": StepPlan(0, tuple(Chunk(s, c - 1, 1, True) for s in range(n)))
        for n, c in DECODES
    }
    return decodes | {f"{n} prefill": StepPlan(0, (Chunk(0, 0, n, True),)) for n in PREFILLS}


def median_seconds(part: "Part", plan: "StepPlan", hidden: int) -> float:
    """What a step takes."""
    import torch

    activation = torch.randn(plan.rows, hidden)
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        part.compute(plan, activation)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(directory: Path, threads: int) -> dict[str, Any]:
    """Predictions and measurements by composition of the step."""
    from uellm_worker.cpu_speed import measure as machine_speed

    from uellm.core.cost import chunk_pairs
    from uellm.models.profile import read_profile

    started = time.perf_counter()
    cost = probe(directory, threads)
    probe_seconds = time.perf_counter() - started
    flops, bandwidth = machine_speed()
    profile = read_profile(directory, "float32")
    layer, layers = profile.layers[0], len(profile.layers)
    part = load(directory, layers)
    rows: list[dict[str, Any]] = []
    for name, plan in steps().items():
        context = sum(chunk.start + 1 for chunk in plan.chunks if chunk.count == 1)
        pairs = sum(chunk_pairs(0, c.count) for c in plan.chunks if c.count > 1)
        moved = layer.weight_bytes + context * layer.kv_bytes_per_token
        roof = max(plan.rows * layer.flops_per_token / flops, moved / bandwidth)
        rows.append(
            {
                "step": name,
                "measured": median_seconds(part, plan, profile.hidden_size),
                "probe": cost.step_seconds + layers * cost.layer.seconds(plan.rows, context, pairs),
                "roofline": layers * roof,
            }
        )
    errors = {
        name: statistics.median(abs(row[name] / row["measured"] - 1) for row in rows)
        for name in ("probe", "roofline")
    }
    return {"layers": layers, "probe_seconds": probe_seconds, "rows": rows, "errors": errors}


def main() -> None:
    """Measure and print."""
    parser = parser_of("probes", __doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--random", choices=sorted(RANDOM))
    which.add_argument("--model", type=directory, help="of a checkpoint")
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    os.environ.update({**WAITING, **dict.fromkeys(names, str(arguments.threads))})
    with tempfile.TemporaryDirectory() as made:
        if arguments.random:
            write_random(arguments.random, Path(made))
        found = measure(arguments.model or Path(made), arguments.threads)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{found['layers']} layers, probed in {found['probe_seconds']:.1f} s")
    for row in found["rows"]:
        took = row["measured"]
        print(
            f"{row['step']:18s} {1e3 * took:8.2f} ms   "
            f"probe {row['probe'] / took - 1:+7.1%}   roofline {row['roofline'] / took - 1:+7.1%}"
        )
    errors = found["errors"]
    print(f"median error: probe {errors['probe']:.1%}, roofline {errors['roofline']:.1%}")


if __name__ == "__main__":
    main()
