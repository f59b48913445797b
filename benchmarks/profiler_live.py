"""How fast a mesh learns how long its answers are: real processes, the demo model, nothing known.

    python -m benchmarks.profiler_live [--requests 1500] [--plot learnt.png] [--json]

One mesh on this host's CPU serves the demo model; its profiler has learnt nothing. Tasks of all
kinds, none of them part of the model's training data, are sent as it can serve them, so many at a
time. Of each the median length that the mesh predicted at admission is compared with the answer's.
Beside it, what is known of the answers that had ended by then: the mean of the task's kind, which
the mesh is not told, and the running quantiles of the predictor ``prior``.

Goal: after 500 requests the mean absolute error is at most half that of the kind's mean.
"""

import asyncio
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.arguments import count, parser_of
from benchmarks.load import wait_ready
from uellm import convert
from uellm.cli.promises import ANSWERED
from uellm.client import Client, new_request
from uellm.core.request import ResourceProfile
from uellm.demo.tasks import KINDS, Kind, Task, generate_task
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource
from uellm.prediction.interface import GREEDY, CompletionFacts, PredictionRequest
from uellm.prediction.prior import Prior
from uellm.v1 import inference_pb2

MODEL = "demo"
SETTLED, GOAL = 500, 0.5
WINDOW = 100
NAMES = ("mesh", "mean of the kind", "prior")
"""What is compared."""

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Rivals:
    """What can be said without a mesh, from the answers that have ended."""

    prior: Prior = field(default_factory=Prior)
    ended: dict[Kind, list[int]] = field(default_factory=lambda: defaultdict(list))

    def said(self, kind: Kind, prompt_tokens: int) -> tuple[float, float]:
        """The mean of a kind, or of all as long as there is none of it, and the prior's median."""
        lengths = self.ended[kind] or [length for each in self.ended.values() for length in each]
        median = self.prior.predict(_asked(prompt_tokens)).at(0.5)
        return float(np.mean(lengths)) if lengths else median, median

    def learn(self, kind: Kind, prompt_tokens: int, length: int) -> None:
        """Take an answer."""
        self.ended[kind].append(length)
        self.prior.observe(CompletionFacts(MODEL, GREEDY, prompt_tokens, length))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request.

    Attributes:
        kind: of the task.
        length: of the answer, in tokens.
        said: what was predicted at admission, in the order of ``NAMES``.
        fallback: no profiler answered in time.
    """

    kind: Kind
    length: int
    said: tuple[float, float, float]
    fallback: bool


def _asked(prompt_tokens: int) -> PredictionRequest:
    return PredictionRequest(MODEL, GREEDY, prompt_tokens, 0)


async def answer(client: Client, task: Task, rivals: Rivals) -> Outcome:
    """Send one task and wait for its end.

    Raises:
        RuntimeError: if it is not answered.
    """
    profile: ResourceProfile | None = None
    others = (0.0, 0.0)
    finished = inference_pb2.Finished()
    async for event in client.generate(new_request(MODEL, [("user", task.prompt)])):
        match event.WhichOneof("event"):
            case "accepted":
                profile = convert.profile_from_proto(event.accepted.profile)
                others = rivals.said(task.kind, profile.prompt_tokens)
            case "finished":
                finished = event.finished
    if profile is None or finished.reason not in ANSWERED:
        raise RuntimeError(f"{task.prompt!r} was not answered: {finished.failure.message}")
    length = finished.usage.output_tokens
    rivals.learn(task.kind, profile.prompt_tokens, length)
    said = (profile.output_tokens.at(0.5), *others)
    return Outcome(task.kind, length, said, profile.fallback)


async def drive(client: Client, tasks: Sequence[Task], concurrency: int) -> list[Outcome]:
    """Send tasks in their order, so many at a time."""
    rivals = Rivals()
    outcomes: dict[int, Outcome] = {}
    remaining: Iterator[tuple[int, Task]] = iter(enumerate(tasks))

    async def sender() -> None:
        for number, task in remaining:
            outcomes[number] = await answer(client, task, rivals)
            if len(outcomes) % WINDOW == 0:
                sys.stderr.write(f"{len(outcomes)} of {len(tasks)} answered\n")

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(sender())
    return [outcomes[number] for number in range(len(tasks))]


def errors_of(outcomes: Sequence[Outcome]) -> Floats:
    """Absolute errors in tokens, shape [requests, names]."""
    said = np.array([each.said for each in outcomes])
    errors: Floats = np.abs(said - np.array([[each.length] for each in outcomes]))
    return errors


def summarise(outcomes: Sequence[Outcome], settled_after: int) -> dict[str, Any]:
    """Mean absolute errors, in windows and after so many requests."""
    errors = errors_of(outcomes)
    kinds = np.array([each.kind for each in outcomes])
    settled = errors[settled_after:]
    means = settled.mean(axis=0)
    return {
        "requests": len(outcomes),
        "settled_after": settled_after,
        "fallbacks": sum(each.fallback for each in outcomes),
        "windows": [
            {
                "from": start,
                **_named(errors[start : start + WINDOW].mean(axis=0)),
                "fallbacks": sum(each.fallback for each in outcomes[start : start + WINDOW]),
            }
            for start in range(0, len(errors), WINDOW)
        ],
        "settled": _named(means),
        "settled_by_kind": {
            kind: _named(settled[kinds[settled_after:] == kind].mean(axis=0))
            for kind in KINDS
            if (kinds[settled_after:] == kind).any()
        },
        "ratio": round(float(means[0] / means[1]), 3),
        "goal": GOAL,
        "met": bool(means[0] <= GOAL * means[1]),
    }


def _named(means: Floats) -> dict[str, float]:
    return {name: round(float(mean), 2) for name, mean in zip(NAMES, means, strict=True)}


async def measure(requests: int, concurrency: int, seed: int) -> list[Outcome]:
    """Start a mesh, ask, stop it."""
    rng = Random(seed)
    tasks = [generate_task(rng, "heldout") for _ in range(requests)]
    os.environ["UELLM_WORKER_THREADS"] = "1"
    models = (ModelSource(MODEL, str(DEMO_MODEL)),)
    async with Mesh(MeshOptions(models)).running() as mesh, Client(mesh.address) as client:
        await wait_ready(mesh.address, MODEL)
        return await drive(client, tasks, concurrency)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(f"{'requests':>12}" + "".join(f"{name:>18}" for name in NAMES))
    for window in result["windows"]:
        print(f"{window['from']:>9} on" + "".join(f"{window[name]:>18}" for name in NAMES))
    print(
        f"{'after ' + str(result['settled_after']):>12}"
        + "".join(f"{result['settled'][n]:>18}" for n in NAMES)
    )
    for kind, means in result["settled_by_kind"].items():
        print(f"{kind:>12}" + "".join(f"{means[name]:>18}" for name in NAMES))
    verdict = "met" if result["met"] else "missed"
    print(f"error over that of the kind's mean: {result['ratio']} (goal {GOAL}): {verdict}")


def draw(path: Path, outcomes: Sequence[Outcome], settled_after: int) -> None:
    """Mean absolute error of the latest requests against requests seen."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, uellm[simulate]

    errors = errors_of(outcomes)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, column in zip(NAMES, errors.T, strict=True):
        running = np.convolve(column, np.full(WINDOW, 1 / WINDOW), "valid")
        axes.plot(np.arange(WINDOW, len(column) + 1), running, label=name)
    axes.axvline(settled_after, color="grey", linewidth=1)
    axes.set(xlabel="requests seen", ylabel=f"mean absolute error of the latest {WINDOW} (tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure and print."""
    parser = parser_of("profiler_live", __doc__)
    parser.add_argument("--requests", type=count, default=1500)
    parser.add_argument("--concurrency", type=count, default=4, help="requests under way")
    parser.add_argument(
        "--settled", type=count, default=SETTLED, help="requests before those that are judged"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw error against requests")
    options = parser.parse_args()
    if options.requests <= options.settled:
        parser.error(f"--requests: more than --settled, {options.settled}, which are not judged")
    outcomes = asyncio.run(measure(options.requests, options.concurrency, options.seed))
    if options.plot is not None:
        draw(options.plot, outcomes, options.settled)
    result = summarise(outcomes, options.settled)
    if options.json:
        machine = {"cores": os.cpu_count(), "processor": platform.machine()}
        facts = {"when": time.strftime("%Y-%m-%d"), "machine": machine, **result}
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show(result)


if __name__ == "__main__":
    main()
