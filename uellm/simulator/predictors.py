"""What is predicted of an answer's length, from perfect to next to nothing.

``oracle`` knows it. ``b80`` knows the power of two at or below it, four times in five; otherwise
it names a neighbour, and its distribution says so. ``noise`` is off by a log-normal factor and does
not know. ``class-mean`` knows the lengths of the request's class. ``prior`` is the one that serves
before anything better is known, and learns from what ends in the run.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import exp
from typing import Protocol

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, QuantileFunction, ResourceProfile
from uellm.prediction.interface import (
    SAMPLED,
    CompletionFacts,
    PredictionRequest,
    Predictor,
)
from uellm.prediction.prior import Prior
from uellm.simulator.requests import Request

FORETOLD = ("oracle", "b80", "noise", "class-mean")
"""Predictors that are given what a workload will come to, and spoil it."""
PREDICTORS = (*FORETOLD, "prior")
_WRONG_SHARE = 0.2
_NOISE_SPREAD = 1.0


class Profiler(Protocol):
    """Says of each request what it will need, when it comes."""

    def profile(self, request: Request) -> ResourceProfile:
        """What is expected of a request."""
        ...

    def learn(self, request: Request) -> None:
        """A request has had its whole answer."""
        ...


class Foretold:
    """Profiles that are known from the beginning.

    Args:
        known: by request id.
    """

    def __init__(self, known: Mapping[str, ResourceProfile]) -> None:
        self._known = known

    def profile(self, request: Request) -> ResourceProfile:
        """See ``Profiler``."""
        return self._known[request.request_id]

    def learn(self, request: Request) -> None:
        """Nothing is to be learnt."""


class Learning:
    """Profiles by a predictor of the live mesh.

    Args:
        predictor: it knows nothing of the workload yet.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def profile(self, request: Request) -> ResourceProfile:
        """See ``Profiler``."""
        asked = PredictionRequest("", SAMPLED, request.prompt_tokens, request.max_tokens)
        (found,) = self._predictor.predict_batch([asked])
        return ResourceProfile(
            prompt_tokens=request.prompt_tokens,
            output_tokens=found.lengths,
            predictor=self._predictor.name,
        )

    def learn(self, request: Request) -> None:
        """See ``Profiler``."""
        self._predictor.observe(
            CompletionFacts("", SAMPLED, request.prompt_tokens, request.output_tokens)
        )


def profiler(name: str, requests: Sequence[Request], rng: np.random.Generator) -> Profiler:
    """The profiler of a run; arguments and errors are those of ``profiles``."""
    check_predictor(name)
    return Learning(Prior()) if name == "prior" else Foretold(profiles(name, requests, rng))


def profiles(
    name: str, requests: Sequence[Request], rng: np.random.Generator
) -> dict[str, ResourceProfile]:
    """A profile for each request, by id.

    Args:
        name: one of ``FORETOLD``; ``noise:SPREAD`` gives noise another spread than 1.
        requests: of a workload; a class's lengths are what its requests here come to.
        rng: is asked for the same however long the answers are, so that errors are common to runs.

    Raises:
        InvalidArgumentError: if there is no such predictor.
    """
    kind, _, spread = name.partition(":")
    check_predictor(name)
    luck = rng.random(len(requests)), rng.standard_normal(len(requests))
    classes = _classes(requests) if kind == "class-mean" else {}
    found = {}
    for i, request in enumerate(requests):
        if kind == "oracle":
            lengths = _point(request.output_tokens)
        elif kind == "b80":
            lengths = _bucket(request.output_tokens, float(luck[0][i]))
        elif kind == "noise":
            factor = exp(float(spread or _NOISE_SPREAD) * float(luck[1][i]))
            lengths = _point(request.output_tokens * factor)
        else:
            lengths = classes[request.kind]
        found[request.request_id] = ResourceProfile(
            prompt_tokens=request.prompt_tokens,
            output_tokens=lengths.clipped(1.0, float(request.max_tokens)),
            predictor=name,
        )
    return found


def check_predictor(name: str) -> None:
    """See that there is such a predictor.

    Raises:
        InvalidArgumentError: if not.
    """
    kind, colon, spread = name.partition(":")
    good = kind in PREDICTORS
    if colon:
        try:
            good = kind == "noise" and 0 < float(spread) <= 10
        except ValueError:
            good = False
    if not good:
        raise InvalidArgumentError(
            f"predictor: no {name!r}; available: {', '.join(PREDICTORS)}, noise:SPREAD",
            field="predictor",
        )


def _point(length: float) -> QuantileFunction:
    return QuantileFunction((0.5,), (max(float(length), 1.0),))


def _bucket(length: int, luck: float) -> QuantileFunction:
    """The named bucket has all but a fifth, its neighbours half of the rest each."""
    bucket = length.bit_length() - 1
    half = _WRONG_SHARE / 2
    if luck < half:
        bucket = max(bucket - 1, 0)
    elif luck > 1 - half:
        bucket += 1
    low = 2.0**bucket
    # Almost 0 and 1, which levels may not be.
    return QuantileFunction(
        (1e-6, half, 1 - half, 1 - 1e-6), (max(low / 2, 1.0), low, 2 * low, 4 * low)
    )


def _classes(requests: Sequence[Request]) -> dict[str, QuantileFunction]:
    lengths = defaultdict(list)
    for request in requests:
        lengths[request.kind].append(request.output_tokens)
    return {
        kind: QuantileFunction(LEVELS, np.quantile(values, LEVELS).tolist())
        for kind, values in lengths.items()
    }
