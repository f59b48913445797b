"""Attainment and goodput over the load, as curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from uellm.simulator.experiments import Goodput, Result, Setup, by_case


def draw(
    path: Path, setup: Setup, results: Sequence[Result], found: Sequence[Goodput] = ()
) -> None:
    """Draw what came of runs, the mean over seeds.

    Args:
        path: of a .png, .svg or .pdf file.
        setup: of the experiment.
        results: of its runs.
        found: the largest loads at some attainments, to be marked with what no policy exceeds.
    """
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (policy, load), runs in by_case(results).items():
        share = fmean(run.metrics.attainment for run in runs)
        goodput = fmean(run.metrics.met_per_second for run in runs)
        lines.setdefault(policy, []).append((load, share, goodput))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy, points in lines.items():
        loads, shares, goodputs = zip(*sorted(points), strict=True)
        (line,) = left.plot(loads, shares, marker=".", label=policy)
        right.plot(loads, goodputs, marker=".", label=policy)
        best = [(each.load, each.attainment) for each in found if each.policy == policy]
        if best:
            left.plot(*zip(*best, strict=True), "*", color=line.get_color(), markersize=10)
    if bounds := dict.fromkeys((each.bound, each.attainment) for each in found):
        left.plot(*zip(*bounds, strict=True), "x", color="grey", label="no policy exceeds")
    left.set(xlabel="load", ylabel="share in time", ylim=(0, 1.02))
    right.set(xlabel="load", ylabel="requests in time, per second", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"{Path(setup.workload).name} on {setup.platform.name}, {setup.predictor}")
    figure.savefig(path)
