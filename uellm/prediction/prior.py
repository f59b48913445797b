"""Running quantiles of recent output lengths: what is expected before anything is known better.

Lengths are pooled by cell (model, adapter, sampling regime, prompt-length band). A cell with few
observations leans on its model's pool, and a model with few on a broad default; how much is said
by the constants below.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import ClassVar, TypeVar

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, QuantileFunction
from uellm.core.settings import Settings, setting
from uellm.prediction.interface import (
    CompletionFacts,
    Prediction,
    PredictionRequest,
    Refit,
    State,
)
from uellm.prediction.survival import Flags, Floats, survival_of

CELL_WINDOW = 256
"""Latest observations that a cell keeps."""
MODEL_WINDOW = 1024
"""Latest observations that a model's pool keeps."""
MODEL_WEIGHT = 16.0
"""How many of a cell's own observations its model's pool counts as."""
DEFAULT_WEIGHT = 8.0
"""How many of a model's observations the default counts as."""
DEFAULT_MEDIAN_TOKENS = 150.0
"""Median of the default: chat answers of small models; quantiles .1, .9, .99: 32, 698, 2446."""
DEFAULT_SIGMA = 1.2
"""Spread of the default's logarithm: a factor of 3.3 either way covers two thirds."""
MOST_CELLS = 2048
MOST_MODELS = 256
_LONGEST_BAND = 14

Cell = tuple[str, str, str, int]
"""Model, adapter, sampling regime, prompt-length band."""
Key = TypeVar("Key", Cell, str)


@cache
def default_lengths() -> Floats:
    """The default as 32 equally likely lengths: log-normal, see the constants."""
    standard = NormalDist()
    normal = np.array([standard.inv_cdf((i + 0.5) / 32) for i in range(32)])
    lengths: Floats = np.maximum(1.0, DEFAULT_MEDIAN_TOKENS * np.exp(DEFAULT_SIGMA * normal))
    return lengths


def band_of(prompt_tokens: int) -> int:
    """The prompt-length band: one per power of two, the last for everything from 8192 on."""
    return min(max(prompt_tokens, 1).bit_length(), _LONGEST_BAND)


@dataclass(slots=True)
class Window:
    """The latest lengths of a pool, oldest overwritten first."""

    size: int
    lengths: Floats = field(init=False)
    censored: Flags = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.lengths = np.zeros(self.size)
        self.censored = np.zeros(self.size, dtype=np.bool_)

    def add(self, length: int, censored: bool) -> None:
        """Take one observation."""
        place = self.seen % self.size
        self.lengths[place] = length
        self.censored[place] = censored
        self.seen += 1

    @property
    def kept(self) -> int:
        """How many are kept."""
        return min(self.seen, self.size)

    def latest(self) -> tuple[Floats, Flags]:
        """What is kept, oldest first."""
        places = np.arange(self.seen - self.kept, self.seen) % self.size
        return self.lengths[places], self.censored[places]


def weighted_quantiles(lengths: Floats, censored: Flags, weights: Floats) -> Floats:
    """Kaplan-Meier quantiles at ``LEVELS`` of weighted, right-censored lengths."""
    lengths, survival = survival_of(lengths, censored, weights)
    places = np.searchsorted(1.0 - survival, np.array(LEVELS) - 1e-9)
    quantiles: Floats = lengths[np.minimum(places, len(lengths) - 1)]
    return quantiles


@dataclass(frozen=True)
class PriorSettings(Settings):
    """How much a prior keeps, and how much it leans on what is coarser."""

    cell_window: int = setting(
        CELL_WINDOW, "Latest lengths that a cell keeps.", least=1, most=100_000
    )
    model_window: int = setting(
        MODEL_WINDOW, "Latest lengths that a model's pool keeps.", least=1, most=1_000_000
    )
    model_weight: float = setting(
        MODEL_WEIGHT, "Of a cell's own lengths, how many its model's pool counts as.", above=0
    )
    default_weight: float = setting(
        DEFAULT_WEIGHT, "Of a model's lengths, how many the default counts as.", above=0
    )


class Prior:
    """See the module. Its state is bounded; the least recently taught pools are forgotten.

    Args:
        settings: how much it keeps.
    """

    name = "prior"
    version = "2"
    needs_text: ClassVar[bool] = False

    def __init__(self, settings: PriorSettings | None = None) -> None:
        self._settings = settings or PriorSettings()
        self._cells: dict[Cell, Window] = {}
        self._models: dict[str, Window] = {}
        self._answers: dict[Cell, tuple[int, int, Floats]] = {}

    def observe(self, facts: CompletionFacts) -> None:
        """Learn from one completion; one that was cut before its first token teaches nothing."""
        if facts.output_tokens <= 0:
            return
        cell = (facts.model, facts.adapter, facts.regime, band_of(facts.prompt_tokens))
        forgotten = _teach(self._cells, cell, self._settings.cell_window, MOST_CELLS, facts)
        if forgotten is not None:
            self._answers.pop(forgotten, None)
        _teach(self._models, facts.model, self._settings.model_window, MOST_MODELS, facts)

    def predict(self, request: PredictionRequest) -> QuantileFunction:
        """The output length of one request, capped."""
        cell = (request.model, request.adapter, request.regime, band_of(request.prompt_tokens))
        values = self._quantiles(cell)
        most = float(request.max_tokens) if request.max_tokens > 0 else float("inf")
        return QuantileFunction(LEVELS, np.clip(values, 1.0, max(1.0, most)).tolist())

    def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        """See ``uellm.prediction.interface.Predictor``."""
        return [Prediction(self.predict(request)) for request in requests]

    def refit(self) -> Refit | None:
        """Nothing is ever due: it learns as it observes."""
        return None

    def adopt(self, fitted: State) -> None:
        """Never called: see ``refit``."""
        del fitted

    def state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``."""
        cells = np.array([[*cell[:3], str(cell[3])] for cell in self._cells], dtype=np.str_)
        return {
            "cells": cells.reshape(len(self._cells), 4),
            "models": np.array(list(self._models), dtype=np.str_),
            **_packed("cell", list(self._cells.values())),
            **_packed("model", list(self._models.values())),
        }

    def serving_state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``: all of it."""
        return self.state()

    def load(self, state: State) -> None:
        """See ``uellm.prediction.interface.Predictor``."""
        try:
            cells = [(str(m), str(a), str(r), int(b)) for m, a, r, b in state["cells"]]
            windows = _unpacked("cell", state, self._settings.cell_window)
            models = [str(name) for name in state["models"]]
            pools = _unpacked("model", state, self._settings.model_window)
            loaded = dict(zip(cells, windows, strict=True)), dict(zip(models, pools, strict=True))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InvalidArgumentError(
                f"state: not one of predictor {self.name!r} version {self.version} ({error!r})",
                field="state",
            ) from error
        self._cells, self._models = loaded
        self._answers = {}

    def describe(self, model: str) -> QuantileFunction:
        """Output length over everything that the model's pool remembers."""
        return QuantileFunction(LEVELS, self._mixture(None, self._models.get(model)).tolist())

    def observations(self, model: str) -> int:
        """Completions learnt from."""
        window = self._models.get(model)
        return window.seen if window else 0

    def _quantiles(self, cell: Cell) -> Floats:
        own, pool = self._cells.get(cell), self._models.get(cell[0])
        seen = (own.seen if own else 0, pool.seen if pool else 0)
        known = self._answers.get(cell)
        if known is not None and known[:2] == seen:
            return known[2]
        values = self._mixture(own, pool)
        if own is not None:
            self._answers[cell] = (*seen, values)
        return values

    def _mixture(self, own: Window | None, pool: Window | None) -> Floats:
        default = default_lengths()
        pooled = pool.kept if pool else 0
        trust = pooled / (pooled + self._settings.default_weight)
        lengths = [default]
        censored = [np.zeros(len(default), dtype=np.bool_)]
        model_weight = self._settings.model_weight
        weights = [np.full(len(default), model_weight * (1 - trust) / len(default))]
        for window, weight in (
            (pool, model_weight * trust / pooled if pooled else 0.0),
            (own, 1.0),
        ):
            if window is not None and window.kept:
                lengths.append(window.lengths[: window.kept])
                censored.append(window.censored[: window.kept])
                weights.append(np.full(window.kept, weight))
        return weighted_quantiles(
            np.concatenate(lengths), np.concatenate(censored), np.concatenate(weights)
        )


def _teach(
    pools: dict[Key, Window], key: Key, size: int, most: int, facts: CompletionFacts
) -> Key | None:
    """Add an observation to a pool; returns the key of the pool forgotten to make room."""
    # Taken out and put back, so that the dictionary's order is that of last use.
    window = pools.pop(key, None) or Window(size)
    window.add(facts.output_tokens, facts.censored)
    pools[key] = window
    if len(pools) <= most:
        return None
    forgotten = next(iter(pools))
    del pools[forgotten]
    return forgotten


def _packed(kind: str, windows: Sequence[Window]) -> State:
    """What windows keep, oldest first, one behind the other."""
    kept = [window.latest() for window in windows]
    return {
        f"{kind}_seen": np.array([window.seen for window in windows], dtype=np.int64),
        f"{kind}_kept": np.array([len(lengths) for lengths, _ in kept], dtype=np.int64),
        f"{kind}_lengths": np.concatenate([np.zeros(0), *(lengths for lengths, _ in kept)]),
        f"{kind}_censored": np.concatenate(
            [np.zeros(0, dtype=np.bool_), *(censored for _, censored in kept)]
        ),
    }


def _unpacked(kind: str, state: State, size: int) -> list[Window]:
    ends = np.cumsum(state[f"{kind}_kept"])
    parts = zip(
        np.split(state[f"{kind}_lengths"], ends)[:-1],
        np.split(state[f"{kind}_censored"], ends)[:-1],
        state[f"{kind}_seen"],
        strict=True,
    )
    windows = []
    for lengths, censored, seen in parts:
        window = Window(size)
        # Places go by what was seen, as if it had been kept from the first on.
        places = np.arange(seen - len(lengths), seen)[-size:] % size
        window.lengths[places] = lengths[-size:]
        window.censored[places] = censored[-size:]
        window.seen = int(seen)
        windows.append(window)
    return windows
