"""Every benchmark runs to its end at its smallest size, and prints figures as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.hosts import why_not
from uellm.mesh.options import DEMO_MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(700)]
ROOT = Path(__file__).parents[2]
UELLM = "from uellm.cli import main; main()"
PATIENCE_SECONDS = 600.0
"""Of a hang. On a machine with nothing else to do most take seconds, the longest two minutes."""

SMALLEST: Mapping[str, str] = {
    "accelerator": "--shape tiny --device cpu --dtype float32 --repeats 1",
    "deployments": "--plans 1 --repeats 1 --no-changes",
    "engine": "--random small --requests 2 --slots 2 --repeats 1",
    "engine_loop": "--policies fcfs",
    "fetch": "--megabytes 16 --layers 2",
    "goodput": "--platforms r3090 --workloads tier --cvs 3 --requests 200",
    "live_promises": "--loads 0.5 --requests 40",
    "mesh": "--requests 32 --tokens 4 --concurrency 8 --repeats 1 --latency-seconds 1",
    "overload": "--seconds 5 --peak-seconds 5 --factor 2 --clients 1",
    "paper": "--count 20 --timed 20 --seeds 1",
    "pipeline": "--random small --rows 2 --tokens 32 --repeats 1",
    "placement": "--only 3090x4",
    "policies": "--decisions 5 --waiting 500",
    "probes": "--random small",
    "profiler": "--data DATA --changes 1 --models 1",
    "profiler_burst": "--pretrained PRETRAINED --sizes 1,8 --rounds 1",
    "profiler_live": "--requests 40 --settled 20",
    "promises": "--platforms r3090 --requests 200 --loads 0.8 --cvs 3",
    "queue_scripts": "--requests 64",
    "recording": "--requests 100 --pairs 1 --waiting 32",
    "scheduler": "--requests 200 --waiting 32 --repeats 1",
    "scheduling": "--pairs 1 --loads 0.5 --requests 30",
    "sharing": "--cluster mixed12 --seeds 1",
    "step": "--random small --slots 2 --context 32 --steps 4",
    "traces": "--trace TRACE --requests 100 --load 0.5",
    "turns": "--waiting 500 --turns 5",
    "variants": "--batches 1 --steps 2 --repeats 1",
    "young_promises": "--platforms r3090 --workloads tier --first 20 --crowd 50 --seeds 1",
}


def run(*command: str) -> str:
    """What a process prints, once it has ended well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def figures(printed: str) -> Any:
    """Printed JSON, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(printed, parse_constant=refuse)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What some benchmarks are to be given, small."""
    directory, rng = tmp_path_factory.mktemp("given"), Random(0)  # noqa: S311
    data, trace, examples = (directory / name for name in ("data", "trace.csv", "examples.jsonl"))
    data.mkdir()
    rows = [(f"Count to {n} by {rng.randint(2, 9)}s.", rng.randint(5, 200)) for n in range(400)]
    (data / "alpaca.jsonl").write_text(
        "\n".join(
            json.dumps({"instruction": prompt, "prompt_tokens": 8, "out_tokens": length})
            for prompt, length in rows
        )
    )
    prompts = [f"Explain {n} in {rng.randint(2, 90)} words." for n in range(1200)]
    (data / "flask_prompts.jsonl").write_text(
        "\n".join(
            json.dumps({"id": number, "instruction": prompt, "prompt_tokens": 8})
            for number, prompt in enumerate(prompts)
        )
    )
    table = [f"{number},{rng.randint(5, 99)},{rng.randint(50, 400)},90" for number in range(1200)]
    (data / "flask_lengths.csv").write_text("\n".join(["id,short,long,even", *table]))
    examples.write_text(
        "\n".join(json.dumps({"prompt": prompt, "output_tokens": n}) for prompt, n in rows[:96])
    )
    lines = [f"{0.1 * n:.1f},{rng.randint(10, 500)},{rng.randint(5, 200)}" for n in range(200)]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]))
    return {"DATA": data, "TRACE": trace, "EXAMPLES": examples, "PRETRAINED": directory / "llm"}


@pytest.mark.parametrize("name", SMALLEST)
def test_it_ends_with_figures(name: str, given: Mapping[str, Path]) -> None:
    if name == "deployments" and why_not():
        pytest.skip(why_not())
    if name == "pipeline" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed")
    if name == "profiler_burst":
        files = ["--data", given["EXAMPLES"], "--out", given["PRETRAINED"]]
        tuning = ["--backend", "llm", "--base-model", DEMO_MODEL, "--set", "epochs=1"]
        run("-c", UELLM, "profiler", "train", *map(str, [*tuning, *files]))
    arguments = [str(given.get(word, word)) for word in SMALLEST[name].split()]
    assert figures(run("-m", f"benchmarks.{name}", *arguments, "--json"))


def test_a_hop_between_stages_is_measured() -> None:
    assert figures(run("-m", "benchmarks.pipeline", "--hop", "--json"))


def test_what_is_not_installed_is_said(tmp_path: Path) -> None:
    command = ["benchmarks.engine", "--random", "small", "--engines", "vllm", "--peers"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert f"vllm is not installed in {tmp_path / 'vllm'}; run make bench-peers" in done.stderr


def test_none_is_forgotten() -> None:
    modules = (ROOT / "benchmarks").glob("*.py")
    measuring = {path.stem for path in modules if "parser_of(" in path.read_text()}
    assert {*SMALLEST} == measuring - {"arguments"}
