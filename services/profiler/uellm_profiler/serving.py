"""Predictions for calls that come at the same time, by what was learnt last."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

from uellm.core.errors import ResourceExhaustedError
from uellm.prediction.interface import Prediction, PredictionRequest, Predictor
from uellm_profiler.store import kind_of

MOST_AT_ONCE = 256
"""Requests that are predicted together."""
MOST_WAITING = 2048
"""Requests that wait; beyond these, calls are refused, and their gateways answer for themselves."""
MOST_REMEMBERED = 8192
"""Prompts whose features are remembered: some are asked again and again."""

_Call = tuple[Sequence[PredictionRequest], "asyncio.Future[list[Prediction]]"]


class Serving:
    """The predictor that answers, off the event loop.

    Args:
        predictor: what answers until another is put in its place.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.number = 0
        self._executor = ThreadPoolExecutor(1, "predictor")
        self._waiting: list[_Call] = []
        self._num_waiting = 0
        self._worker: asyncio.Task[None] | None = None
        self._features: OrderedDict[bytes, bytes] = OrderedDict()

    def put(self, predictor: Predictor, number: int) -> None:
        """Let another answer from now on, as the version of that number."""
        self.predictor, self.number = predictor, number

    @property
    def version(self) -> str:
        """What answers: the code's version and the number of what it has learnt."""
        return f"{self.predictor.version}.{self.number}"

    async def predict(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        """One prediction for each request, in their order.

        Raises:
            ResourceExhaustedError: if too many wait already.
        """
        if self._num_waiting + len(requests) > MOST_WAITING:
            raise ResourceExhaustedError(
                f"{self._num_waiting} requests wait for their profiles, the limit is "
                f"{MOST_WAITING}; start more profilers",
                reason="PROFILER_BUSY",
                retry_after_seconds=0.1,
            )
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        self._waiting.append((requests, future))
        self._num_waiting += len(requests)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="predictions")
        return await future

    def close(self) -> None:
        """Predict no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            calls = self._next()
            asked = list(chain.from_iterable(requests for requests, _ in calls))
            try:
                found = await loop.run_in_executor(self._executor, self._predict, asked)
            except Exception as error:
                for _, future in calls:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for requests, future in calls:
                if not future.done():
                    future.set_result(found[start : start + len(requests)])
                start += len(requests)

    def _next(self) -> list[_Call]:
        calls: list[_Call] = []
        count = 0
        while self._waiting and (not calls or count + len(self._waiting[0][0]) <= MOST_AT_ONCE):
            calls.append(self._waiting.pop(0))
            count += len(calls[-1][0])
        self._num_waiting -= count
        return calls

    def _predict(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        predictor = self.predictor
        if not predictor.needs_text:
            return predictor.predict_batch(requests)
        kind = kind_of(predictor)
        keys = [_digest(kind, request.text) for request in requests]
        known = [self._features.get(key, b"") for key in keys]
        found = predictor.predict_batch(
            [
                replace(request, text="", features=features) if features else request
                for request, features in zip(requests, known, strict=True)
            ]
        )
        for key, prediction in zip(keys, found, strict=True):
            self._features[key] = prediction.features
            self._features.move_to_end(key)
        while len(self._features) > MOST_REMEMBERED:
            self._features.popitem(last=False)
        return found


def _digest(kind: str, text: str) -> bytes:
    seen = f"{kind}\n{text}".encode(errors="surrogatepass")
    return hashlib.blake2b(seen, digest_size=16).digest()
