"""Decode steps of one model whose weights are held in several ways, and with adapters in the batch.

Usage: ``python -m benchmarks.variants --random small [--threads N] [--batches 1,8,16] [--json]``

A random Llama in float32; the same stored in float16; quantised to 8 and 4 bits, as checkpoints are
published; in float32 with LoRA adapters of rank 8 on all of its linear layers, of which every
sequence of a batch has the next; and with experts (``moe``), where each token passes two of eight,
each an eighth as wide: fewer numbers a token. Variants take turns; medians of steps are given,
and how many times those of float32 a step takes.
"""
# ruff: noqa: PLC0415 - model libraries are loaded once the number of threads is set.

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uellm_worker.cores import WAITING

from benchmarks.arguments import count, one_of, parser_of, several
from benchmarks.engine import RANDOM, VOCAB, write_random

QUANTIZED = {"int8": (8, 0), "int8-128": (8, 128), "int4-128": (4, 128)}
"""Bits, and inputs that share a scale; 0: all."""
VARIANTS = ("float32", "float16", *QUANTIZED, "adapters", "moe")
RANK = 8
PROMPT, WARM = 32, 8


def write_variant(kind: str, variant: str, directory: Path) -> None:
    """Write the model of a variant."""
    if variant == "moe":
        _write_experts(kind, directory)
    else:
        write_random(kind, directory, "float16" if variant == "float16" else "float32")
    if variant in QUANTIZED:
        _quantize(directory, *QUANTIZED[variant])


def _write_experts(kind: str, directory: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    fields = dict(RANDOM[kind])
    fields["intermediate_size"] //= 8
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        **fields,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def _quantize(directory: Path, bits: int, group_size: int) -> None:
    """Round the layers' weights to codes, and store these as compressed-tensors does."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    most = (1 << (bits - 1)) - 1
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        grouped = weight.unflatten(1, (-1, group_size or weight.shape[1]))
        scales = (grouped.abs().amax(-1) / most).half()
        codes = (grouped / scales.float()[..., None]).round().clamp(-most - 1, most)
        numbers = codes.flatten(1).to(torch.int64) + (most + 1)
        words = numbers.unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
        packed = words.sum(-1)
        base = name.removesuffix("weight")
        tensors[base + "weight_packed"] = packed.to(torch.int64).to(torch.int32)
        tensors[base + "weight_scale"] = scales
        tensors[base + "weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
    }
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (directory / "config.json").write_text(json.dumps(config))


def write_adapters(directory: Path, model: Path, count: int) -> dict[str, Path]:
    """Write random adapters of a model, by name."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {
        name: weight.shape
        for name, weight in load_file(model / "model.safetensors").items()
        if name.endswith("_proj.weight")
    }
    found = {}
    for number in range(count):
        path = directory / f"adapter-{number}"
        path.mkdir()
        tensors = {}
        for name, (out, inputs) in weights.items():
            base = f"base_model.model.{name.removesuffix('weight')}"
            tensors[f"{base}lora_A.weight"] = 0.01 * torch.randn(RANK, inputs)
            tensors[f"{base}lora_B.weight"] = 0.01 * torch.randn(out, RANK)
        save_file(tensors, path / "adapter_model.safetensors")
        modules = sorted({name.split(".")[-2] for name in weights})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
        (path / "adapter_config.json").write_text(json.dumps(config))
        found[path.name] = path
    return found


class Measured:
    """A loaded variant.

    Args:
        model: its directory.
        slots: most sequences at once.
        steps: that will be timed at a time.
        adapters: by name.
    """

    def __init__(self, model: Path, slots: int, steps: int, adapters: Mapping[str, Path]) -> None:
        from uellm_worker.verification.pipeline import Pipeline

        from uellm.models.profile import read_profile

        layers = len(read_profile(model, "float32").layers)
        self._tokens = steps + WARM + 2
        self._names = list(adapters)
        self._pipeline = Pipeline(
            model, (layers,), slots=slots, max_tokens=PROMPT + self._tokens, adapters=adapters
        )
        (part,) = self._pipeline.stages[0].parts
        self.held_bytes = part.shard.total_bytes
        fused = part.shard.fused
        self.compiled = fused is not None and fused.compiled is not None

    def step_seconds(self, batch: int, steps: int) -> list[float]:
        """What decode steps of so many sequences take."""
        from uellm.v1.common_pb2 import Sampling
        from uellm.v1.engine_pb2 import AddSequence

        loop = self._pipeline.loop()
        for index in range(batch):
            name = self._names[index % len(self._names)] if self._names else ""
            loop.add(
                AddSequence(
                    request_id=str(index),
                    token_ids=[(index * 31 + place) % 200 + 3 for place in range(PROMPT)],
                    prompt_tokens=PROMPT,
                    sampling=Sampling(max_tokens=self._tokens, ignore_eos=True),
                    adapter=name,
                )
            )
        begun: set[str] = set()
        while len(begun) < batch:
            report = loop.step()
            begun |= {output.request_id for output in report.outputs} if report else set()
        taken = []
        for _ in range(steps + WARM // 2):
            started = time.perf_counter()
            loop.step()
            taken.append(time.perf_counter() - started)
        return taken[WARM // 2 :]


def measure(
    kind: str, variants: Sequence[str], batches: Sequence[int], steps: int, repeats: int
) -> dict[str, Any]:
    """All variants, in turn."""
    loaded: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in variants:
            directory = Path(scratch) / variant
            directory.mkdir()
            write_variant(kind, variant, directory)
            adapters = write_adapters(directory, directory, 4) if variant == "adapters" else {}
            loaded[variant] = Measured(directory, max(batches), steps, adapters)
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for batch in batches:
            for variant, measured in loaded.items():
                taken.setdefault((variant, batch), []).extend(measured.step_seconds(batch, steps))
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    return {
        variant: {
            "held_megabytes": round(measured.held_bytes / 1e6, 1),
            "compiled": measured.compiled,
            "batches": {
                batch: {
                    "step_ms": round(1e3 * medians[variant, batch], 3),
                    "times_first": round(medians[variant, batch] / medians[variants[0], batch], 2),
                }
                for batch in batches
            },
        }
        for variant, measured in loaded.items()
    }


def main() -> None:
    """Run and print."""
    parser = parser_of("variants", __doc__)
    parser.add_argument("--random", choices=RANDOM, default="small")
    parser.add_argument("--variants", type=several(one_of(VARIANTS)), default=list(VARIANTS))
    parser.add_argument("--batches", type=several(count), default=[1, 8, 16])
    for name, default in (("threads", 1), ("steps", 40), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {**WAITING, **os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    import torch

    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        found = measure(
            arguments.random,
            arguments.variants,
            arguments.batches,
            arguments.steps,
            arguments.repeats,
        )
    if arguments.json:
        result = {"model": arguments.random, "threads": arguments.threads, "variants": found}
        print(json.dumps(result, indent=2))
        return
    for variant, row in found.items():
        steps = "  ".join(
            f"{batch}: {each['step_ms']:8.2f} ms {each['times_first']:5.2f} x"
            for batch, each in row["batches"].items()
        )
        print(f"{variant:10} {row['held_megabytes']:8.1f} MB  {steps}")


if __name__ == "__main__":
    main()
