"""The engine beside others: output tokens a second on one model, threads and slots.

Usage: ``python -m benchmarks.engine --random small [--threads N] [--slots N] [--json]``

Every engine gets the same prompts and must give each as many tokens as it is told: few most of the
time, many now and then. ``shard`` is this project's engine, ``shard-static`` the same in padded
batches, which last as long as their longest answer. ``hf-static`` is transformers' ``generate`` on
such batches in the order of arrival and ``hf-sorted`` the same, ordered by lengths that nobody
would know beforehand; only tokens that were asked for count. ``hf-continuous`` is transformers' own
continuous batching; ``vllm`` and ``openvino`` are measured where ``make bench-peers`` has installed
them, on CPUs. All compute in one dtype, float32 by default. Each run is a process of its own, on as
many cores as it has threads, after one short run to warm up; engines take turns, and medians are
given. With ``--results FILE`` every run is kept in a file as it ends, and a later call with the
same settings goes on from there: what takes hours can be measured in pieces.
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
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, directory, one_of, parser_of, several
from benchmarks.jobs import LONGEST_ANSWER, LONGEST_PROMPT, Job, Run, Setup, check, make_jobs
from benchmarks.peers import OWN_INTERPRETER, PEERS

RANDOM = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22},
}
"""About 34 and 280 million parameters."""
VOCAB = 8192


def shard(setup: Setup, execution: str = "continuous") -> Run:
    """This project's engine, one stage."""
    from uellm_worker.verification.pipeline import Pipeline, generate

    from uellm.models.profile import read_profile
    from uellm.v1.common_pb2 import Sampling

    layers = len(read_profile(setup.model, setup.dtype).layers)
    pipeline = Pipeline(
        setup.model,
        (layers,),
        slots=setup.slots,
        max_tokens=LONGEST_PROMPT + LONGEST_ANSWER,
        dtype=setup.dtype,
        device=setup.device,
    )

    def run(jobs: Sequence[Job]) -> None:
        answers = generate(
            pipeline.loop(execution=execution),
            [job.prompt for job in jobs],
            lambda index: Sampling(max_tokens=jobs[index].tokens, ignore_eos=True),
        )
        check([len(answer) for answer in answers], jobs)

    return run


def shard_static(setup: Setup) -> Run:
    """This project's engine in the paper's mode."""
    return shard(setup, execution="static")


ENGINES: dict[str, Callable[[Setup], Run]] = {
    "shard": shard,
    "shard-static": shard_static,
    **PEERS,
}
DEFAULT = [engine for engine in ENGINES if engine not in OWN_INTERPRETER]


def stay_on(cores: int) -> None:
    """Keep this process on so many cores: some engines start more threads than they are told to."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def measure(engine: str, setup: Setup, requests: int) -> float:
    """Output tokens a second of one engine, in this process."""
    import torch

    torch.set_num_threads(setup.threads)
    jobs = make_jobs(requests)
    with torch.inference_mode():
        run = ENGINES[engine](setup)
        run([Job(job.prompt, 4) for job in jobs[: setup.slots]])
        started = time.perf_counter()
        run(jobs)
    return sum(job.tokens for job in jobs) / (time.perf_counter() - started)


def write_random(kind: str, directory: Path, stored: str = "float32") -> None:
    """Write a Llama with random weights, stored in a dtype."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=4, **RANDOM[kind]
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, stored))
    model.save_pretrained(directory)


def _interpreter(engine: str, peers: Path) -> str:
    """The Python that runs an engine.

    Raises:
        SystemExit: if it has not been installed.
    """
    if engine not in OWN_INTERPRETER:
        return sys.executable
    found = peers / engine / "bin" / "python"
    if not found.exists():
        raise SystemExit(f"{engine} is not installed in {peers / engine}; run make bench-peers")
    return str(found)


class Results:
    """Runs that were made, in a file of JSON lines.

    Args:
        path: the file; None: they are not kept.
        settings: what they have in common; others in the file are left alone.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self._settings = settings

    def of(self, engine: str) -> list[float]:
        """Tokens a second of an engine's runs, oldest first."""
        if self._path is None or not self._path.exists():
            return []
        runs = map(json.loads, self._path.read_text().splitlines())
        return [
            run["tokens_per_second"]
            for run in runs
            if run["engine"] == engine and run["settings"] == self._settings
        ]

    def add(self, engine: str, rate: float) -> None:
        """Keep a run."""
        if self._path is None:
            return
        run = {"engine": engine, "tokens_per_second": rate, "settings": self._settings}
        with self._path.open("a") as file:
            file.write(json.dumps(run) + "\n")


def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run every engine in turn, so many times; those count that were made before."""
    # Not for those that run in an interpreter of their own, in which uellm is not installed.
    from uellm_worker.cores import WAITING

    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    command = ["-W", "ignore", "-m", "benchmarks.engine", "--model", str(directory)]
    for name in ("threads", "slots", "requests", "device", "dtype"):
        command.append(f"--{name}={getattr(arguments, name)}")
    interpreters = {engine: _interpreter(engine, arguments.peers) for engine in arguments.engines}
    settings = {
        "model": arguments.random or str(directory),
        "stored": arguments.stored if arguments.random else None,
        **{
            name: getattr(arguments, name)
            for name in ("threads", "slots", "requests", "device", "dtype")
        },
    }
    results = Results(arguments.results, settings)
    rates = {engine: results.of(engine) for engine in arguments.engines}
    for repeat in range(arguments.repeats):
        for engine, found in rates.items():
            if len(found) > repeat:
                continue
            run = [interpreters[engine], *command, f"--one={engine}"]
            # As the worker has it; others as their users have them.
            waiting = WAITING if engine.startswith("shard") else {}
            done = subprocess.run(
                run, check=True, env={**waiting, **environment}, stdout=subprocess.PIPE
            )
            found.append(float(done.stdout.split()[-1]))
            results.add(engine, found[-1])
    medians = {engine: statistics.median(found) for engine, found in rates.items()}
    ours = medians.get("shard")
    return {
        **settings,
        "repeats": arguments.repeats,
        "engines": {
            engine: {
                "tokens_per_second": round(rate, 1),
                "shard_over_this": round(ours / rate, 2) if ours else None,
                "runs": [round(found, 1) for found in rates[engine]],
            }
            for engine, rate in medians.items()
        },
    }


def main() -> None:
    """Run and print."""
    parser = parser_of("engine", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=directory, help="of a checkpoint")
    source.add_argument("--random", choices=RANDOM)
    parser.add_argument("--stored", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--engines", type=several(one_of(ENGINES)), default=DEFAULT)
    for name, default in (("threads", 1), ("slots", 16), ("requests", 48), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--device", default="cpu", help="as torch names it, for instance cuda:0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--results", type=Path, help="keeps runs, and goes on from them")
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        stay_on(arguments.threads)
        setup = Setup(
            arguments.model,
            arguments.slots,
            arguments.threads,
            arguments.device,
            arguments.dtype,
        )
        print(measure(arguments.one, setup, arguments.requests))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.random:
            write_random(arguments.random, Path(scratch), arguments.stored)
        result = compare(arguments, arguments.model or Path(scratch))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for engine, found in result["engines"].items():
        line = f"{engine:14} {found['tokens_per_second']:8.1f} tok/s"
        print(line, f"  shard is {found['shard_over_this']}x" if found["shard_over_this"] else "")


if __name__ == "__main__":
    main()
