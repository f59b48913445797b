"""What a length predictor has to be better than.

Each makes a point; its errors on a fifth of what it could learn from make that a distribution, as
split conformal prediction does, in the logarithm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, Ridge, SGDClassifier

from uellm.core.request import LEVELS, QuantileFunction
from uellm.learning.examples import Example

Floats = npt.NDArray[np.float64]
Points = Callable[[Sequence[Example]], Floats]
"""Predicted lengths of some examples."""

BUCKETS = 10


def lengths_of(examples: Sequence[Example]) -> Floats:
    """True lengths."""
    return np.array([example.output_tokens for example in examples], dtype=np.float64)


def constant(examples: Sequence[Example]) -> Points:
    """The median."""
    median = float(np.median(lengths_of(examples)))
    return lambda asked: np.full(len(asked), median)


def majority(examples: Sequence[Example]) -> Points:
    """The middle of the fullest of ten buckets of equal width."""
    lengths = lengths_of(examples)
    edges = _edges(lengths)
    fullest = int(np.bincount(np.digitize(lengths, edges[1:-1]), minlength=BUCKETS).argmax())
    middle = float(edges[fullest : fullest + 2].mean())
    return lambda asked: np.full(len(asked), middle)


def prompt_length(examples: Sequence[Example]) -> Points:
    """A line over the logarithm of the prompt's length."""

    def columns(some: Sequence[Example]) -> Floats:
        return np.log1p([[example.prompt_tokens] for example in some])

    model = LinearRegression().fit(columns(examples), np.log1p(lengths_of(examples)))
    return lambda asked: np.expm1(model.predict(columns(asked)))


def tfidf_ridge(examples: Sequence[Example]) -> Points:
    """Ridge regression of the log length on TF-IDF of words and pairs of them."""
    words, matrix = _words(examples)
    model = Ridge(alpha=1.0).fit(matrix, np.log1p(lengths_of(examples)))
    return lambda asked: np.expm1(model.predict(words.transform([e.prompt for e in asked])))


def s3_buckets(examples: Sequence[Example]) -> Points:
    """A classifier into ten buckets, as in S3, on TF-IDF in place of its fine-tuned DistilBERT."""
    words, matrix = _words(examples)
    lengths = lengths_of(examples)
    buckets = np.digitize(lengths, _edges(lengths)[1:-1])
    model = SGDClassifier(loss="log_loss", alpha=1e-6, random_state=0).fit(matrix, buckets)
    middle = {bucket: float(np.median(lengths[buckets == bucket])) for bucket in set(buckets)}

    def points(asked: Sequence[Example]) -> Floats:
        said = model.predict(words.transform([example.prompt for example in asked]))
        return np.array([middle[bucket] for bucket in said])

    return points


BASELINES: dict[str, Callable[[Sequence[Example]], Points]] = {
    "majority": majority,
    "constant": constant,
    "prompt length": prompt_length,
    "tf-idf ridge": tfidf_ridge,
    "s3 buckets (tf-idf)": s3_buckets,
}


def with_errors(
    make: Callable[[Sequence[Example]], Points], examples: Sequence[Example]
) -> Callable[[Sequence[Example]], list[QuantileFunction]]:
    """A baseline's distributions, learnt from examples."""
    held = max(len(examples) // 5, 1)
    apart = np.log1p(lengths_of(examples[:held]))
    errors = apart - np.log1p(make(examples[held:])(examples[:held]))
    # The point stays the median: it is what the baseline says.
    shifts = np.quantile(errors, LEVELS) - np.median(errors)
    points = make(examples)

    def predict(asked: Sequence[Example]) -> list[QuantileFunction]:
        logs = np.log1p(np.maximum(points(asked), 1.0))[:, None] + shifts
        return [QuantileFunction(LEVELS, row) for row in np.maximum(np.expm1(logs), 1).tolist()]

    return predict


def _edges(lengths: Floats) -> Floats:
    edges: Floats = np.linspace(0, float(np.quantile(lengths, 0.99)), BUCKETS + 1)
    return edges


def _words(examples: Sequence[Example]) -> tuple[Any, Any]:
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return words, words.fit_transform([example.prompt for example in examples])
