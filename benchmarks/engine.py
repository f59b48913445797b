"""The engine beside transformers: output tokens a second on one model, threads and slots.

Usage: ``python -m benchmarks.engine --random small [--threads N] [--slots N] [--json]``

Every engine gets the same prompts and must give each as many tokens as it is told: few most of the
time, many now and then. ``hf-static`` runs batches of ``slots`` in the order of arrival and
``hf-sorted`` the same, ordered by lengths that nobody would know beforehand; a batch lasts as long
as its longest answer, and only tokens that were asked for count. ``hf-continuous`` is transformers'
own continuous batching. Each run is a process of its own, after one short run to warm up; engines
take turns, and medians are given.
"""
# ruff: noqa: PLC0415 - the process that starts the others needs no model library.

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

RANDOM = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22},
}
"""About 34 and 300 million parameters."""
VOCAB = 8192
LONGEST_PROMPT, LONGEST_ANSWER = 48, 256


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and how many tokens it is to get."""

    prompt: list[int]
    tokens: int


def make_jobs(count: int, seed: int = 0) -> list[Job]:
    """Prompts of even lengths and answers of heavy-tailed ones."""
    rng = Random(seed)
    return [
        Job(
            prompt=[rng.randrange(3, 256) for _ in range(rng.randint(8, LONGEST_PROMPT))],
            tokens=min(LONGEST_ANSWER, 1 + int(rng.lognormvariate(3.2, 1.0))),
        )
        for _ in range(count)
    ]


Run = Callable[[Sequence[Job]], None]
"""Generates for all jobs. An engine makes one of a model's directory and a number of slots."""


def shard(directory: Path, slots: int) -> Run:
    """This project's engine, one stage."""
    from uellm_worker.verification.pipeline import Pipeline, generate

    from uellm.models.profile import read_profile
    from uellm.v1.common_pb2 import Sampling

    layers = len(read_profile(directory, "float32").layers)
    room = LONGEST_PROMPT + LONGEST_ANSWER
    pipeline = Pipeline(directory, (layers,), slots=slots, max_tokens=room)

    def run(jobs: Sequence[Job]) -> None:
        answers = generate(
            pipeline.loop(),
            [job.prompt for job in jobs],
            lambda index: Sampling(max_tokens=jobs[index].tokens, ignore_eos=True),
        )
        check([len(answer) for answer in answers], jobs)

    return run


def check(lengths: Sequence[int], jobs: Sequence[Job]) -> None:
    """Fail unless every job got what it was to get."""
    if list(lengths) != [job.tokens for job in jobs]:
        raise SystemExit("an engine gave other numbers of tokens than it was told to")


def _whole(directory: Path) -> Any:
    """The model under transformers, greedy and never ending by itself."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def hf_static(directory: Path, slots: int, *, ordered: bool = False) -> Run:
    """Batches of ``generate``, padded to the left."""
    import torch

    model = _whole(directory)

    def run(jobs: Sequence[Job]) -> None:
        queue = sorted(jobs, key=lambda job: job.tokens) if ordered else list(jobs)
        for start in range(0, len(queue), slots):
            batch = queue[start : start + slots]
            longest = max(len(job.prompt) for job in batch)
            pads = [longest - len(job.prompt) for job in batch]
            rows = zip(pads, batch, strict=True)
            output = model.generate(
                torch.tensor([[0] * pad + job.prompt for pad, job in rows]),
                attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads]),
                max_new_tokens=max(job.tokens for job in batch),
            )
            check([output.shape[1] - longest], [max(batch, key=lambda job: job.tokens)])

    return run


def hf_sorted(directory: Path, slots: int) -> Run:
    """``hf_static``, given the lengths beforehand."""
    return hf_static(directory, slots, ordered=True)


def hf_continuous(directory: Path, slots: int) -> Run:
    """Transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig

    model = _whole(directory)
    pages = slots * (1 + (LONGEST_PROMPT + LONGEST_ANSWER) // 32)
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=pages, max_requests_per_batch=slots, max_batch_tokens=512
    )

    def run(jobs: Sequence[Job]) -> None:
        settings = {"continuous_batching_config": config, "warmup": False}
        with model.continuous_batching_context_manager(**settings) as manager:
            names = [
                manager.add_request(job.prompt, max_new_tokens=job.tokens, eos_token_id=-1)
                for job in jobs
            ]
            lengths: dict[str, int] = {}
            while len(lengths) < len(jobs):
                result = manager.get_result(timeout=60)
                if result is None or result.error:
                    raise SystemExit(f"hf-continuous failed: {result and result.error}")
                if result.is_finished():
                    lengths[result.request_id] = len(result.generated_tokens)
        check([lengths[name] for name in names], jobs)

    return run


ENGINES: dict[str, Callable[[Path, int], Run]] = {
    "shard": shard,
    "hf-static": hf_static,
    "hf-sorted": hf_sorted,
    "hf-continuous": hf_continuous,
}


def measure(engine: str, directory: Path, slots: int, threads: int, requests: int) -> float:
    """Output tokens a second of one engine, in this process."""
    import torch

    torch.set_num_threads(threads)
    jobs = make_jobs(requests)
    with torch.inference_mode():
        run = ENGINES[engine](directory, slots)
        run([Job(job.prompt, 4) for job in jobs[:slots]])
        started = time.perf_counter()
        run(jobs)
    return sum(job.tokens for job in jobs) / (time.perf_counter() - started)


def write_random(kind: str, directory: Path) -> None:
    """Write a Llama with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=4, **RANDOM[kind]
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run every engine in turn, so many times."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engine", "--model", str(directory)]
    for name in ("threads", "slots", "requests"):
        command.append(f"--{name}={getattr(arguments, name)}")
    rates: dict[str, list[float]] = {engine: [] for engine in arguments.engines}
    for _ in range(arguments.repeats):
        for engine, found in rates.items():
            run = [*command, f"--one={engine}"]
            done = subprocess.run(run, check=True, env=environment, stdout=subprocess.PIPE)
            found.append(float(done.stdout.split()[-1]))
    medians = {engine: statistics.median(found) for engine, found in rates.items()}
    base = medians.get("hf-static")
    return {
        "model": arguments.random or str(directory),
        **{name: getattr(arguments, name) for name in ("threads", "slots", "requests", "repeats")},
        "engines": {
            engine: {
                "tokens_per_second": round(rate, 1),
                "over_hf_static": round(rate / base, 2) if base else None,
                "runs": [round(found, 1) for found in rates[engine]],
            }
            for engine, rate in medians.items()
        },
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path)
    source.add_argument("--random", choices=RANDOM)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=[*ENGINES])
    for name, default in (("threads", 1), ("slots", 8), ("requests", 32), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if unknown := {*arguments.engines} - {*ENGINES}:
        parser.error(f"no such engines: {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    if arguments.one:
        sizes = (arguments.slots, arguments.threads, arguments.requests)
        print(measure(arguments.one, arguments.model, *sizes))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.random:
            write_random(arguments.random, Path(scratch))
        result = compare(arguments, arguments.model or Path(scratch))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for engine, found in result["engines"].items():
        print(f"{engine:14}", found["tokens_per_second"], "tok/s,", found["over_hf_static"], "x")


if __name__ == "__main__":
    main()
