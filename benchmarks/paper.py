"""The paper's experiment, as its scripts run it and with all methods on equal terms.

    python -m benchmarks.paper [--part replay] [--count 100] [--seeds 5] [--data DIR] [--json]

Three parts, by a step model of ChatGLM2-6B on one GPU (``benchmarks.paper_replay``):

replay: the paper's: all requests at once, lengths told, each method with the GPUs, the cap and the
    objectives of its own script; beside it the same on one GPU each, and with nobody's answers cut.
closed: corrected: all at once, lengths predicted, objectives in no order, one device, one cap and,
    for the batchers, both engines: padded batches as in the paper, and one in which whoever ends
    leaves.
timed: the same on each method's own engine, arrivals a Poisson process; load 1 is what first come,
    first served keeps up with in a continuous engine.

Lengths are log-normal, or of ``--data``'s Alpaca instructions: there the scripts' schedulers are
told those of the reference answers, and Vicuna-7B's are what the model answers. docs/paper.md goes
through the paper's claims.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks.arguments import count, directory, known_to, parser_of
from benchmarks.paper_replay import METHODS, Task, objectives, replay, their_platform
from uellm.policy.views import DispatchSettings
from uellm.simulator.experiments import pair_of
from uellm.simulator.mesh import Execution, Mesh, MeshSettings
from uellm.simulator.metrics import Metrics, measure
from uellm.simulator.platforms import Platform, find_platform
from uellm.simulator.predictors import PREDICTORS, profiler
from uellm.simulator.requests import Request
from uellm.simulator.workloads import MOST_TOKENS, Lengths

PROMPTS, ANSWERS = Lengths(100, 1.0, 4), Lengths(200, 0.95)
"""As in the simulator's workloads."""
BATCHERS = ("fifo", "morphling", "s3", "slo-odbs-coded", "slo-odbs", "slo-dbs", "odbs")
CONTINUOUS = ("fcfs:knee_factor=2", "cslo-odbs")
LOADS = (0.2, 0.5, 0.9)
DEADLINE_FACTORS = (10, 30, 100)
"""Timed: deadlines are multiples of what the mean request takes alone."""
_UNBOUND = DispatchSettings(lookahead_requests=2, kv_headroom=100.0)

Case = tuple[str, Execution]
_OWN = [(name, Execution.STATIC) for name in BATCHERS]
_BEST = [(name, Execution.CONTINUOUS) for name in CONTINUOUS]
_BETTER_ENGINE = [(name, Execution.CONTINUOUS) for name in BATCHERS]

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        count: requests of a closed batch.
        timed: requests of a timed run.
        seeds: runs of each case, with other requests; means are shown.
        platform: of the corrected parts.
        predictor: of the corrected parts.
        data: directory with ``prompts/alpaca52k_dev.jsonl.gz``, or None.
    """

    count: int
    timed: int
    seeds: int
    platform: Platform
    predictor: str
    data: Path | None


def tasks_of(settings: Settings, count: int, seed: int) -> list[Task]:
    """Requests of a seed, with the paper's objectives by position."""
    rng = np.random.default_rng([seed, 7])
    slos = objectives(count, rng)
    if settings.data is not None:
        lengths = alpaca_lengths(settings.data)
        chosen = rng.choice(len(lengths), count, replace=count > len(lengths))
        return [
            Task(prompt, reference, own, slo)
            for slo, (prompt, reference, own) in zip(
                slos, (lengths[i] for i in chosen), strict=True
            )
        ]
    normal = rng.standard_normal((count, 2))
    tasks = []
    for (first, second), slo in zip(normal, slos, strict=True):
        answer = ANSWERS.of(second)
        tasks.append(Task(PROMPTS.of(first), answer, answer, slo))
    return tasks


@cache
def alpaca_lengths(data: Path) -> list[tuple[int, int, int]]:
    """Prompt, reference and Vicuna-7B's answer in tokens, of instructions without input."""
    found = []
    with gzip.open(data / "prompts" / "alpaca52k_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            own = row.get("vicuna7b_tokens_t0.0")
            if own and not row["input"]:
                found.append((max(row["prompt_tokens"], 1), max(row["out_tokens"], 1), own))
    return found


def replayed(settings: Settings) -> Iterator[Row]:
    """The paper's own experiment; on equal terms only the batches differ."""
    batchers = {method.batcher: method for method in reversed(METHODS)}
    for alike, methods in ((False, METHODS), (True, tuple(reversed(batchers.values())))):
        for method in methods:
            runs = [
                asdict(replay(method, tasks_of(settings, settings.count, seed), alike=alike))
                for seed in range(settings.seeds)
            ]
            seconds, violations = (
                method.published if method.published and not alike else (None, None)
            )
            yield {
                "terms": "alike" if alike else "theirs",
                "method": f"{method.batcher} batches" if alike else method.name,
                **{key: _mean([run[key] for run in runs]) for key in runs[0]},
                "paper_seconds": seconds,
                "paper_violations": violations,
            }


def closed(settings: Settings) -> Iterator[Row]:
    """All at once, on equal terms."""
    cases = [*_OWN, *_BETTER_ENGINE, *_BEST]
    yield from _compared(settings, cases, partial(_closed_requests, settings))


def timed(settings: Settings) -> Iterator[Row]:
    """Poisson arrivals, on equal terms."""
    rate = _reference_rate(settings)
    for load in LOADS:
        requests = partial(_timed_requests, settings, load * rate)
        for row in _compared(settings, [*_OWN, *_BEST], requests):
            yield {"load": load, **row}


PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "replay": replayed,
    "closed": closed,
    "timed": timed,
}


def _compared(
    settings: Settings, cases: Sequence[Case], requests: Callable[[int], list[Request]]
) -> Iterator[Row]:
    """Every method on the same requests."""
    drawn = [requests(seed) for seed in range(settings.seeds)]
    for name, execution in cases:
        runs = [
            _figures(settings.platform, _serve(settings, name, execution, each, seed))
            for seed, each in enumerate(drawn)
        ]
        means = {key: _mean([run[key] for run in runs]) for key in runs[0]}
        yield {"method": name, "engine": str(execution), **means}


def _serve(
    settings: Settings, name: str, execution: Execution, requests: Sequence[Request], seed: int
) -> Metrics:
    pair = pair_of(name)
    known = profiler(settings.predictor, requests, np.random.default_rng([seed, 1]))
    # An only engine that keeps first come, first served is not to be kept short of requests.
    dispatch = pair.make_dispatch(_UNBOUND if pair.dispatch == "fcfs" else DispatchSettings())
    mesh = Mesh(settings.platform, dispatch, pair.make_step, MeshSettings(execution=execution))
    return measure(mesh.run(requests, known))


def _figures(platform: Platform, metrics: Metrics) -> dict[str, float]:
    """The paper's metrics (``benchmarks.paper_replay.Replayed``), and what a gain may cost."""
    (each,) = metrics.kinds.values()
    overhead = metrics.steps * platform.cost.overhead
    return {
        "seconds": metrics.seconds,
        "per_second": metrics.requests_per_second,
        "latency": metrics.latency_mean or 0.0,
        "violations": 1 - metrics.attainment,
        "utilisation": metrics.busy - overhead / metrics.seconds,
        "redundant_kv": metrics.padding,
        "recomputed": metrics.wasted,
        "p99": each.latency_p99 or 0.0,
        "first_token_p99": each.ttft_p99 or 0.0,
        "longest_wait": metrics.max_wait,
        "met_tokens_per_second": metrics.met_tokens_per_second,
    }


def _closed_requests(settings: Settings, seed: int) -> list[Request]:
    tasks = tasks_of(settings, settings.count, seed)
    deadlines = [task.slo_seconds for task in tasks]
    np.random.default_rng([seed, 8]).shuffle(deadlines)
    return [
        _request(i, task, 0.0, deadline)
        for i, (task, deadline) in enumerate(zip(tasks, deadlines, strict=True))
    ]


def _timed_requests(settings: Settings, rate: float, seed: int) -> list[Request]:
    tasks = tasks_of(settings, settings.timed, seed)
    rng = np.random.default_rng([seed, 9])
    arrivals = np.cumsum(rng.exponential(size=len(tasks))) / rate
    factors = rng.choice(DEADLINE_FACTORS, len(tasks))
    prompt = round(_mean([task.prompt_tokens for task in tasks]))
    answer = round(_mean([task.own_tokens for task in tasks]))
    platform = settings.platform
    alone = platform.cost.isolated(prompt, answer, platform.chunk_tokens)
    return [
        _request(i, task, float(arrivals[i]), float(factors[i]) * alone)
        for i, task in enumerate(tasks)
    ]


def _reference_rate(settings: Settings) -> float:
    """Requests a second that first come, first served keeps up with: those of a closed batch."""
    requests = [_request(i, t, 0.0, None) for i, t in enumerate(tasks_of(settings, 300, 0))]
    fcfs = CONTINUOUS[0]
    return _serve(settings, fcfs, Execution.CONTINUOUS, requests, 0).requests_per_second


def _request(number: int, task: Task, arrival: float, deadline: float | None) -> Request:
    return Request(
        request_id=f"r{number:06d}",
        arrival=arrival,
        prompt_tokens=task.prompt_tokens,
        output_tokens=task.own_tokens,
        kind="all",
        max_tokens=MOST_TOKENS,
        deadline=deadline,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_SHAPES = {"seconds": ".1f", "latency": ".1f", "load": ".1f", "paper_seconds": ".1f"}


def _show(rows: Sequence[Row]) -> None:
    cells = [list(rows[0])]
    for row in rows:
        cells.append(
            [
                "-" if v is None else v if isinstance(v, str) else format(v, _SHAPES.get(k, ".2f"))
                for k, v in row.items()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def main() -> None:
    """Run the parts that are asked for, and print their tables."""
    parser = parser_of("paper", __doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; all")
    parser.add_argument("--count", type=count, default=100, help="requests of a closed batch")
    parser.add_argument("--timed", type=count, default=400, help="requests of a timed run")
    parser.add_argument("--seeds", type=count, default=5, help="runs of each case; means are shown")
    parser.add_argument(
        "--platform",
        type=known_to(find_platform),
        help="of the corrected parts: a name or a file; the paper's",
    )
    parser.add_argument("--predictor", choices=PREDICTORS, default="b80", help="of lengths")
    parser.add_argument(
        "--data", type=directory, help="directory with prompts/alpaca52k_dev.jsonl.gz"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    platform = find_platform(options.platform) if options.platform else their_platform()
    settings = Settings(
        options.count, options.timed, options.seeds, platform, options.predictor, options.data
    )
    found = {part: list(PARTS[part](settings)) for part in options.part or PARTS}
    if options.json:
        print(json.dumps({"platform": asdict(platform), "parts": found}, indent=2))
        return
    for part, rows in found.items():
        print(f"\n{part}")
        _show(rows)


if __name__ == "__main__":
    main()
