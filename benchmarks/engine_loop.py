"""What the engine loop takes beside computing: deciding, planning, reporting, learning its cost.

Usage: ``python -m benchmarks.engine_loop [--policies fcfs,cslo-odbs] [--json]``

The steps are those of the instant engine, which computes nothing. Each figure is the median of
several loops.
"""

import json
import sys
import time
from statistics import median

from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.instant import InstantRunner
from uellm_worker.engine.loop import EngineLoop

from benchmarks.arguments import known_to, parser_of, several
from uellm.policy.latency import LatencyModel
from uellm.policy.registry import step_policy
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import AddSequence

VOCABULARY = 500
MAX_TOKENS = 2048
WARM_STEPS, STEPS, LOOPS = 20, 150, 7
SIZES = ((1, 0), (8, 0), (8, 16), (64, 0), (64, 100))


def microseconds_per_step(policy: str, running: int, waiting: int) -> float:
    """Of a loop in which so many sequences decode and so many wait for a slot."""
    loop = EngineLoop(
        InstantRunner(VOCABULARY),
        step_policy(policy),
        Capacity(running, MAX_TOKENS, running * MAX_TOKENS),
        Vocabulary(VOCABULARY),
    )
    for number in range(running + waiting):
        loop.add(
            AddSequence(
                request_id=str(number),
                generation=1,
                token_ids=range(1, 9),
                prompt_tokens=8,
                sampling=Sampling(max_tokens=WARM_STEPS + STEPS + 100, seed=number),
            )
        )
    for _ in range(WARM_STEPS):
        loop.step()
    began = time.perf_counter()
    for _ in range(STEPS):
        loop.step()
    return (time.perf_counter() - began) / STEPS * 1e6


def microseconds_per_observation(count: int = 4096) -> float:
    """Of learning a step's cost, fits included."""
    steps = [
        (1 + i % 200 + 64 * (i % 7), 300.0 * (1 + i % 200), 2080.0 * (i % 3)) for i in range(99)
    ]
    model = LatencyModel()
    began = time.perf_counter()
    for i in range(count):
        tokens, context, pairs = steps[i % 99]
        model.observe(tokens, context, pairs, 0.01 + 1e-4 * tokens + 1e-7 * context)
    return (time.perf_counter() - began) / count * 1e6


def main() -> None:
    """Measure and print."""
    parser = parser_of("engine_loop", __doc__)
    parser.add_argument(
        "--policies", type=several(known_to(step_policy)), default="fcfs,edf,past-future,cslo-odbs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = [
        {
            "policy": policy,
            "running": running,
            "waiting": waiting,
            "microseconds_per_step": median(
                microseconds_per_step(policy, running, waiting) for _ in range(LOOPS)
            ),
        }
        for running, waiting in SIZES
        for policy in options.policies
    ]
    learning = median(microseconds_per_observation() for _ in range(LOOPS))
    if options.json:
        results = {"loop": rows, "microseconds_per_observation": learning}
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    for row in rows:
        sys.stdout.write(
            "{policy:12} {running:3} running {waiting:3} waiting "
            "{microseconds_per_step:7.0f} µs a step\n".format(**row)
        )
    sys.stdout.write(f"learning a step's cost: {learning:.1f} µs, fits included\n")


if __name__ == "__main__":
    main()
