"""Ridge regression on hashed features: fitted by scikit-learn, scored by numpy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from uellm_profiler.text.features import BITS, Ids

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float16]
"""One weight per bucket, and the intercept last; in half precision, which predicts as well."""

RIDGE = 0.7
"""Strength of the penalty where a row's features have length 1."""
_TOLERANCE = 1e-3


def score(ids: Sequence[Ids], weights: Weights) -> Floats:
    """Scores of prompts, one column per row of ``weights``: intercept plus sum over √count."""
    sizes = np.array([len(each) for each in ids])
    gathered = weights[:, np.concatenate(ids)].astype(np.float64)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    sums: Floats = np.add.reduceat(gathered, starts, axis=1) / np.sqrt(sizes)
    return (sums + weights[:, -1:]).T


class Design:
    """Rows of hashed features, to be fitted to.

    Args:
        ids: hashed features of each row, at least one.
        folds: parts of the data that are predicted from the others.
    """

    def __init__(self, ids: Sequence[Ids], folds: npt.NDArray[np.int64]) -> None:
        from scipy.sparse import csr_matrix  # noqa: PLC0415 - heavy, for fitting alone

        sizes = np.array([len(each) for each in ids])
        ends = np.concatenate(([0], np.cumsum(sizes)))
        values = np.repeat(1.0 / np.sqrt(sizes), sizes)
        columns = np.concatenate(ids).astype(np.int32)
        self._matrix = csr_matrix((values, columns, ends), shape=(len(ids), 1 << BITS))
        self._folds = folds

    def fit(self, rows: npt.NDArray[np.intp], target: Floats) -> tuple[Weights, Floats]:
        """Weights for some rows, and what each row's own fold was predicted as by the others."""
        folds, apart = self._folds[rows], np.empty(len(rows))
        for fold in range(int(folds.max()) + 1):
            held = folds == fold
            if held.all() or not held.any():
                apart[held] = target.mean()
                continue
            weights = self._ridge(rows[~held], target[~held])
            apart[held] = self._matrix[rows[held]] @ weights[:-1] + weights[-1]
        return self._ridge(rows, target).astype(np.float16), apart

    def _ridge(self, rows: npt.NDArray[np.intp], target: Floats) -> Floats:
        from sklearn.linear_model import Ridge  # noqa: PLC0415

        ridge = Ridge(alpha=RIDGE, solver="sparse_cg", tol=_TOLERANCE)
        ridge.fit(self._matrix[rows], target)
        return np.append(ridge.coef_, ridge.intercept_)
