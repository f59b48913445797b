"""The predictor ``llm``: the paper's (section III-A), a tuned language model over the prompt.

Tuned before it serves (`uellm profiler train --backend llm`); while it serves, the line from what
the network says to what a model answers, and the distribution about it, are learnt as by ``text``.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite, log
from pathlib import Path
from typing import ClassVar

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, QuantileFunction
from uellm.core.settings import Settings, setting
from uellm.learning.examples import Example
from uellm.learning.training import digest
from uellm.prediction.interface import (
    CompletionFacts,
    Prediction,
    PredictionRequest,
    Refit,
    State,
)
from uellm.prediction.prior import Prior
from uellm_profiler.llm.network import Base, LengthNetwork
from uellm_profiler.llm.tuning import Sample, Schedule, Tuning
from uellm_profiler.text.rows import Key
from uellm_profiler.text.served import Book

BASE_MODEL = "base_model"
ADAPTER = "adapter"
MOST_AT_ONCE = 64
_PRIOR, _TUNED = "prior_", "tuned_"
_RECORD = struct.Struct("<Bdd")
_VERSION = 1
_LEAST_SPREAD = 0.05
_LONGEST_LOG = 16.0
_Z80 = 2.563
"""Standard deviations between a normal distribution's 10 % and 90 % quantiles."""


@dataclass(frozen=True)
class LlmSettings(Settings):
    """How it is tuned."""

    rank: int = setting(8, "Rank of the LoRA matrices.", least=1, most=256)
    epochs: int = setting(3, "Times through all examples.", least=1, most=1000)
    batch: int = setting(32, "Examples of a step.", least=1, most=4096)
    learning_rate: float = setting(1e-3, "At its height.", above=0.0, most=1.0)
    seed: int = setting(0, "Of the order of examples.", least=0, most=2**31 - 1)


class LlmPredictor:
    """See ``uellm.prediction.interface.Predictor``.

    Until it is tuned, and for prompts without text, a prior answers.

    Args:
        settings: by name; see ``LlmSettings``, and ``base_model``, a directory.

    Raises:
        InvalidArgumentError: if there is no base model.
    """

    name = "llm"
    version = "1"
    needs_text: ClassVar[bool] = True

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        given = dict(settings or {})
        directory = given.pop(BASE_MODEL, "")
        if not directory:
            raise InvalidArgumentError(
                "base_model: not set; `uellm profiler train --backend llm --base-model DIR` tunes "
                "one, and UELLM_PROFILER_PRETRAINED names the result",
                field=BASE_MODEL,
            )
        self._settings = LlmSettings.parse(given)
        self._base = Base.read(Path(str(directory)))
        self._prior = Prior()
        self._book = Book()
        self._tuned: State = {}
        self._network: LengthNetwork | None = None

    def tune(
        self,
        examples: Sequence[Example],
        directory: Path,
        progress: Callable[[str, int], None] = lambda _, __: None,
    ) -> None:
        """Learn from prompts; see ``uellm.learning.training.Tunable``."""
        settings = self._settings
        network = LengthNetwork(self._base, settings.rank)
        samples = _samples(examples)
        whole = [sample.target for sample in samples if not sample.censored]
        network.begin_at(np.quantile(whole or [0.0], LEVELS).tolist())
        schedule = Schedule(settings.epochs, settings.batch, settings.learning_rate, settings.seed)
        tuning = Tuning(network, samples, schedule, directory, digest(examples))
        tuning.run(lambda done, loss: progress(f"tuning, loss {loss:.3f}", done))
        network.save_adapter(directory / ADAPTER)
        self._take(network.cpu().tuned())

    def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        """See ``uellm.prediction.interface.Predictor``."""
        sights = self._sights(requests)
        predictions = []
        for request, sight in zip(requests, sights, strict=True):
            if sight is None:
                predictions.append(Prediction(self._prior.predict(request)))
                continue
            lengths = self._lengths(request, *sight)
            predictions.append(Prediction(lengths, _RECORD.pack(_VERSION, *sight)))
        return predictions

    def observe(self, facts: CompletionFacts) -> None:
        """See ``uellm.prediction.interface.Predictor``; without features the prior alone learns."""
        if facts.output_tokens <= 0:
            return
        self._prior.observe(facts)
        sight = _unpacked(facts.features)
        if sight is not None:
            served = self._book.learn(_key_of(facts))
            served.observe(*sight, log(facts.output_tokens), facts.censored)

    def observations(self, model: str) -> int:
        """See ``uellm.prediction.interface.Predictor``."""
        return self._prior.observations(model)

    def describe(self, model: str) -> QuantileFunction:
        """See ``uellm.prediction.interface.Predictor``."""
        return self._prior.describe(model)

    def refit(self) -> Refit | None:
        """Nothing is ever due: it is tuned to texts, which are not kept."""
        return None

    def adopt(self, fitted: State) -> None:
        """Never called: see ``refit``."""
        del fitted

    def state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``."""
        prior = {_PRIOR + name: array for name, array in self._prior.state().items()}
        tuned = {_TUNED + name: array for name, array in self._tuned.items()}
        return prior | tuned | self._book.state()

    def serving_state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``: all of it."""
        return self.state()

    def load(self, state: State) -> None:
        """See ``uellm.prediction.interface.Predictor``."""
        try:
            prior, book = Prior(), Book()
            prior.load(_of(_PRIOR, state))
            book.load(state)
            tuned = _of(_TUNED, state)
            network = _merged(self._base, self._settings.rank, tuned) if tuned else None
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InvalidArgumentError(
                f"state: not one of predictor {self.name!r} version {self.version} ({error!r})",
                field="state",
            ) from error
        self._prior, self._book = prior, book
        self._tuned, self._network = tuned, network

    def _take(self, tuned: State) -> None:
        self._tuned = tuned
        self._network = _merged(self._base, self._settings.rank, tuned)

    def _sights(self, requests: Sequence[PredictionRequest]) -> list[tuple[float, float] | None]:
        """What the network says of each prompt: relative length and spread."""
        sights = [_unpacked(request.features) for request in requests]
        if self._network is None:
            return [None] * len(requests)
        unread = [i for i, r in enumerate(requests) if sights[i] is None and r.text.strip()]
        # Alike ones together: a batch is as long as its longest.
        unread.sort(key=lambda i: len(requests[i].text))
        for start in range(0, len(unread), MOST_AT_ONCE):
            places = unread[start : start + MOST_AT_ONCE]
            found = self._network.quantiles([requests[i].text for i in places])
            for i, quantiles in zip(places, found, strict=True):
                sights[i] = _sight(quantiles)
        return sights

    def _lengths(
        self, request: PredictionRequest, relative: float, spread: float
    ) -> QuantileFunction:
        served = self._book.find(_key_of(request))
        intercept, slope = served.line
        logs = intercept + slope * (relative + spread * served.calibration.quantiles())
        most = float(request.max_tokens) if request.max_tokens > 0 else float("inf")
        lengths = np.clip(np.exp(np.minimum(logs, _LONGEST_LOG)), 1.0, max(1.0, most))
        return QuantileFunction(LEVELS, lengths.tolist())


_NETWORKS: OrderedDict[bytes, LengthNetwork] = OrderedDict()
_KEPT_NETWORKS = 2


def _merged(base: Base, rank: int, tuned: State) -> LengthNetwork:
    """The network for what tuning has changed: predictors of equal tuning share one.

    Profilers take new states every few seconds, and what changes in them is seldom the network.
    """
    hashed = blake2b(f"{base.directory}\n{rank}".encode(), digest_size=16)
    for name in sorted(tuned):
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(tuned[name]).tobytes())
    key = hashed.digest()
    if key not in _NETWORKS:
        network = LengthNetwork(base, rank)
        network.tune_to(tuned)
        _NETWORKS[key] = network.merged()
        while len(_NETWORKS) > _KEPT_NETWORKS:
            _NETWORKS.popitem(last=False)
    _NETWORKS.move_to_end(key)
    return _NETWORKS[key]


def _samples(examples: Sequence[Example]) -> list[Sample]:
    """Log lengths in units of each served model's own: mean 0, standard deviation 1."""
    logs: dict[Key, list[float]] = {}
    for example in examples:
        logs.setdefault(_key_of(example.facts(b"")), []).append(log(max(example.output_tokens, 1)))
    scales = {key: (float(np.mean(v)), max(float(np.std(v)), 0.1)) for key, v in logs.items()}
    samples = []
    for example in examples:
        mean, deviation = scales[_key_of(example.facts(b""))]
        target = (log(max(example.output_tokens, 1)) - mean) / deviation
        samples.append(Sample(example.prompt, target, example.censored))
    return samples


def _sight(quantiles: np.ndarray) -> tuple[float, float]:
    at = {level: float(value) for level, value in zip(LEVELS, quantiles, strict=True)}
    return at[0.5], max((at[0.9] - at[0.1]) / _Z80, _LEAST_SPREAD)


def _unpacked(record: bytes) -> tuple[float, float] | None:
    if len(record) != _RECORD.size:
        return None
    version, relative, spread = _RECORD.unpack(record)
    sound = version == _VERSION and isfinite(relative) and isfinite(spread) and spread > 0
    return (relative, spread) if sound else None


def _of(prefix: str, state: State) -> State:
    return {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}


def _key_of(facts: PredictionRequest | CompletionFacts) -> Key:
    return facts.model, facts.adapter, facts.regime
