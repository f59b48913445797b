"""A step of the engine on one device beside what the device could do: decode and prefill.

Usage: ``python -m benchmarks.accelerator [--shape 8b] [--device cuda:0] [--dtype bfloat16]``

The model has the shape of Llama 3 8B and random weights. A decode step of 1, 8 and 32 sequences is
measured against its floor, the bytes of weights and KV cache over the bandwidth that a large copy
reaches; a prompt against the rate that a large matrix product reaches. ``benchmarks.engine`` with
the same device and dtype compares with other engines. Medians.
"""
# ruff: noqa: PLC0415 - arguments are checked before torch is loaded.

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, parser_of

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
BATCHES = (1, 8, 32)
CONTEXT, PROMPT = 512, 2048


def write_model(shape: str, device: str, dtype: str, directory: Path) -> None:
    """Write a Llama of that shape, made on the device: on CPUs billions of numbers take minutes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2 * PROMPT)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="4GB")


class Clock:
    """Times work on a device.

    Args:
        device: as torch names it.
        repeats: of which the median is taken.
    """

    def __init__(self, device: str, repeats: int) -> None:
        import torch

        self._device = torch.device(device)
        self._repeats = repeats

    def _wait(self) -> None:
        import torch

        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """The median of what some work takes, done before to warm up."""
        for _ in range(3):
            work()
        taken = []
        for _ in range(self._repeats):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)


def limits(clock: Clock, device: str, dtype: str, size: int) -> tuple[float, float]:
    """Bytes a second of a copy, and FLOP/s of a matrix product of ``size`` squared."""
    import torch

    kind = getattr(torch, dtype)
    source = torch.zeros(16 * size * size, dtype=kind, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))
    square = torch.ones(size, size, dtype=kind, device=device)
    product = torch.empty_like(square)
    rate = 2 * size**3 / clock.seconds(lambda: torch.mm(square, square, out=product))
    return bandwidth, rate


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Time the steps of a stage that holds the whole model."""
    import torch
    from uellm_worker.engine.part import token_bytes
    from uellm_worker.engine.plan import Admission, Chunk, StepPlan
    from uellm_worker.verification.pipeline import Pipeline

    from uellm.models.profile import read_profile
    from uellm.v1.common_pb2 import Sampling

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Clock(arguments.device, arguments.repeats)
    size = 8192 if arguments.shape == "8b" else 512
    bandwidth, rate = limits(clock, arguments.device, arguments.dtype, size)
    profile = read_profile(directory, arguments.dtype)
    pipeline = Pipeline(
        directory,
        (len(profile.layers),),
        slots=max(BATCHES),
        max_tokens=PROMPT,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    stage = pipeline.stages[0]
    shard = stage.first
    read = sum(layer.weight_bytes for layer in profile.layers) + profile.head_bytes
    flops = sum(layer.flops_per_token for layer in profile.layers)

    def step(chunks: tuple[Chunk, ...]) -> float:
        rows = sum(chunk.count for chunk in chunks)
        admissions = tuple(Admission(chunk.slot, 1, Sampling()) for chunk in chunks)
        plan = StepPlan(0, chunks, admissions, token_ids=(7,) * rows)
        return clock.seconds(lambda: stage.sample(plan, stage.compute(plan, None)))

    decodes = []
    for batch in BATCHES:
        seconds = step(tuple(Chunk(slot, CONTEXT, 1, True) for slot in range(batch)))
        floor = (read + batch * CONTEXT * token_bytes(shard)) / bandwidth
        decodes.append(
            {
                "batch": batch,
                "milliseconds": round(1e3 * seconds, 3),
                "floor_milliseconds": round(1e3 * floor, 3),
                "over_floor": round(seconds / floor, 2),
            }
        )
    tokens = PROMPT // 2
    seconds = step((Chunk(0, 0, tokens, True),))
    return {
        **{name: getattr(arguments, name) for name in ("shape", "device", "dtype", "repeats")},
        "gigabytes_per_second": round(bandwidth / 1e9, 1),
        "teraflops": round(rate / 1e12, 2),
        "decode": decodes,
        "prefill": {
            "tokens": tokens,
            "milliseconds": round(1e3 * seconds, 3),
            "of_peak": round(tokens * flops / seconds / rate, 3),
        },
    }


def main() -> None:
    """Run and print."""
    parser = parser_of("accelerator", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=count, help="as torch has them, else")
    parser.add_argument("--repeats", type=count, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    import torch

    try:
        torch.empty(0, device=arguments.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device: {arguments.device}: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        write_model(arguments.shape, arguments.device, arguments.dtype, Path(scratch))
        result = measure(arguments, Path(scratch))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['gigabytes_per_second']} GB/s, {result['teraflops']} TFLOP/s")
    for decode in result["decode"]:
        line = f"decode {decode['batch']:3}: {decode['milliseconds']} ms"
        print(line, f"floor {decode['floor_milliseconds']} ms, {decode['over_floor']}x")
    prefill = result["prefill"]
    print(
        f"prefill {prefill['tokens']}: {prefill['milliseconds']} ms, {prefill['of_peak']} of peak"
    )


if __name__ == "__main__":
    main()
