"""Ridge regression on hashed features and cues: fitted by scikit-learn, scored by numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from uellm_profiler.text.features import BITS, Ids

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float16]
"""One weight per bucket, then one per cue, and the intercept last; in half precision, which
predicts as well."""

RIDGE = 0.7
"""Strength of the penalty where a row's features have length 1."""
CUE_SCALE = 0.5
"""What a cue is multiplied by: words, whose squares add up to 1, are many, and say less each."""
_TOLERANCE = 1e-3


def score(ids: Sequence[Ids], cues: npt.NDArray[Any], weights: Weights) -> Floats:
    """Scores of prompts, one column per row of ``weights``.

    The intercept, the sum over hashed features over √count, and the scaled cues, shape
    [prompts, cues], by their weights.
    """
    sizes = np.array([len(each) for each in ids])
    gathered = weights[:, np.concatenate(ids)].astype(np.float64)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    sums: Floats = np.add.reduceat(gathered, starts, axis=1) / np.sqrt(sizes)
    # No product of matrices: what one prompt comes to must not depend on those beside it.
    of_cues = (CUE_SCALE * cues[:, None] * weights[:, 1 << BITS : -1].astype(np.float64)).sum(
        axis=2
    )
    scores: Floats = (sums + weights[:, -1:]).T + of_cues
    return scores


class Design:
    """Rows of hashed features, to be fitted to.

    Args:
        ids: hashed features of each row, at least one.
        cues: of each row, shape [rows, cues].
        folds: parts of the data that are predicted from the others.
    """

    def __init__(
        self, ids: Sequence[Ids], cues: npt.NDArray[Any], folds: npt.NDArray[np.int64]
    ) -> None:
        from scipy.sparse import csr_matrix, hstack  # noqa: PLC0415 - heavy, for fitting alone

        sizes = np.array([len(each) for each in ids])
        ends = np.concatenate(([0], np.cumsum(sizes)))
        values = np.repeat(1.0 / np.sqrt(sizes), sizes)
        columns = np.concatenate(ids).astype(np.int32)
        words = csr_matrix((values, columns, ends), shape=(len(ids), 1 << BITS))
        self._matrix = hstack((words, csr_matrix(CUE_SCALE * cues)), format="csr")
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
