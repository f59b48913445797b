"""Gradient-boosted trees: grown by scikit-learn, evaluated by numpy, kept as arrays.

A single prediction by scikit-learn takes longer than all else that a request needs here.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_DEEPEST = 8
_AT_ONCE = 256
_LARGEST_LEAST_LEAF = 60


@dataclass(frozen=True, slots=True)
class Trees:
    """A forest whose nodes are rows of arrays; a leaf's children are itself.

    Attributes:
        baseline: what is predicted before any tree.
        roots: the first node of each tree.
        feature: the column that a node looks at.
        threshold: at most this goes left.
        left: the child for that.
        right: the other one.
        value: of leaves; 0 elsewhere.
    """

    baseline: Floats
    roots: npt.NDArray[np.int32]
    feature: npt.NDArray[np.int32]
    threshold: Floats
    left: npt.NDArray[np.int32]
    right: npt.NDArray[np.int32]
    value: Floats

    def predict(self, columns: npt.NDArray[Any]) -> Floats:
        """Predictions, shape [rows] for columns of shape [rows, features]."""
        parts = [
            self._predict(columns[start : start + _AT_ONCE])
            for start in range(0, len(columns), _AT_ONCE)
        ]
        return np.concatenate([np.zeros(0), *parts])

    def _predict(self, columns: npt.NDArray[Any]) -> Floats:
        rows = np.arange(len(columns))[:, None]
        nodes = np.broadcast_to(self.roots, (len(columns), len(self.roots)))
        for _ in range(_DEEPEST):
            goes_left = columns[rows, self.feature[nodes]] <= self.threshold[nodes]
            nodes = np.where(goes_left, self.left[nodes], self.right[nodes])
        total: Floats = self.baseline[0] + self.value[nodes].sum(axis=1)
        return total

    def state(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Its arrays by name."""
        return {f"{prefix}_{each.name}": getattr(self, each.name) for each in fields(self)}

    @classmethod
    def of_state(cls, prefix: str, state: dict[str, npt.NDArray[Any]]) -> Self:
        """The trees of arrays by name.

        Raises:
            KeyError: if one is missing.
        """
        return cls(**{each.name: state[f"{prefix}_{each.name}"] for each in fields(cls)})


def grow(columns: npt.NDArray[Any], target: Floats, *, loss: str, trees: int) -> Trees:
    """Trees for a target; the same for the same data.

    Args:
        columns: shape [rows, features].
        target: shape [rows].
        loss: "absolute_error" or "squared_error".
        trees: how many.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: PLC0415 - heavy

    model = HistGradientBoostingRegressor(
        loss=loss,
        max_iter=trees,
        learning_rate=0.06,
        max_leaf_nodes=31,
        max_depth=_DEEPEST,
        min_samples_leaf=min(max(len(target) // 500, 10), _LARGEST_LEAST_LEAF),
        max_features=0.5,
        early_stopping=False,
        random_state=0,
    )
    model.fit(columns, target)
    return _flattened(model)


def _flattened(model: Any) -> Trees:
    grown = [predictors[0].nodes for predictors in model._predictors]
    sizes = [len(nodes) for nodes in grown]
    roots = np.concatenate(([0], np.cumsum(sizes)[:-1])) if sizes else np.zeros(0)
    nodes = np.concatenate(grown)
    offset = np.repeat(roots, sizes).astype(np.int32)
    leaf = nodes["is_leaf"].astype(bool)
    own = np.arange(len(nodes), dtype=np.int32)
    return Trees(
        baseline=np.asarray(model._baseline_prediction, dtype=np.float64).reshape(1),
        roots=roots.astype(np.int32),
        feature=np.where(leaf, 0, nodes["feature_idx"]).astype(np.int32),
        threshold=np.where(leaf, 0.0, nodes["num_threshold"]),
        left=np.where(leaf, own, nodes["left"].astype(np.int32) + offset),
        right=np.where(leaf, own, nodes["right"].astype(np.int32) + offset),
        value=np.where(leaf, nodes["value"], 0.0),
    )
