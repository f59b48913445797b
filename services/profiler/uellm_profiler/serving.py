"""Predictions for calls that come at the same time, by what was learnt last."""

import asyncio
import hashlib
import time
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
AT_ONCE_SECONDS = 0.04
"""How long those that are predicted together should take. A gateway waits 100 ms: for those before,
and for its own."""
FIRST_CAREFUL = 16
"""Prompts of those that are not hurried at first; then as many as there is time for."""
_FEWER = 0.75

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
        self._careful = FIRST_CAREFUL

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
            call = self._waiting.pop(0)
            self._num_waiting -= len(call[0])
            # Whoever waits no longer is not worked for: those that still do would wait, too.
            if not call[1].done():
                calls.append(call)
                count += len(call[0])
        return calls

    def _predict(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        predictor = self.predictor
        if not predictor.needs_text:
            return predictor.predict_batch(requests)
        kind = kind_of(predictor)
        keys = [_digest(kind, request.text) for request in requests]
        known = [self._features.get(key, b"") for key in keys]
        asked: list[PredictionRequest] = []
        unknown = 0
        for request, features in zip(requests, known, strict=True):
            if features:
                asked.append(replace(request, text="", features=features))
            else:
                asked.append(replace(request, hurried=unknown >= self._careful))
                unknown += 1
        began = time.perf_counter()
        found = predictor.predict_batch(asked)
        if unknown:
            self._pace(time.perf_counter() - began, any(each.hurried for each in asked))
        for key, request, prediction in zip(keys, asked, found, strict=True):
            if not request.hurried:
                self._features[key] = prediction.features
                self._features.move_to_end(key)
        while len(self._features) > MOST_REMEMBERED:
            self._features.popitem(last=False)
        return found

    def _pace(self, seconds: float, hurried: bool) -> None:
        """Have fewer predicted carefully if that took too long, more if there was time."""
        if seconds > AT_ONCE_SECONDS:
            self._careful = max(int(_FEWER * self._careful), 1)
        elif hurried:
            self._careful += 1 + self._careful // 8


def _digest(kind: str, text: str) -> bytes:
    seen = f"{kind}\n{text}".encode(errors="surrogatepass")
    return hashlib.blake2b(seen, digest_size=16).digest()
