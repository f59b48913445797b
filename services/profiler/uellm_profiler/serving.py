"""Predictions for calls that come at the same time, by what was learnt last."""

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from uellm.core.errors import ResourceExhaustedError
from uellm.prediction.interface import Prediction, PredictionRequest, Predictor
from uellm_profiler.pacing import Asked, Pace, effort_of, next_turn
from uellm_profiler.store import kind_of

MOST_WAITING = 2048
"""Requests that wait; beyond these, calls are refused, and their gateways answer for themselves."""
MOST_REMEMBERED = 8192
"""Prompts whose features are remembered: some are asked again and again."""


class _Call:
    """A call, and what is known of its answer."""

    def __init__(self, count: int) -> None:
        self.found: list[Prediction | None] = [None] * count
        self.left = count
        self.done: asyncio.Future[list[Prediction | None]]
        self.done = asyncio.get_running_loop().create_future()

    def answer(self, place: int, prediction: Prediction | None) -> None:
        """Take one answer; with the last the call has ended."""
        self.found[place] = prediction
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(self.found)


@dataclass(slots=True)
class _Waiting:
    """One request of a call."""

    call: _Call
    place: int
    request: PredictionRequest
    asked: Asked
    digest: bytes


class Serving:
    """The predictor that answers, off the event loop.

    Args:
        predictor: what answers until another is put in its place.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.number = 0
        self._executor = ThreadPoolExecutor(1, "predictor")
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._features: OrderedDict[tuple[str, bytes], bytes] = OrderedDict()
        self._pace = Pace()

    def put(self, predictor: Predictor, number: int) -> None:
        """Let another answer from now on, as the version of that number."""
        self.predictor, self.number = predictor, number

    @property
    def version(self) -> str:
        """What answers: the code's version and the number of what it has learnt."""
        return f"{self.predictor.version}.{self.number}"

    async def predict(
        self, requests: Sequence[PredictionRequest], seconds: float | None = None
    ) -> list[Prediction | None]:
        """One prediction for each request, in their order; None where there is none in time.

        Args:
            requests: of one call.
            seconds: how long the caller waits; None: as long as it takes.

        Raises:
            ResourceExhaustedError: if too many wait already.
        """
        if len(self._waiting) + len(requests) > MOST_WAITING:
            raise ResourceExhaustedError(
                f"{len(self._waiting)} requests wait for their profiles, the limit is "
                f"{MOST_WAITING}; start more profilers",
                reason="PROFILER_BUSY",
                retry_after_seconds=0.1,
            )
        if not requests:
            return []
        call = _Call(len(requests))
        now = time.perf_counter()
        deadline = math.inf if seconds is None else now + seconds
        reads = self.predictor.needs_text
        self._waiting += [
            _Waiting(
                call,
                place,
                request,
                Asked(deadline, effort_of(request.text) if reads else 0.0, now),
                _digest(request.text) if reads else b"",
            )
            for place, request in enumerate(requests)
        ]
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="predictions")
        return await call.done

    def close(self) -> None:
        """Predict no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while self._waiting:
            refused, hurried, read = self._next()
            for each in refused:
                each.call.answer(each.place, None)
            await self._answer(hurried, hurried=True)
            await self._answer(read, hurried=False)

    def _next(self) -> tuple[list[_Waiting], list[_Waiting], list[_Waiting]]:
        # Whoever waits no longer is not worked for: those that still do would wait, too.
        waiting = [each for each in self._waiting if not each.call.done.done()]
        kind = kind_of(self.predictor)
        known = [self._features.get((kind, each.digest)) for each in waiting]
        asked = [
            replace(each.asked, effort=0.0) if features else each.asked
            for each, features in zip(waiting, known, strict=True)
        ]
        turn = next_turn(asked, self._pace, time.perf_counter())
        if turn.hopeless:
            self._pace.doubted()
        for i in turn.hurried:
            if features := known[i]:
                waiting[i].request = replace(waiting[i].request, text="", features=features)
        taken = {*turn.refused, *turn.hurried, *turn.read}
        self._waiting = [each for i, each in enumerate(waiting) if i not in taken]
        refused, hurried, read = (
            [waiting[i] for i in places] for places in (turn.refused, turn.hurried, turn.read)
        )
        return refused, hurried, read

    async def _answer(self, those: Sequence[_Waiting], *, hurried: bool) -> None:
        """Predict some together, and tell their calls."""
        if not those:
            return
        predictor, loop = self.predictor, asyncio.get_running_loop()
        asked = [replace(each.request, hurried=hurried) for each in those]
        began = time.perf_counter()
        try:
            found = await loop.run_in_executor(self._executor, predictor.predict_batch, asked)
        except Exception as error:
            for each in those:
                if not each.call.done.done():
                    each.call.done.set_exception(error)
            return
        seconds = time.perf_counter() - began
        if hurried:
            self._pace.was_answering(len(those), seconds)
        else:
            self._pace.was_reading(sum(each.asked.effort for each in those), seconds)
        for each, prediction in zip(those, found, strict=True):
            each.call.answer(each.place, prediction)
            if prediction.features and (not hurried or each.request.features):
                self._remember((kind_of(predictor), each.digest), prediction.features)

    def _remember(self, key: tuple[str, bytes], features: bytes) -> None:
        self._features[key] = features
        self._features.move_to_end(key)
        if len(self._features) > MOST_REMEMBERED:
            self._features.popitem(last=False)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
