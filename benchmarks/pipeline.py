"""Two processes with a stage each beside one with the whole model, every process on one core.

Usage: ``python -m benchmarks.pipeline --random small [--rows N] [--cores 2,3] [--json]``, or
``--hop`` for what a hop between two stages takes, wherever their processes run.

The processes are children as a worker has them, with one thread each. ``pipeline`` has twice the
sequences of ``whole`` in flight, so that a step computes as many rows; ``twice`` is the whole model
with as many sequences. ``both`` is the whole model on both cores at once, each with the sequences
of ``whole``: memory that the cores share gives less than twice. All sequences arrive together and
get as many tokens. Loads take turns; medians are given. Layers are split by what halves of the
model take, unless it is said how.

A hop is an announcement with an activation of float16 ``[rows, 4096]`` to the next stage, and a
result back.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uellm_worker.children import ChildSpawner

from benchmarks.arguments import count, directory, parser_of
from benchmarks.engine import RANDOM, write_random
from benchmarks.hop import measure_hops
from benchmarks.replicas import Load, measured_split, replica

PROMPT = 16
WARM_UP = 32
"""Tokens."""


async def compare(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads on the replicas in turn."""
    rows, tokens, cores = arguments.rows, arguments.tokens, arguments.cores
    # This process plays the agent, and leaves the stages their cores.
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {*cores} or {*cores})
    spawner = ChildSpawner("shard", log_level="WARNING")
    loads: dict[str, list[Load]] = {name: [] for name in ("whole", "twice", "both", "pipeline")}
    try:
        split = arguments.split or await measured_split(spawner, model, cores=cores, rows=rows)
        whole = (sum(split),)
        room = {"slots": 2 * rows, "max_tokens": PROMPT + max(tokens, WARM_UP)}
        async with (
            replica(spawner, model, whole, cores=cores[:1], **room) as one,
            replica(spawner, model, whole, cores=cores[1:], **room) as other,
            replica(spawner, model, split, cores=cores, **room) as pipeline,
        ):
            for repeat in range(arguments.repeats + 1):
                length = tokens if repeat else WARM_UP
                done = {
                    "whole": await one.load(rows, PROMPT, length),
                    "twice": await one.load(2 * rows, PROMPT, length),
                    "both": _together(
                        *await asyncio.gather(
                            *(each.load(rows, PROMPT, length) for each in (one, other))
                        )
                    ),
                    "pipeline": await pipeline.load(2 * rows, PROMPT, length),
                }
                for name, load in done.items():
                    loads[name] += [load] if repeat else []
    finally:
        await spawner.close()
    return {"split": split, **summarise(loads)}


def _together(one: Load, other: Load) -> Load:
    """Two loads at once, as one whose steps end alternately."""
    return Load(
        one.tokens_per_second + other.tokens_per_second,
        (one.step_seconds + other.step_seconds) / 4,
        (*one.stage_seconds, *other.stage_seconds),
        one.tokens_per_cpu_second + other.tokens_per_cpu_second,
    )


def summarise(loads: dict[str, list[Load]]) -> dict[str, Any]:
    """Medians, and the pipeline's ratios to the others."""
    found = {}
    for name, runs in loads.items():
        rates = [run.tokens_per_second for run in runs]
        stages = [statistics.median(s) for s in zip(*(r.stage_seconds for r in runs), strict=True)]
        step = statistics.median(run.step_seconds for run in runs)
        found[name] = {
            "tokens_per_second": round(statistics.median(rates), 1),
            "best": round(max(rates), 1),
            "runs": [round(rate, 1) for rate in rates],
            "step_ms": round(1e3 * step, 3),
            "stage_ms": [round(1e3 * seconds, 3) for seconds in stages],
        }

    def ratio(name: str, of: Callable[[list[Load]], float]) -> float:
        return round(of(loads["pipeline"]) / of(loads[name]), 2)

    def median(runs: list[Load]) -> float:
        return statistics.median(run.tokens_per_second for run in runs)

    def best(runs: list[Load]) -> float:
        return max(run.tokens_per_second for run in runs)

    def busiest(runs: list[Load]) -> float:
        return statistics.median(run.tokens_per_cpu_second for run in runs)

    def interval(runs: list[Load]) -> float:
        return statistics.median(1 / run.step_seconds for run in runs)

    return {
        "replicas": found,
        "ratio": ratio("whole", median),
        "ratio_of_bests": ratio("whole", best),
        "ratio_while_decoding": ratio("whole", interval),
        "ratio_by_cpu_time": ratio("whole", busiest),
        "ratio_at_equal_sequences": ratio("twice", median),
        "ratio_to_what_both_cores_give": ratio("both", interval),
    }


def main() -> None:
    """Run and print."""
    parser = parser_of("pipeline", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=directory, help="of a checkpoint")
    source.add_argument("--random", choices=RANDOM)
    source.add_argument("--hop", action="store_true")
    for name, default in (("rows", 16), ("tokens", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--split", type=_numbers, help="layers of each stage")
    parser.add_argument("--cores", type=_numbers, help="of both stages; the last two, else")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    mine = sorted(os.sched_getaffinity(0))
    arguments.cores = arguments.cores or tuple(mine[-2:])
    if not arguments.hop and not (len({*arguments.cores}) == 2 and {*arguments.cores} <= {*mine}):
        parser.error(f"--cores: two of {', '.join(map(str, mine))} are needed")
    if arguments.hop:
        result = measure_hops()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            if arguments.random:
                write_random(arguments.random, Path(scratch))
            model = arguments.model or Path(scratch)
            compared = asyncio.run(compare(model, arguments))
        settings = {name: getattr(arguments, name) for name in ("rows", "tokens", "repeats")}
        result = {"model": arguments.random or str(model), **settings, **compared}
    print(json.dumps(result, indent=2) if arguments.json else _text(result))


def _numbers(text: str) -> tuple[int, int]:
    try:
        first, second = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: two whole numbers are needed") from None
    return first, second


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{name:14} {found['tokens_per_second']:8.1f} tok/s  step {found['step_ms']} ms, "
        f"of stages {found['stage_ms']}"
        for name, found in result.get("replicas", {}).items()
    ]
    lines += [f"{name}: {value}" for name, value in result.items() if name != "replicas"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
