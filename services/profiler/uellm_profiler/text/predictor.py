"""The predictor ``text``: learns from the words of prompts while it serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import ClassVar

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
from uellm.prediction.prior import Prior
from uellm_profiler.text.fitting import Fitting
from uellm_profiler.text.model import Floats, TextModel
from uellm_profiler.text.record import Seen, see, unpacked
from uellm_profiler.text.rows import Key, Rows
from uellm_profiler.text.served import Book

_PRIOR = "prior_"
_LONGEST_LOG = 16.0
_DECIMALS = 3


@dataclass(frozen=True)
class TextSettings(Settings):
    """How much is kept, and how often it is fitted to."""

    most_rows: int = setting(
        50_000, "Completions kept to learn from; about 600 bytes each.", least=256, most=1_000_000
    )
    first_fit: int = setting(64, "Completions before the first fit.", least=64, most=1_000_000)
    growth: float = setting(
        1.5, "A fit is due when there were so many times the completions.", above=1.0, most=100.0
    )
    most_between_fits: int = setting(
        8192, "A fit is due after so many completions in any case.", least=64, most=10_000_000
    )


class TextPredictor:
    """See ``uellm.prediction.interface.Predictor``, docs/profiler.md and ADR 30.

    Until the first fit, and for prompts without text, a prior answers.

    Args:
        settings: by name; see ``TextSettings``.
    """

    name = "text"
    version = "3"
    needs_text: ClassVar[bool] = True
    listens: ClassVar[bool] = False
    """Whether a language model says something, too."""

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        self._settings = TextSettings.parse(settings or {})
        self._prior = Prior()
        self._rows = Rows(self._settings.most_rows)
        self._book = Book()
        self._model: TextModel | None = None
        self._fitted = 0

    def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        """See ``uellm.prediction.interface.Predictor``."""
        seen = self._look(requests)
        told = [i for i, each in enumerate(seen) if each is not None]
        values: dict[int, Floats] = {}
        if self._model is not None and told:
            keys = [_key_of(requests[i]) for i in told]
            values = dict(zip(told, self._quantiles([seen[i] for i in told], keys), strict=True))  # type: ignore[misc]
        predictions = []
        for i, (request, sight) in enumerate(zip(requests, seen, strict=True)):
            if i in values:
                most = float(request.max_tokens) if request.max_tokens > 0 else float("inf")
                capped = np.clip(values[i], 1.0, max(1.0, most)).tolist()
                lengths = QuantileFunction(LEVELS, capped)
            else:
                lengths = self._prior.predict(request)
            # What a language model was not asked about is what `text` says.
            by = TextPredictor.name if self.listens and sight and not len(sight.said) else ""
            predictions.append(Prediction(lengths, sight.packed() if sight else b"", by))
        return predictions

    def observe(self, facts: CompletionFacts) -> None:
        """See ``uellm.prediction.interface.Predictor``; without features the prior alone learns."""
        if facts.output_tokens <= 0:
            return
        self._prior.observe(facts)
        seen = unpacked(facts.features)
        if seen is None:
            return
        key = _key_of(facts)
        self._rows.add(key, facts.output_tokens, facts.censored, facts.features)
        self._learn(key, seen, facts.output_tokens, facts.censored)

    def observations(self, model: str) -> int:
        """See ``uellm.prediction.interface.Predictor``."""
        return self._prior.observations(model)

    def describe(self, model: str) -> QuantileFunction:
        """See ``uellm.prediction.interface.Predictor``."""
        return self._prior.describe(model)

    def refit(self) -> Refit | None:
        """Due after some hundred completions, and then as their number grows."""
        settings = self._settings
        due = self._fitted + min(
            max(settings.first_fit, (settings.growth - 1) * self._fitted),
            settings.most_between_fits,
        )
        return self.fitting() if self._rows.taught >= due else None

    def fitting(self) -> Fitting:
        """The work of fitting to all that is kept, due or not."""
        return Fitting(list(self._rows), self._rows.taught, self.listens)

    def adopt(self, fitted: State) -> None:
        """See ``uellm.prediction.interface.Predictor``; what came meanwhile is learnt anew."""
        book = Book()
        book.load(fitted)
        self._model, self._book = TextModel.of_state(fitted), book
        self._fitted = int(fitted["fitted_taught"])
        for key, row in self._rows.since(self._fitted):
            seen = unpacked(row.record)
            if seen is not None:
                self._learn(key, seen, row.length, row.censored)

    def state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``."""
        return self.serving_state() | self._rows.state()

    def serving_state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``: without the completions that were kept."""
        prior = {_PRIOR + name: array for name, array in self._prior.state().items()}
        fitted = self._model.state() | self._book.state() if self._model else {}
        none = Rows(self._settings.most_rows).state() | {"rows_taught": np.array(self._rows.taught)}
        return prior | none | fitted | {"fitted_taught": np.array(self._fitted)}

    def load(self, state: State) -> None:
        """See ``uellm.prediction.interface.Predictor``."""
        try:
            prior, rows, book = Prior(), Rows(self._settings.most_rows), Book()
            prior.load(
                {n.removeprefix(_PRIOR): a for n, a in state.items() if n.startswith(_PRIOR)}
            )
            rows.load(state)
            fitted = int(state["fitted_taught"])
            model = None
            if "model_shared" in state:
                model = TextModel.of_state(state)
                book.load(state)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InvalidArgumentError(
                f"state: not one of predictor {self.name!r} version {self.version} ({error!r})",
                field="state",
            ) from error
        self._prior, self._rows, self._book = prior, rows, book
        self._model, self._fitted = model, fitted

    def _look(self, requests: Sequence[PredictionRequest]) -> list[Seen | None]:
        """What is seen of each prompt; None where there is no text."""
        return [_seen(request) for request in requests]

    def _learn(self, key: Key, seen: Seen, length: int, censored: bool) -> None:
        if self._model is None:
            return
        relative, spreads = self._model.with_known([seen], *self._model.by_text([seen], [key]))
        served = self._book.learn(key)
        intercept, slope = served.line
        served.observe(float(relative[0]), float(spreads[0]), log(length), censored)
        if not censored:
            self._model.remember(seen.fingerprint, (log(length) - intercept) / slope)

    def _quantiles(self, seen: Sequence[Seen], keys: Sequence[Key]) -> Floats:
        """Quantiles of lengths, shape [requests, levels]."""
        assert self._model is not None  # noqa: S101
        relative, spreads = self._model.with_known(seen, *self._model.by_text(seen, keys))
        served = {key: self._book.find(key) for key in set(keys)}
        known = {key: (each.line, each.calibration.quantiles()) for key, each in served.items()}
        lines = np.array([known[key][0] for key in keys])
        errors = np.array([known[key][1] for key in keys])
        relative_quantiles = relative[:, None] + spreads[:, None] * errors
        logs = lines[:, :1] + lines[:, 1:] * relative_quantiles
        # Where answers are all of one length, the quantiles are that, and not a rounding beside it.
        lengths: Floats = np.round(np.exp(np.minimum(logs, _LONGEST_LOG)), _DECIMALS)
        return lengths


def _seen(request: PredictionRequest) -> Seen | None:
    if request.features:
        return unpacked(request.features)
    return see(request.text, request.prompt_tokens) if request.text.strip() else None


def _key_of(facts: PredictionRequest | CompletionFacts) -> Key:
    return facts.model, facts.adapter, facts.regime
