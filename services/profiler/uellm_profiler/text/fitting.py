"""Fits the text model to completions: seconds to a minute of work, for a thread or a process."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uellm.prediction.calibration import Calibration, representative
from uellm.prediction.interface import State
from uellm.prediction.survival import survival_of
from uellm_profiler.text.linear import Design, Weights
from uellm_profiler.text.model import BUCKETS, MOST_OWN, TextModel, bucket_of, columns_of, heard_of
from uellm_profiler.text.record import Seen, unpacked
from uellm_profiler.text.rows import Key, Row
from uellm_profiler.text.served import FORGETTING, Book, Served
from uellm_profiler.text.trees import Floats, Trees, grow

LEAST_OWN_ROWS = 1000
"""Fewest completions for a linear score of one's own."""
_FOLDS = 4
_LEAST_SPREAD = 0.1
_MOST_SHRINKAGE = 100.0
_FACTOR_WEIGHT = 20.0
_HEED_RIDGE = 10.0
_MARKS = (0.15, 0.5, 0.85)
"""Quantiles of relative lengths whose exceeding has a linear score."""
_SPREAD_FLOOR = 0.05
_CENTRE = ("absolute_error", 300)
_SPREAD = ("squared_error", 60)
"""Loss and most trees of the two forests."""

Places = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Fitting:
    """A snapshot of completions, and the work of fitting to them.

    Attributes:
        rows: with what they are of.
        taught: how many there had been.
        listens: to what a language model said of prompts.
    """

    rows: Sequence[tuple[Key, Row]]
    taught: int
    listens: bool = False

    def __call__(self) -> State:
        """Fit; returns the state of a ``TextModel`` and a ``Book`` beside ``fitted_taught``."""
        # Only libraries that are loaded can be limited.
        import sklearn.ensemble  # noqa: F401, PLC0415 - heavy
        from threadpoolctl import threadpool_limits  # noqa: PLC0415

        # One thread: the same data give the same trees, and those who serve keep their cores.
        with threadpool_limits(1):
            fitted = _fitted(_Data.of(self.rows), listens=self.listens)
            return fitted | {"fitted_taught": np.array(self.taught)}


@dataclass(slots=True)
class _Data:
    """Completions as columns.

    Attributes:
        keys: what is served, that with the most completions first.
        key: place of each row's among them.
        seen: what was seen of each prompt.
        prompts: fingerprints.
        logs: logarithm of each length; of those that were cut, what it can be expected to be.
        measured: the same, as it was measured.
        censored: which were cut.
    """

    keys: list[Key]
    key: Places
    seen: list[Seen]
    prompts: npt.NDArray[np.uint64]
    logs: Floats
    measured: Floats
    censored: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Sequence[tuple[Key, Row]]) -> "_Data":
        """The columns of rows."""
        sights = [unpacked(row.record) for _, row in rows]
        kept = [(key, row, seen) for (key, row), seen in zip(rows, sights, strict=True) if seen]
        counts: dict[Key, int] = {}
        for key, _, _ in kept:
            counts[key] = counts.get(key, 0) + 1
        keys = sorted(counts, key=lambda key: (-counts[key], key))
        places = {key: place for place, key in enumerate(keys)}
        key_of = np.array([places[key] for key, _, _ in kept], dtype=np.intp)
        measured = np.log(np.array([max(row.length, 1) for _, row, _ in kept], dtype=np.float64))
        censored = np.array([row.censored for _, row, _ in kept], dtype=np.bool_)
        logs = measured.copy()
        for place in range(len(keys)):
            rows_of = np.flatnonzero(key_of == place)
            logs[rows_of] = _completed(measured[rows_of], censored[rows_of])
        return cls(
            keys=keys,
            key=key_of,
            seen=[seen for _, _, seen in kept],
            prompts=np.array([seen.fingerprint for _, _, seen in kept], dtype=np.uint64),
            logs=logs,
            measured=measured,
            censored=censored,
        )


def _completed(logs: Floats, censored: npt.NDArray[np.bool_]) -> Floats:
    """Log lengths with those that were cut replaced by the median of what is longer."""
    if not censored.any():
        return logs
    points, survival = survival_of(logs, censored, np.ones(len(logs)))
    beyond = survival[np.searchsorted(points, logs[censored], side="right") - 1]
    places = np.searchsorted(-survival, -beyond / 2)
    completed = logs.copy()
    completed[censored] = np.maximum(points[np.minimum(places, len(points) - 1)], logs[censored])
    return completed


def _fitted(data: _Data, *, listens: bool) -> State:
    scale = [_scale(data.logs[data.key == place]) for place in range(len(data.keys))]
    means, spreads = (np.array([each[i] for each in scale])[data.key] for i in (0, 1))
    target = (data.logs - means) / spreads
    shared, own, own_keys, columns, score = _linear(data, target)
    halves = (data.prompts >> np.uint64(16)).astype(np.int64) % 2
    count, heed = len(target), np.zeros(0)
    if listens:
        # The same trees answer where the language model is not waited for.
        heard = heard_of(data.seen, score)
        heed = _heed(heard, target - score)
        columns = np.tile(columns, (2, 1))
        columns = np.column_stack((columns, np.concatenate((heard, np.zeros_like(heard)))))
        listening = np.clip(score + (heard * heed).sum(axis=1), *_limits(target))
        score = np.concatenate((listening, score))
        target, halves = np.tile(target, 2), np.tile(halves, 2)
    apart = score + _apart(columns, target - score, halves, *_CENTRE)
    errors = target - apart
    logs = np.log(np.abs(errors) + _SPREAD_FLOOR)
    widths = np.exp(_apart(columns, logs, halves, *_SPREAD))
    centre, spread = _grow(columns, target - score, *_CENTRE), _grow(columns, logs, *_SPREAD)
    target, apart, errors, widths = (each[:count] for each in (target, apart, errors, widths))
    model = TextModel(
        shared=shared,
        own=own,
        own_keys=own_keys,
        limits=_limits(target),
        centre=centre,
        spread=spread,
        shrinkage=_shrinkage(data.prompts, errors),
        factors=np.ones(BUCKETS),
        heed=heed,
    )
    relative, counts = _with_known(model, data.prompts, apart, target)
    buckets = np.array([bucket_of(int(count)) for count in counts])
    model.factors = _factors(buckets, np.abs(target - relative) / widths, np.abs(errors) / widths)
    widths *= model.factors[buckets]
    return model.state() | _book(data, scale, relative, widths).state()


def _scale(logs: Floats) -> tuple[float, float]:
    """Mean and spread of log lengths."""
    return float(logs.mean()), max(float(logs.std()), _LEAST_SPREAD)


def _limits(target: Floats) -> tuple[float, float]:
    return float(target.min()), float(target.max())


def _linear(data: _Data, target: Floats) -> tuple[Weights, Weights, list[Key], Floats, Floats]:
    """Linear weights, shared and own, and with scores of rows held apart the trees' columns.

    Last the scores that the trees begin with.
    """
    folds = (data.prompts >> np.uint64(8)).astype(np.int64) % _FOLDS
    cues = np.stack([each.cues for each in data.seen])
    design = Design([each.ids for each in data.seen], cues, folds)
    every = np.arange(len(target))
    # The second is of what a log length says too little of: how long the long ones are. The others
    # are chances of being longer than most short ones, half of all, and all but the long ones.
    marks = np.quantile(target, _MARKS)
    wanted = [target, np.exp(np.clip(target, -3.0, 3.0)), *(target > mark for mark in marks)]
    fits = [design.fit(every, np.asarray(each, dtype=np.float64)) for each in wanted]
    scores = np.column_stack([apart for _, apart in fits])
    own_score, own = scores[:, 0].copy(), []
    ranks = np.where(data.key < MOST_OWN, data.key, -1)
    for rank in range(min(MOST_OWN, len(data.keys))):
        rows = np.flatnonzero(data.key == rank)
        if len(rows) < LEAST_OWN_ROWS:
            ranks[ranks >= rank] = -1
            break
        weights, own_score[rows] = design.fit(rows, target[rows])
        own.append(weights)
    own_score = np.clip(own_score, *_limits(target))
    columns = columns_of(cues, scores, own_score, ranks.tolist())
    shared = np.stack([weights for weights, _ in fits])
    own_weights = np.stack(own) if own else np.zeros((0, shared.shape[1]), dtype=np.float16)
    return shared, own_weights, data.keys[: len(own)], columns, own_score


def _heed(heard: Floats, lacking: Floats) -> Floats:
    """Weights by which what is heard says what is lacking: ridge regression."""
    square = heard.T @ heard + _HEED_RIDGE * np.eye(heard.shape[1])
    return np.asarray(np.linalg.solve(square, heard.T @ lacking), dtype=np.float64)


def _grow(columns: Floats, target: Floats, loss: str, most: int) -> Trees:
    return grow(columns, target, loss=loss, trees=min(most, 30 + len(target) // 40))


def _apart(
    columns: Floats, target: Floats, halves: npt.NDArray[np.int64], loss: str, most: int
) -> Floats:
    """What each half is predicted as by trees of the other."""
    apart = np.full(len(target), float(np.median(target)))
    if 0 < halves.sum() < len(halves):
        for half in (0, 1):
            trees = _grow(columns[halves != half], target[halves != half], loss, most)
            apart[halves == half] = trees.predict(columns[halves == half])
    return apart


def _shrinkage(prompts: npt.NDArray[np.uint64], errors: Floats) -> float:
    """Variance among answers to one prompt over that among prompts."""
    _, place, count = np.unique(prompts, return_inverse=True, return_counts=True)
    repeated = count[place] > 1
    free = int(repeated.sum()) - int((count > 1).sum())
    if free < 1:
        return 1.0
    means = np.bincount(place, errors) / count
    within = float(((errors - means[place])[repeated] ** 2).sum()) / free
    between = max(float(errors[repeated].var()) - within, 1e-9)
    return float(np.clip(within / between, 1.0 / _MOST_SHRINKAGE, _MOST_SHRINKAGE))


def _with_known(
    model: TextModel, prompts: npt.NDArray[np.uint64], apart: Floats, target: Floats
) -> tuple[Floats, Places]:
    """Relative lengths with others' answers to the same prompts, and how many of them there were.

    The model remembers all of them.
    """
    unique, place, count = np.unique(prompts, return_inverse=True, return_counts=True)
    sums = np.bincount(place, target)
    known = zip(sums.tolist(), count.tolist(), strict=True)
    model.prompts = dict(zip(unique.tolist(), known, strict=True))
    others: Places = count[place] - 1
    shrinkage = model.shrinkage
    return (shrinkage * apart + sums[place] - target) / (shrinkage + others), others


def _factors(buckets: npt.NDArray[np.int64], scaled: Floats, by_text: Floats) -> Floats:
    """Mean error by what is known of the prompt, over that of the text alone."""
    mean = max(float(by_text.mean()), 1e-9)
    totals = np.bincount(buckets, scaled, minlength=BUCKETS) + _FACTOR_WEIGHT * mean
    counts = np.bincount(buckets, minlength=BUCKETS) + _FACTOR_WEIGHT
    factors: Floats = totals / counts / mean
    factors[0] = 1.0
    return factors


def _book(
    data: _Data, scale: Sequence[tuple[float, float]], relative: Floats, widths: Floats
) -> Book:
    """What is served, as if all rows had been predicted and observed."""
    book = Book()
    for place, key in reversed(list(enumerate(data.keys))):
        rows = np.flatnonzero(data.key == place)
        x, y = relative[rows], data.logs[rows]
        weights = FORGETTING ** np.arange(len(rows))[::-1]
        moments = np.array([weights @ each for each in (x**0, x, x * x, y, x * y)])
        served = Served(scale[place], Calibration(), moments)
        intercept, slope = served.line
        errors = data.measured[rows] - intercept - slope * relative[rows]
        served.calibration.fill(
            *representative(errors / (slope * widths[rows]), data.censored[rows])
        )
        book.put(key, served)
    return book
