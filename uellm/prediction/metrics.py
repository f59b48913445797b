"""How good predicted lengths are, as ranks, points, buckets and distributions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import numpy.typing as npt

from uellm.core.request import LEVELS, QuantileFunction
from uellm.prediction.survival import Floats

BUCKETS = 10
_LONG = 0.99
_FEW = 64


@dataclass(frozen=True, slots=True)
class Scores:
    """Judgement of predictions whose outcomes are known.

    Attributes:
        count: outcomes.
        spearman: rank correlation of medians and lengths; NaN where either is constant.
        kendall: tau-b of the same.
        mae: mean absolute error of the medians, in tokens.
        r2: of the predicted means.
        width_accuracy: share of medians in the right one of ten buckets of equal width, up to the
            99 % quantile of the lengths; longer ones are in the last.
        width_majority: the same if the fullest bucket is always said.
        population_accuracy: the same for ten buckets of equal population.
        population_majority: likewise.
        pinball: mean pinball loss over ``LEVELS``, in tokens.
        coverage: share of lengths from the 10 % to the 90 % quantile; 0.8 is promised.
        coverage_p90: share of lengths up to the 90 % quantile.
        width: mean of the 90 % less the 10 % quantile, in tokens.
    """

    count: int
    spearman: float
    kendall: float
    mae: float
    r2: float
    width_accuracy: float
    width_majority: float
    population_accuracy: float
    population_majority: float
    pinball: float
    coverage: float
    coverage_p90: float
    width: float


def scores(predictions: Sequence[QuantileFunction], lengths: Sequence[float]) -> Scores:
    """Judge predictions by what came of them.

    Raises:
        ValueError: if there are none, or not as many of both.
    """
    if len(predictions) != len(lengths) or not lengths:
        raise ValueError(f"{len(predictions)} predictions and {len(lengths)} lengths: equal, not 0")
    true = np.asarray(lengths, dtype=np.float64)
    quantiles = np.array([[each.at(level) for level in LEVELS] for each in predictions])
    low, median, high = (quantiles[:, LEVELS.index(level)] for level in (0.1, 0.5, 0.9))
    means = np.array([each.mean for each in predictions])
    residual, total = float(((true - means) ** 2).sum()), float(((true - true.mean()) ** 2).sum())
    wide = np.linspace(0, max(float(np.quantile(true, _LONG)), 1.0), BUCKETS + 1)[1:-1]
    even = np.unique(np.quantile(true, np.arange(1, BUCKETS) / BUCKETS))
    return Scores(
        count=len(true),
        spearman=spearman(median, true),
        kendall=kendall(median, true),
        mae=float(np.abs(median - true).mean()),
        r2=1 - residual / total if total else nan,
        width_accuracy=_bucket_accuracy(median, true, wide),
        width_majority=_majority(true, wide),
        population_accuracy=_bucket_accuracy(median, true, even),
        population_majority=_majority(true, even),
        pinball=_pinball(quantiles, true),
        coverage=float(((low <= true) & (true <= high)).mean()),
        coverage_p90=float((true <= high).mean()),
        width=float((high - low).mean()),
    )


def spearman(first: Floats, second: Floats) -> float:
    """Rank correlation, ties at their mean rank; NaN where either is constant."""
    ranks = [_ranks(each) - (len(each) + 1) / 2 for each in (first, second)]
    norm = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / norm if norm else nan


def kendall(first: Floats, second: Floats) -> float:
    """Tau-b (Kendall 1945), by counting inversions (Knight 1966); NaN where either is constant."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    pairs = len(first) * (len(first) - 1) / 2
    both = np.stack((first, second), axis=1)
    tied = [_tied_pairs(each) for each in (first, second, both)]
    norm = float(np.sqrt((pairs - tied[0]) * (pairs - tied[1])))
    discordant = _inversions(second)[0]
    return (pairs - tied[0] - tied[1] + tied[2] - 2 * discordant) / norm if norm else nan


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    ranks: Floats = (ends - (count - 1) / 2)[place]
    return ranks


def _tied_pairs(values: Floats) -> float:
    _, count = np.unique(values, axis=0, return_counts=True)
    return float((count * (count - 1) / 2).sum())


def _inversions(values: Floats) -> tuple[int, Floats]:
    """Pairs in descending order, and the values sorted."""
    if len(values) <= _FEW:
        later = np.triu(np.ones((len(values), len(values)), dtype=np.bool_), 1)
        return int((np.greater.outer(values, values) & later).sum()), np.sort(values)
    middle = len(values) // 2
    left_count, left = _inversions(values[:middle])
    right_count, right = _inversions(values[middle:])
    between = len(left) * len(right) - int(np.searchsorted(left, right, side="right").sum())
    return left_count + right_count + between, np.sort(np.concatenate((left, right)))


def _bucket_accuracy(predicted: Floats, true: Floats, edges: Floats) -> float:
    hits: npt.NDArray[np.bool_] = np.digitize(predicted, edges) == np.digitize(true, edges)
    return float(hits.mean())


def _majority(true: Floats, edges: Floats) -> float:
    return float(np.bincount(np.digitize(true, edges)).max()) / len(true)


def _pinball(quantiles: Floats, true: Floats) -> float:
    levels = np.array(LEVELS)
    short = true[:, None] - quantiles
    return float(np.maximum(levels * short, (levels - 1) * short).mean())
