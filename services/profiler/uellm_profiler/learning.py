"""One profiler learns from what finished, and keeps what it learnt for all; the others read it.

What serves is a copy, put in its place whole: nothing learns while it predicts.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Container, Sequence

from uellm import logs
from uellm.convert import timestamp
from uellm.core.errors import AbortedError, InvalidArgumentError
from uellm.leadership import Leadership
from uellm.prediction.contest import Contest, Verdict
from uellm.prediction.interface import GREEDY, CompletionFacts, Predictor, State
from uellm.service import Context
from uellm.v1 import common_pb2, profiler_pb2, queue_pb2
from uellm_profiler.fits import fitted
from uellm_profiler.models import Models
from uellm_profiler.serving import Serving
from uellm_profiler.settings import ProfilerSettings
from uellm_profiler.store import PREFIX, Learnt, Past, Store, kind_of

READ_COUNT = 256
BLOCK_MS = 200
KEEPING_SHARE = 0.1
"""Share of its time that a learner spends on keeping what it learnt, at most."""
PAST_SECONDS_PER_SECOND = 10.0
"""All that was learnt is kept so much less often than what predictions need of it."""
STANDING_BY_SECONDS = 0.2
MOST_PLACES = 1024
"""Models whose places are known; beyond these, withdrawn ones are forgotten."""
_TEACHES = {
    common_pb2.FINISH_REASON_STOP,
    common_pb2.FINISH_REASON_LENGTH,
    common_pb2.FINISH_REASON_CANCELLED,
}

_log = logs.logger("learning")


def facts_of(event: queue_pb2.CompletionEvent) -> CompletionFacts | None:
    """What a completion teaches about lengths; None: nothing (refused, expired, failed)."""
    if event.finish_reason not in _TEACHES:
        return None
    cancelled = event.finish_reason == common_pb2.FINISH_REASON_CANCELLED
    return CompletionFacts(
        model=event.model,
        adapter=event.adapter,
        regime=event.sampling_regime or GREEDY,
        prompt_tokens=event.prompt_tokens,
        output_tokens=event.output_tokens,
        censored=event.censored or cancelled,
        features=event.features,
    )


class Reader:
    """Puts what was learnt last in its place, as soon as it is kept."""

    def __init__(
        self, store: Store, serving: Serving, make: Callable[[], Predictor], poll_seconds: float
    ) -> None:
        self._store = store
        self._serving = serving
        self._make = make
        self._poll_seconds = poll_seconds
        self._revision = 0

    async def poll(self) -> None:
        """Look, then wait a while."""
        if await self._store.revision() != self._revision:
            await self._read()
        await asyncio.sleep(self._poll_seconds)

    async def _read(self) -> None:
        try:
            learnt = await self._store.learnt()
            if learnt is None:
                return
            self._revision = learnt.revision
            predictor = self._make()
            # What another kind learnt is of no use here; its learner will be followed by one of
            # this kind, or this profiler be replaced.
            if learnt.kind == kind_of(predictor):
                await asyncio.to_thread(predictor.load, learnt.state)
                self._serving.put(predictor, learnt.number)
        except InvalidArgumentError as error:
            _log.warning("what was learnt cannot be read; going on as before", error=error.message)


class Learner:
    """Learns, while it holds the lease.

    Args:
        context: the service's.
        settings: the service's.
        store: where it is kept.
        models: whose completions to read.
        begin: state of what it begins with, where nothing has been kept.
        make: a predictor that has learnt nothing.
    """

    def __init__(
        self,
        context: Context,
        settings: ProfilerSettings,
        store: Store,
        models: Models,
        begin: State,
        make: Callable[[], Predictor],
    ) -> None:
        self.leadership = Leadership(context, PREFIX)
        self._clock = context.clock
        self._settings = settings
        self._store = store
        self._models = models
        self._begin = begin
        self._make = make
        self._term = 0
        self._turning = asyncio.Lock()
        self._settled = False
        self._contest = self._new_contest()
        self._number = self._revision = 0
        self._unkept: profiler_pb2.PredictorVersion | None = None
        self._places: dict[str, str] = {}
        self._fitting: asyncio.Task[State] | None = None
        self._fitting_since = self._keep_at = self._keep_past_at = 0.0
        self._changed = self._past_changed = False

    async def turn(self) -> None:
        """Learn from what finished, or stand by."""
        async with self._turning:
            await self._turn()

    async def _turn(self) -> None:
        leadership = self.leadership
        if not leadership.held or self._settled:
            await asyncio.sleep(STANDING_BY_SECONDS)
            return
        try:
            if leadership.term != self._term:
                await self._take_up()
                self._term = leadership.term
            await self._obey()
            await self._learn()
            await self._fit()
            if self._due():
                await self._keep()
        except AbortedError:
            # Another took over; what it has not read it reads again.
            self._term = 0

    def _due(self) -> bool:
        now = time.monotonic()
        return (
            self._unkept is not None
            or (self._changed and now >= self._keep_at)
            or (self._past_changed and now >= self._keep_past_at)
        )

    async def settle(self) -> None:
        """Keep all that was learnt, for whoever learns next; learn no more.

        A turn that is under way ends first: broken off, its thread would go on learning from what
        the next learner reads again, beside what is kept.
        """
        async with self._turning:
            self._settled = True
            if self.leadership.held and self.leadership.term == self._term and self._past_changed:
                with contextlib.suppress(AbortedError):
                    await self._keep(whole=True)

    def _new_contest(self) -> Contest:
        return Contest(self._make, outcomes=self._settings.challenge_outcomes)

    async def _take_up(self) -> None:
        """Go on where the learner before this one was."""
        await self.stop_fitting()
        self._contest, self._unkept = self._new_contest(), None
        kind = kind_of(self._contest.champion)
        past = None
        try:
            learnt = await self._store.learnt()
            self._number, self._revision = (learnt.number, learnt.revision) if learnt else (0, 0)
            past = await self._store.past()
            if past is not None and past.kind == kind:
                await asyncio.to_thread(self._contest.serve, past.state)
                self._places = dict(past.places)
                _log.info("learning on", version=self._number)
                return
        except InvalidArgumentError as error:
            _log.warning("what was learnt cannot be read; learning anew", error=error.message)
        # Completions are kept for a while: what another predictor learnt from teaches this one.
        await asyncio.to_thread(self._contest.serve, self._begin)
        self._places = {}
        await self._begin_version(f"{kind} learns from the beginning")

    async def _obey(self) -> None:
        """Let an earlier version serve, if someone asked for it."""
        number = await self._store.wanted()
        if not number:
            return
        try:
            state = await self._store.state(number)
            if state is None:
                raise InvalidArgumentError(f"version {number} is not kept", field="number")
            await asyncio.to_thread(self._contest.serve, state)
        except InvalidArgumentError as error:
            _log.warning("keeping the version", wanted=number, error=error.message)
            return
        await self.stop_fitting()
        await self._begin_version(f"rolled back to version {number}")

    async def _learn(self) -> None:
        models = self._models.profiles
        if not models:
            await asyncio.sleep(STANDING_BY_SECONDS)
            return
        found = await self._store.completions(self._places, models, READ_COUNT, BLOCK_MS)
        if not found:
            return
        facts = [one for _, _, event in found if (one := facts_of(event)) is not None]
        verdict = await asyncio.to_thread(self._contest.observe, facts)
        self._note(found, models)
        self._changed = self._past_changed = True
        if verdict is not None:
            await self._judged(verdict)

    def _note(
        self, found: Sequence[tuple[str, str, queue_pb2.CompletionEvent]], deployed: Container[str]
    ) -> None:
        """How far each model was read; the latest last."""
        for model, place, _ in found:
            self._places.pop(model, None)
            self._places[model] = place
        withdrawn = [model for model in self._places if model not in deployed]
        for model in withdrawn[: max(len(self._places) - MOST_PLACES, 0)]:
            del self._places[model]

    async def _judged(self, verdict: Verdict) -> None:
        losses = f"{verdict.challenger_loss:.4f} against {verdict.champion_loss:.4f}"
        if not verdict.promoted:
            _log.info("a new fit was no better", loss=losses, outcomes=verdict.outcomes)
            return
        await self._begin_version(
            f"predicted {verdict.outcomes} answers better than the one before", verdict
        )

    async def _fit(self) -> None:
        """Begin a fit that is due; have one that is made judged."""
        if self._fitting is None:
            refit = self._contest.due()
            if refit is not None:
                self._fitting = asyncio.create_task(fitted(refit), name="fitting")
                self._fitting_since = time.monotonic()
        elif self._fitting.done():
            fitting, self._fitting = self._fitting, None
            if (error := fitting.exception()) is not None:
                # What serves goes on serving; another is due after as many outcomes as a challenge.
                _log.error("a fit failed", exc_info=error)
                self._contest.rest()
                return
            seconds = time.monotonic() - self._fitting_since
            _log.info("fitted anew; to be judged", seconds=round(seconds, 1))
            await asyncio.to_thread(self._contest.challenge, fitting.result())

    async def stop_fitting(self) -> None:
        """Give a fit up, if one is under way."""
        fitting, self._fitting = self._fitting, None
        if fitting is not None:
            fitting.cancel()
            await asyncio.gather(fitting, return_exceptions=True)

    async def _begin_version(self, reason: str, verdict: Verdict | None = None) -> None:
        """Keep what serves from now on as a version of its own."""
        self._number += 1
        champion = self._contest.champion
        # Until it is: Redis may be away now, and it serves already.
        self._unkept = profiler_pb2.PredictorVersion(
            number=self._number,
            predictor=champion.name,
            predictor_version=champion.version,
            served_at=timestamp(self._clock.now()),
            reason=reason,
            outcomes=verdict.outcomes if verdict else 0,
            loss=verdict.challenger_loss if verdict else 0.0,
            loss_before=verdict.champion_loss if verdict else 0.0,
        )
        _log.info("another version serves", version=self._number, reason=reason)
        await self._keep()

    async def _keep(self, *, whole: bool = False) -> None:
        began = time.monotonic()
        champion, version = self._contest.champion, self._unkept
        kind, past = kind_of(champion), None
        if version is not None or whole or began >= self._keep_past_at:
            past = Past(kind, await asyncio.to_thread(champion.state), dict(self._places))
        self._revision += 1
        serving = await asyncio.to_thread(champion.serving_state)
        learnt = Learnt(kind, self._number, self._revision, serving)
        await self._store.keep(self.leadership.token, learnt, past, version)
        self._changed, self._unkept = False, None
        seconds = self._settings.keep_seconds
        rest = max(seconds, (time.monotonic() - began) / KEEPING_SHARE)
        self._keep_at = began + rest
        if past is not None:
            self._past_changed = False
            self._keep_past_at = began + max(rest, PAST_SECONDS_PER_SECOND * seconds)
