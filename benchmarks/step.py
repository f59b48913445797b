"""Where the time of one decode step goes, and how near it comes to what this machine allows.

Usage: ``python -m benchmarks.step --random small [--threads N] [--slots N] [--context N] [--json]``

All slots decode at about the same context. Products with weights, attention, sampling and the loop
are timed where they are called; the rest is norms, rotations and what Python takes. The floor is
the longer of two times: to read the weights and the cache at the bandwidth of a sum over memory,
and to multiply at the rate of a large product, both measured here with as many threads. Medians
over the steps are given.
"""
# ruff: noqa: PLC0415 - model libraries are loaded once the number of threads is set.

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from uellm_worker.cores import WAITING

from benchmarks.arguments import count, directory, parser_of
from benchmarks.engine import RANDOM, write_random

PARTS = ("products", "attention", "other", "sampling", "loop")
_WARM = 5
"""Steps before those that count."""


class Clock:
    """Seconds by the name of what is timed, of the step under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, name: str, owner: Any, attribute: str) -> Iterator[None]:
        """Time every call of a function."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - started
            return result

        with patch.object(owner, attribute, timed):
            yield

    @contextmanager
    def timing_operations(self, team: Any) -> Iterator[None]:
        """Time the operations of programs that have several; others are those that are called."""
        import torch

        run: Callable[..., None] = team.run

        def timed(team: Any, program: Any, step: int, members: int) -> None:
            names = program.names
            if len(names) == 1:
                run(team, program, step, members)
                return
            times = torch.empty(len(names) + 1, 2, dtype=torch.int64)
            run(team, program, step, members, times)
            seconds = times.double() @ torch.tensor([1.0, 1e-9], dtype=torch.float64)
            for name, taken in zip(names, seconds.diff().tolist(), strict=True):
                self.seconds[name] += taken

        with patch.object(team, "run", timed):
            yield


@contextmanager
def clocked() -> Iterator[Clock]:
    """Time the parts of whatever is loaded and computed meanwhile."""
    from torch import nn
    from uellm_worker.engine import attention, fused
    from uellm_worker.engine.packing import PackedLinear
    from uellm_worker.engine.part import Part
    from uellm_worker.engine.quantized import QuantizedLinear
    from uellm_worker.engine.shard_stage import ShardStage
    from uellm_worker.engine.team import Team

    clock = Clock()
    with ExitStack() as stack:
        for linear in (PackedLinear, QuantizedLinear, nn.Linear):
            stack.enter_context(clock.timing("products", linear, "forward"))
        for module in (attention, fused):
            stack.enter_context(clock.timing("attention", module, "attend"))
        stack.enter_context(clock.timing_operations(Team))
        stack.enter_context(clock.timing("compute", Part, "compute"))
        stack.enter_context(clock.timing("sampling", ShardStage, "sample"))
        yield clock


def measure_steps(
    directory: Path, slots: int, context: int, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a step by part, and what the step has to read and multiply."""
    from uellm_worker.verification.pipeline import Pipeline

    from uellm.models.profile import read_profile
    from uellm.v1.common_pb2 import Sampling
    from uellm.v1.engine_pb2 import AddSequence

    layers = len(read_profile(directory, "float32").layers)
    tokens = _WARM + steps + 2
    with clocked() as clock:
        pipeline = Pipeline(directory, (layers,), slots=slots, max_tokens=context + tokens)
        loop = pipeline.loop()
        for index in range(slots):
            prompt = [(index * 31 + place) % 200 + 3 for place in range(context)]
            sampling = Sampling(max_tokens=tokens, ignore_eos=True)
            loop.add(
                AddSequence(
                    request_id=str(index),
                    token_ids=prompt,
                    prompt_tokens=context,
                    sampling=sampling,
                )
            )
        begun: set[str] = set()
        while len(begun) < slots:
            report = loop.step()
            begun |= {output.request_id for output in report.outputs} if report else set()
        found = [_one_step(loop, clock) for _ in range(_WARM + steps)][_WARM:]
    medians = {name: statistics.median(step[name] for step in found) for name in (*PARTS, "step")}
    (part,) = pipeline.stages[0].parts
    return medians, _work(part, slots, context + _WARM + steps // 2)


def _one_step(loop: Any, clock: Clock) -> dict[str, float]:
    clock.seconds.clear()
    started = time.perf_counter()
    loop.step()
    step = time.perf_counter() - started
    seconds = clock.seconds
    inner = seconds["products"] + seconds["attention"]
    found = {
        "products": seconds["products"],
        "attention": seconds["attention"],
        "other": seconds["compute"] - inner,
        "sampling": seconds["sampling"],
        "loop": step - seconds["compute"] - seconds["sampling"],
        "step": step,
    }
    return {name: 1e3 * value for name, value in found.items()}


def _work(part: Any, slots: int, context: int) -> dict[str, float]:
    """Bytes that a step reads, and its floating-point operations, attention's left out."""
    from uellm_worker.engine.half import HalfRows
    from uellm_worker.engine.packing import held_bytes
    from uellm_worker.engine.part import token_bytes

    read = 0
    for held, weight in part.shard.tensors.items():
        if isinstance(weight, HalfRows):
            read += weight.head.nbytes if weight.head is not None else 0
        elif held.packed or not held.looked_up:
            read += held_bytes(weight)
    embedding = part.shard.config.vocab_size * part.shard.config.hidden_size
    tied = getattr(part.shard.config, "tie_word_embeddings", False)
    numbers = part.shard.total_bytes // 4 - (0 if tied else embedding)
    cached = slots * context * token_bytes(part.shard)
    return {"bytes": float(read + cached), "flops": 2.0 * slots * numbers}


def machine_rates() -> tuple[float, float]:
    """Bytes a second of a sum over memory, and FLOPs a second of a large float32 product."""
    import torch
    from uellm_worker.engine.packing import PackedLinear, pack

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return min(times)

    memory = torch.ones(1 << 26)
    linear, rows = PackedLinear(pack(torch.randn(2048, 2048)), None), torch.randn(512, 2048)
    bandwidth = memory.nbytes / best(memory.sum)
    return bandwidth, 2 * 512 * 2048**2 / best(lambda: linear.forward(rows))


def measure(directory: Path, slots: int, context: int, steps: int) -> dict[str, Any]:
    """The breakdown, the floor, and the fraction of it that is reached."""
    bandwidth, rate = machine_rates()
    parts, work = measure_steps(directory, slots, context, steps)
    reading, multiplying = 1e3 * work["bytes"] / bandwidth, 1e3 * work["flops"] / rate
    floor = max(reading, multiplying)
    return {
        "milliseconds": {name: round(value, 3) for name, value in parts.items()},
        "tokens_per_second": round(1e3 * slots / parts["step"], 1),
        "read_bytes": int(work["bytes"]),
        "flops": int(work["flops"]),
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 1),
        "gflops_per_second": round(rate / 1e9, 1),
        "floor_milliseconds": {
            "reading": round(reading, 3),
            "multiplying": round(multiplying, 3),
        },
        "fraction_of_floor": round(floor / parts["step"], 3),
    }


def main() -> None:
    """Run and print."""
    parser = parser_of("step", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=directory, help="of a checkpoint")
    source.add_argument("--random", choices=RANDOM)
    parser.add_argument("--stored", choices=("float32", "bfloat16", "float16"), default="float32")
    for name, default in (("threads", 1), ("slots", 8), ("context", 128), ("steps", 60)):
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {**WAITING, **os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        if arguments.random:
            write_random(arguments.random, Path(scratch), arguments.stored)
        model = arguments.model or Path(scratch)
        result = measure(model, arguments.slots, arguments.context, arguments.steps)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    step = result["milliseconds"]["step"]
    for name, value in result["milliseconds"].items():
        print(f"{name:12} {value:8.2f} ms {value / step:7.0%}")
    floors = ", ".join(f"{name} {ms} ms" for name, ms in result["floor_milliseconds"].items())
    print(f"{'floor':12} {floors}; {result['fraction_of_floor']:.0%} of it reached")


if __name__ == "__main__":
    main()
