"""What runs of ``benchmarks.scheduling`` amount to, and how it is shown."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from uellm.simulator.metrics import KindMetrics

SHARE = 0.95
"""Of the requests that have to be in time, for goodput."""
GOAL = 1.2
TIMELY_LOAD = 0.7
"""Up to this load the simulator is held to its goals: a mean latency within 15 %, 5 points."""
BOOTSTRAPS = 10_000
WAY = ("accept", "dispatch", "delivery")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run.

    Attributes:
        policies: names, the one that others are compared with last.
        loads: ascending, of the saturated rate.
        pairs: how often.
        requests: in each run.
        cv: coefficient of variation of the gaps between arrivals.
        slots: of the replica.
        kv_tokens: of the replica.
        stop_below: a policy's larger loads are left out once fewer are in time.
    """

    policies: tuple[str, ...]
    loads: tuple[float, ...]
    pairs: int
    requests: int
    cv: float
    slots: int
    kv_tokens: int
    stop_below: float = 0.8


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run; see ``uellm.simulator.metrics`` for its numbers.

    ``wasted`` is by the engine's own account: of the computed tokens, the share that had been
    computed before.
    """

    policy: str
    load: float
    pair: int
    attainment: float
    kinds: Mapping[str, KindMetrics]
    latency_mean: float
    max_wait: float
    wasted: float
    met_tokens_per_second: float
    promised_p90_kept: float | None
    simulated_attainment: float
    simulated_latency_mean: float


def goodput(curve: Sequence[tuple[float, float]]) -> float:
    """The largest load with ``SHARE`` in time, linear between loads; 0 if none is.

    Args:
        curve: loads ascending, and the shares in time.
    """
    best = max((load for load, share in curve if share >= SHARE), default=0.0)
    for (low, above), (high, below) in pairwise(curve):
        if above >= SHARE > below:
            best = max(best, low + (high - low) * (above - SHARE) / (above - below))
    return best


def goodputs(runs: Sequence[Run], settings: Settings) -> dict[str, Any]:
    """Goodput of each policy in each pair, and ratios to the last policy with their intervals."""
    found: dict[str, list[float]] = {}
    for policy in settings.policies:
        for pair in range(settings.pairs):
            curve = [(r.load, r.attainment) for r in runs if (r.policy, r.pair) == (policy, pair)]
            found.setdefault(policy, []).append(goodput(sorted(curve)))
    base = np.array(found[settings.policies[-1]])
    ratios: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(base), (BOOTSTRAPS, len(base)))
    for policy in settings.policies[:-1]:
        each = np.array(found[policy])
        if base.min() <= 0:
            ratios[policy] = {"ratio": None, "why": "no load had enough in time under the last"}
            continue
        resampled = each[picks].mean(axis=1) / base[picks].mean(axis=1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        ratio = float(each.mean() / base.mean())
        ratios[policy] = {
            "ratio": ratio,
            "interval": [float(low), float(high)],
            "goal": GOAL,
            "met": bool(ratio >= GOAL and low > 1),
        }
    return {"attainment": SHARE, "loads": found, "ratios": ratios}


def simulator_errors(runs: Sequence[Run]) -> dict[str, Any]:
    """How far the simulator was off, up to the load it is held to."""
    near = [run for run in runs if run.load <= TIMELY_LOAD + 1e-9]
    if not near:
        return {}
    latency = [run.simulated_latency_mean / run.latency_mean - 1 for run in near]
    points = [run.simulated_attainment - run.attainment for run in near]
    worst, worst_points = max(latency, key=abs), max(points, key=abs)
    return {
        "runs": len(near),
        "latency_error_median": statistics.median(latency),
        "latency_error_worst": worst,
        "attainment_error_worst": worst_points,
        "met": abs(statistics.median(latency)) <= 0.15 and abs(worst_points) <= 0.05,
    }


def progress(run: Run) -> None:
    """Say on standard error what a run came to."""
    print(
        f"pair {run.pair + 1}  load {run.load:.2f}  {run.policy:<12} "
        f"{run.attainment:6.1%} in time, mean {run.latency_mean:.2f} s "
        f"(simulated {run.simulated_attainment:6.1%}, {run.simulated_latency_mean:.2f} s)",
        flush=True,
        file=sys.stderr,
    )


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(
        f"a step alone takes {result['step_seconds'] * 1e3:.2f} ms; load 1 is "
        f"{result['saturated_requests_per_second']:.1f} requests/s; KV room "
        f"{result['platform']['kv_tokens']} tokens; error of the fitted step cost "
        f"{result['fit_error']:.0%}; on the way "
        + " + ".join(f"{result['way'][f'{part}_seconds'] * 1e3:.0f}" for part in WAY)
        + " ms"
    )
    names = result["settings"]["policies"]
    print(f"{'load':>5}  " + "".join(f"{name:>46}" for name in names))
    print(
        f"{'':>5}  "
        + f"{'in time':>8}{'met tok/s':>10}{'wait max':>10}{'wasted':>8}{'p90 kept':>10}"
        * len(names)
    )
    for load in result["settings"]["loads"]:
        cells = []
        for name in names:
            runs = [r for r in result["runs"] if (r["policy"], r["load"]) == (name, load)]
            cells.append(_cell(runs))
        print(f"{load:>5.2f}  " + "".join(cells))
    _show_classes(result)
    for name, values in result["goodput"]["loads"].items():
        print(f"goodput at {SHARE:.0%}: {name} " + " ".join(f"{value:.2f}" for value in values))
    for name, ratio in result["goodput"]["ratios"].items():
        if ratio["ratio"] is None:
            print(f"{name}: {ratio['why']}")
            continue
        low, high = ratio["interval"]
        print(
            f"{name} / {names[-1]}: {ratio['ratio']:.2f} [{low:.2f}, {high:.2f}], goal {GOAL}: "
            f"{'met' if ratio['met'] else 'missed'}"
        )
    if error := result["simulator"]:
        print(
            f"simulator, load up to {TIMELY_LOAD}: mean latency off by "
            f"{error['latency_error_median']:+.0%} (worst {error['latency_error_worst']:+.0%}), "
            f"in time by {error['attainment_error_worst'] * 100:+.1f} points at worst: "
            f"{'met' if error['met'] else 'missed'}"
        )


def _show_classes(result: dict[str, Any]) -> None:
    """Seconds until 99 % had their last token and their first one, the mean over runs."""
    kinds = dict.fromkeys(kind for run in result["runs"] for kind in run["kinds"])
    print("p99 of latency, first token: " + ", ".join(kinds))
    for load in result["settings"]["loads"]:
        for name in result["settings"]["policies"]:
            runs = [r for r in result["runs"] if (r["policy"], r["load"]) == (name, load)]
            cells = [
                _tails([r["kinds"][kind] for r in runs if kind in r["kinds"]]) for kind in kinds
            ]
            print(f"{load:>5.2f}  {name:<12}" + "".join(f"{cell:>18}" for cell in cells))


def _tails(kinds: Sequence[Mapping[str, Any]]) -> str:
    words = []
    for figure in ("latency_p99", "ttft_p99"):
        known = [kind[figure] for kind in kinds if kind[figure] is not None]
        words.append(f"{statistics.mean(known):.2f} s" if known else "-")
    return ", ".join(words)


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return f"{'-':>8}{'-':>10}{'-':>10}{'-':>8}{'-':>10}"
    in_time = statistics.mean(run["attainment"] for run in runs)
    tokens = statistics.mean(run["met_tokens_per_second"] for run in runs)
    wait = max(run["max_wait"] for run in runs)
    wasted = statistics.mean(run["wasted"] for run in runs)
    kept = [run["promised_p90_kept"] for run in runs if run["promised_p90_kept"] is not None]
    share = f"{statistics.mean(kept):.0%}" if kept else "-"
    return f"{in_time:>8.1%}{tokens:>10.0f}{wait:>9.1f}s{wasted:>8.1%}{share:>10}"
