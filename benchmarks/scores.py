"""How well predictions order what was measured. Pure."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import mean, median
from typing import Any


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for place in order[at:end]:
            found[place] = (at + 1 + end) / 2
        at = end
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rho: the correlation of ranks; 0 where one of both is constant."""
    first, second = ranks(one), ranks(other)
    a, b = [x - mean(first) for x in first], [x - mean(second) for x in second]
    norm = (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-a: pairs in the same order less pairs in the other, as a share of all."""
    pairs = list(combinations(range(len(one)), 2))
    signs = [(one[i] - one[j]) * (other[i] - other[j]) for i, j in pairs]
    return sum((s > 0) - (s < 0) for s in signs) / len(pairs) if pairs else 0.0


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """How much more the plan that was predicted to take least takes than the best one; a share."""
    chosen = min(range(len(predicted)), key=lambda i: predicted[i])
    return measured[chosen] / min(measured) - 1


def median_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Median of ``|predicted / measured - 1|``."""
    return _apart(zip(predicted, measured, strict=True))


def scores(plans: list[dict[str, Any]], again: dict[str, Any]) -> dict[str, Any]:
    """How well predictions order plans, and how far off they are.

    Args:
        plans: as they were predicted, each way, and measured.
        again: the first of them, later.
    """
    seconds = [plan["measured_seconds"] for plan in plans]
    slowness = [1 / plan["measured_tokens_per_second"] for plan in plans]
    found: dict[str, Any] = {"machine": _drift(plans, again)}
    for how in plans[0]["predicted_seconds"]:
        told = [plan["predicted_seconds"][how] for plan in plans]
        rates = [plan["predicted_tokens_per_second"][how] for plan in plans]
        found[how] = {
            "latency": _score(told, seconds),
            "throughput": _score([1 / rate for rate in rates], slowness),
        }
        for kind in ("alone", "full"):
            stages = [stage for plan in plans for stage in plan["stages"][kind]]
            errors = [abs(s["planned_ms"][how] / s["measured_ms"] - 1) for s in stages]
            if errors:
                found[how][f"stages {kind}"] = {
                    "median_error": round(median(errors), 3),
                    "within_15_percent": round(sum(e <= 0.15 for e in errors) / len(errors), 2),
                    "stages": len(errors),
                }
    return found


def _drift(plans: list[dict[str, Any]], again: dict[str, Any]) -> dict[str, Any]:
    """What is not the prediction's: what differs though it is the same, in the median.

    ``reference`` is a product that is always the same; ``repeats`` of a stage are seconds apart;
    ``probes`` are those before the first plan against those right before each; ``same_stages`` are
    the first plan's, measured again behind the last one, by kind of load.
    """
    stages = [stage for plan in plans for stage in plan["stages"]["alone"]]
    first = next((plan for plan in plans if plan["name"] == again["name"]), again)
    return {
        "reference": round(median(abs(plan["machine"] - 1) for plan in plans), 3),
        "repeats": round(median(stage["spread"] for stage in stages), 3),
        "probes": round(
            _apart((s["planned_ms"]["cold"], s["planned_ms"]["anew"]) for s in stages), 3
        ),
        "same_stages": {
            kind: round(
                _apart(
                    (one["measured_ms"], other["measured_ms"])
                    for one, other in zip(found, again["stages"][kind], strict=False)
                ),
                3,
            )
            for kind, found in first["stages"].items()
        },
    }


def _apart(pairs: Iterable[tuple[float, float]]) -> float:
    """Median of ``|one / other - 1|``; 0 of none."""
    return median([abs(one / other - 1) for one, other in pairs] or [0.0])


def _score(predicted: list[float], measured: list[float]) -> dict[str, float]:
    return {
        "spearman": round(spearman(predicted, measured), 3),
        "kendall": round(kendall(predicted, measured), 3),
        "regret": round(regret(predicted, measured), 3),
        "median_error": round(median_error(predicted, measured), 3),
    }
