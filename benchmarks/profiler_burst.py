"""Who predicts when many ask at once: real processes, the demo model, a tuned language model.

    python -m benchmarks.profiler_burst --pretrained DIR [--sizes 1,8,32,64,200] [--json]

DIR is what ``uellm profiler train --backend llm`` made. One mesh on this host's CPU serves the demo
model; bursts of ``Estimate`` calls with prompts that nobody sent before go through the gateway. Of
each is counted who predicted its length: ``llm``, which read the prompt; ``text``, from its words,
as there was no time to read it; the gateway's own prior, because the profiler said nothing within
its limit (``UELLM_GATEWAY_PROFILE_BUDGET_SECONDS``, 100 ms). Milliseconds are those from the first
call to an answer.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.arguments import count, directory, parser_of, several
from benchmarks.load import wait_ready
from uellm.client import Client, new_request
from uellm.demo.tasks import generate_task
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource

MODEL = "demo"
BY = ("llm", "text", "gateway")
_WARM_UP = 4
_REST_SECONDS = 1.5
"""Between bursts: a profiler that a gateway leaves alone is asked again."""


async def measure(pretrained: Path, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Start a mesh, send bursts, stop it."""
    os.environ |= {
        "UELLM_PROFILER_PREDICTOR": "llm",
        "UELLM_PROFILER_PRETRAINED": str(pretrained),
    }
    models = (ModelSource(MODEL, str(DEMO_MODEL)),)
    rng = Random(0)
    async with Mesh(MeshOptions(models)).running() as mesh, Client(mesh.address) as client:
        await wait_ready(mesh.address, MODEL)
        for size in _WARM_UP * [1, 8, 32]:
            await burst(client, rng, size)
        found = []
        for size in sizes:
            told = []
            for _ in range(rounds):
                told.append(await burst(client, rng, size))
                await asyncio.sleep(_REST_SECONDS)
            found.append(summarise(size, told))
    return found


async def burst(client: Client, rng: Random, size: int) -> list[tuple[str, float]]:
    """Who predicted each of so many at once, and after how long its answer was there."""
    began = time.perf_counter()

    async def ask() -> tuple[str, float]:
        # A number makes it a prompt that nobody has read before.
        prompt = f"{generate_task(rng, 'heldout').prompt} ({rng.randrange(10**9)})"
        answer = await client.estimate(new_request(MODEL, [("user", prompt)]))
        profile = answer.profile
        by = "gateway" if profile.fallback else profile.predictor
        return by, 1e3 * (time.perf_counter() - began)

    return await asyncio.gather(*(ask() for _ in range(size)))


def summarise(size: int, told: list[list[tuple[str, float]]]) -> dict[str, Any]:
    """Shares by who predicted, and times, over bursts of one size."""
    counts = Counter(by for each in told for by, _ in each)
    times = [milliseconds for each in told for _, milliseconds in each]
    total = size * len(told)
    return {
        "size": size,
        **{by: round(counts[by] / total, 3) for by in BY},
        "ms_p50": round(float(np.quantile(times, 0.5)), 1),
        "ms_p99": round(float(np.quantile(times, 0.99)), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of("profiler_burst", __doc__)
    parser.add_argument("--pretrained", type=directory, required=True, help="a tuned llm")
    parser.add_argument(
        "--sizes", type=several(count), default="1,8,32,64,200", help="of bursts, by commas"
    )
    parser.add_argument("--rounds", type=count, default=5, help="bursts of each size")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = asyncio.run(measure(options.pretrained.resolve(), options.sizes, options.rounds))
    if options.json:
        sys.stdout.write(json.dumps({"cores": os.cpu_count(), "bursts": found}, indent=2) + "\n")
        return
    print("".join(f"{name:>10}" for name in found[0]))
    for row in found:
        print("".join(f"{value:>10}" for value in row.values()))


if __name__ == "__main__":
    main()
