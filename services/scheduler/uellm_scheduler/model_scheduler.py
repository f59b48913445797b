"""One model's requests, while this scheduler owns the model."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count

from redis.exceptions import RedisError

from uellm import logs
from uellm.class_defaults import check_class_defaults
from uellm.convert import profile_from_proto, slo_from_proto
from uellm.core.errors import AbortedError, UnavailableError
from uellm.core.request import Promise
from uellm.faults import pause
from uellm.policy.views import QueuedView, QueueView, Refusal
from uellm.policy.waiting import line_of
from uellm.service import RETRY_SECONDS, Context
from uellm.streams.decisions import DecisionLog
from uellm.streams.messages import Door, ReplicaRoute
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, queue_pb2, scheduler_pb2
from uellm_scheduler.book import REVISE_SECONDS, Book
from uellm_scheduler.effects import Effects
from uellm_scheduler.inbox import Inbox
from uellm_scheduler.keeping import Keeping
from uellm_scheduler.metering import Meter
from uellm_scheduler.policy import PolicyInForce, choice_of
from uellm_scheduler.recorder import Recorder
from uellm_scheduler.recovery import recover
from uellm_scheduler.settings import SchedulerSettings
from uellm_scheduler.upkeep import Timer, Upkeep

POLL_SECONDS = 0.25
"""How often replicas are looked at while there is work."""
DOOR_KEPT_MS = 1500
"""For so long gateways refuse at the door without hearing of it again."""
HORIZON = 256
"""So many are promised something in one decision, at least: a crowd is by and by."""
REVISING_SHARE = 0.2
"""Share of its time that a scheduler spends on decisions that revise promises, at most."""
LONG_SECONDS = 0.005
"""After a decision that took longer than this, as much time is left to everything else."""
LOAD_SECONDS = 1.0
"""How often the load is said."""
LOAD_KEPT_SECONDS = 5.0
"""How long it stands beyond a lease when nobody says it any more."""

_log = logs.logger("scheduler")


class ModelScheduler:
    """The owner's loop: wake, bring the book up to date, decide, carry out.

    Args:
        context: the service's.
        settings: the service's.
        queue: the model's queues.
        token: the fencing token that ownership came with.

    Attributes:
        replicas: ids of the model's replicas, by its deployment; kept current by the ownership.
        book: who waits and who was sent where.
        order: ids of the waiting requests as last ordered.
        in_force: the policy.
        routes: the replicas as last read.
        withdrawn: the model is not deployed any more; kept current by the ownership.
    """

    def __init__(
        self, context: Context, settings: SchedulerSettings, queue: SchedulerQueue, token: int
    ) -> None:
        self.model = queue.model
        self.token = token
        self.replicas: Sequence[str] = ()
        self.book = Book()
        self.order: Sequence[str] = ()
        self.routes: dict[str, ReplicaRoute] = {}
        self.withdrawn = False
        self._context = context
        self._settings = settings
        self._queue = queue
        self.in_force = PolicyInForce(settings)
        self._recorder = Recorder(DecisionLog(context.redis, queue.model), settings)
        self._keeping = Keeping(queue, self.in_force.policy.name)
        self._meter = Meter(settings.load_window_seconds)
        self._saying = Timer(LOAD_SECONDS)
        self._turned_away_place = "0"
        self._inbox: Inbox | None = None
        self._away = False
        # Goes on after a recovery, so that no two batches of a term have one name.
        self._numbers = count(1)
        self._estimates = count(1)
        self._polling = Timer(POLL_SECONDS)
        self._dooring = Timer(POLL_SECONDS)
        self._following = Timer(POLL_SECONDS)
        self._reconsider_at: float | None = None
        self._revise_at = 0.0

    async def run(self) -> None:
        """Schedule until another scheduler owns the model; Redis may come and go."""
        while True:
            lost, error, fault = False, "", None
            try:
                await self._serve()
            except* AbortedError:
                lost = True
            except* (RedisError, OSError) as group:
                error = str(_first_leaf(group))
            except* Exception as group:
                fault = group
            if lost:
                _log.warning("another scheduler owns the model now", model=self.model)
                return
            if fault is not None:
                # It begins again from what Redis has; other models are not concerned.
                failures = self._context.faults.note(f"scheduling {self.model}", fault)
                await asyncio.sleep(pause(failures))
                continue
            if not self._away:
                _log.warning("Redis fails; trying on", model=self.model, error=error)
            self._away = True
            await asyncio.sleep(RETRY_SECONDS)

    async def hand_over(self) -> None:
        """Leave what was learnt to the next owner, once this one has stopped."""
        # Who has been followed by another has nothing to say any more.
        with suppress(AbortedError):
            await self._keeping.save(self.token, self._context.clock.now(), at_once=True)

    async def _serve(self) -> None:
        consumer = self._settings.identity
        self.book, place = await recover(self._queue, self.token, consumer)
        self._away = False
        everybody = chain(self.book.in_flight.values(), self.book.waiting.values())
        self._meter.arrived(
            sorted((each.view for each in everybody), key=lambda view: view.slo.accepted_at)
        )
        self._decide_by(await self._queue.policy())
        await self._keeping.load()
        book = self.book
        inbox = self._inbox = Inbox(self._queue, consumer, place, self._inbox)
        term = await self._queue.term()
        effects = Effects(
            self._queue,
            book,
            token=self.token,
            batch_names=(f"{term}.{n}" for n in self._numbers),
            lease_ms=self._settings.lease_ms,
        )
        upkeep = Upkeep(self._queue, book, effects, self.token, self._settings)
        _log.info(
            "scheduling", model=self.model, waiting=len(book.waiting), sent=len(book.in_flight)
        )
        async with asyncio.TaskGroup() as readers:
            readers.create_task(inbox.read_requests())
            readers.create_task(inbox.read_completions())
            readers.create_task(self._recorder.run())
            while True:
                await inbox.wait(self._pause(upkeep))
                heard = inbox.empty_into(book)
                self._keeping.heard(each.event for each in heard.ended)
                self._meter.arrived(heard.waiting)
                self._meter.ended(heard.ended)
                await self._keeping.save(self.token, self._context.clock.now())
                await self._say_load()
                if upkeep.reaping.seconds_left == 0:
                    self._decide_by(await self._queue.policy())
                await upkeep.tend(self._context.clock.now())
                if await self._read_routes(inbox):
                    upkeep.reaping.hasten()
                    await upkeep.tend(self._context.clock.now())
                if self.withdrawn and book.waiting:
                    await self._give_up_waiting(effects)
                await self._say_door()
                progressed = await self._follow()
                if book.waiting or book.unpromised(1) or progressed:
                    await self._decide(effects, inbox)

    def _decide_by(self, record: common_pb2.ModelPolicy | None) -> None:
        """Take on the policy that was chosen, and what is known of its promises."""
        self.in_force.follow(record)
        self._keeping.under(self.in_force.policy.name)

    def _pause(self, upkeep: Upkeep) -> float:
        seconds = min(upkeep.reaping.seconds_left, self._saying.seconds_left)
        if self.book.in_flight:
            seconds = min(seconds, self._following.seconds_left)
        # Who was sent without a promise is to be given one as well.
        if self.book.waiting or self.book.unpromised(1):
            seconds = min(seconds, self._polling.seconds_left)
            if self._reconsider_at is not None:
                seconds = min(seconds, self._reconsider_at - self._context.clock.now())
        return max(seconds, 0.001)

    async def _follow(self) -> bool:
        """See how far those are that were sent, if it is time; True if some have begun."""
        if not self.book.in_flight or not self._following.due():
            return False
        sent = list(self.book.in_flight)
        self.book.progressed(await self._queue.progress(sent), self._context.clock.now())
        answered = self.book.answered()
        self._keeping.began(answered)
        return bool(answered)

    async def _say_door(self) -> None:
        """Tell gateways to refuse some at the door, if it is time to."""
        admissions = self._keeping.admissions
        # Where nobody waits nothing is decided, and yet the door has to open again.
        admissions.advance(self._context.clock.now())
        share = admissions.shedding.share
        if share < 1 and self._dooring.due():
            door = Door(share, admissions.retry_seconds, admissions.feasible_seconds)
            await self._queue.keep_door(self.token, door, DOOR_KEPT_MS)

    async def _say_load(self) -> None:
        """Tell the deployer what is asked of the model, if it is time to."""
        if not self._saying.due():
            return
        now, replicas = self._context.clock.now(), self.book.replica_views(self.routes)
        ahead = sum(max(0, len(view.in_flight) - view.slots) for view in replicas)
        waiting = len(self.book.waiting) + ahead
        self._meter.sample(now, waits=waiting > 0 and bool(replicas))
        place, turned_away = await self._queue.turned_away(self._turned_away_place)
        self._turned_away_place = place
        self._meter.turned_away(turned_away)
        keep_ms = round(1000 * LOAD_KEPT_SECONDS) + self._settings.lease_ms
        await self._queue.offer(self.token, self._meter.load(now, waiting), keep_ms)

    async def _give_up_waiting(self, effects: Effects) -> None:
        """End what waits for a model that is gone: its clients would wait for ever."""
        if any(route.state == "READY" for route in self.routes.values()):
            return
        now = self._context.clock.now()
        await effects.fail(
            list(self.book.waiting.values()),
            "MODEL_WITHDRAWN",
            f"{self.model} was withdrawn while the request waited; deploy it again, or ask another "
            "model",
            now,
        )

    async def _read_routes(self, inbox: Inbox) -> bool:
        """Look at the replicas if it is time; True if one was re-formed under another epoch."""
        if not (inbox.routed or self._polling.seconds_left == 0):
            return False
        inbox.routed = False
        self._polling.due()
        sent_to = {ticket.replica for ticket in self.book.in_flight.values()}
        before = self.routes
        self.routes = await self._queue.routes(sorted({*self.replicas, *sent_to}))
        for name, route in self.routes.items():
            if name in before:
                _keep_estimates(route.report, before[name].report)
        return any(
            name in before and before[name].epoch != route.epoch
            for name, route in self.routes.items()
        )

    async def _decide(self, effects: Effects, inbox: Inbox) -> None:
        book, now, began = self.book, self._context.clock.now(), time.monotonic()
        near = [*book.unpromised(HORIZON), *self.order[:HORIZON]]
        replicas = book.replica_views(self.routes, len(self.replicas), near)
        revise = began >= self._revise_at
        room = sum(max(0, view.slots - len(view.in_flight)) for view in replicas)
        horizon = max(HORIZON, 2 * room)
        self._keeping.advance(now)
        queue = self._keeping.admissions.seen_by(
            book.queue_view(now, revise=revise, horizon=horizon, experience=self._keeping.record)
        )
        decision = self.in_force.policy.dispatch(queue, replicas, now)
        self._recorder.note(self.in_force.choice, queue, replicas, now, decision, book.view)
        decided = time.monotonic()
        seconds = decided - began
        if revise:
            self._revise_at = began + max(REVISE_SECONDS, seconds / REVISING_SHARE)
        self.order = decision.order
        self._reconsider_at = decision.reconsider_at
        self._keeping.promised((i for i in decision.promises if i in queue.unpromised), now)
        self._keeping.admissions.decided(queue, decision, book.waiting_view, now)
        if revise:
            self._keeping.seen(book.answered(), now)
        async with asyncio.TaskGroup() as tasks:
            refused = tasks.create_task(effects.refuse(decision.refusals, now))
            carried_out = tasks.create_task(
                effects.carry_out(decision.promises, decision.dispatches, now)
            )
        inbox.note(refused.result())
        if not carried_out.result():
            inbox.routed = True
            inbox.wake()
        if seconds > LONG_SECONDS:
            # What Redis took of it was left to the others already.
            await asyncio.sleep(max(seconds - (time.monotonic() - decided), 0.0))

    # ---- asked by the servicer -----------------------------------------------------------------

    def estimate(
        self, asked: scheduler_pb2.SchedulerServiceEstimateRequest
    ) -> tuple[Promise, Refusal | None]:
        """What would be promised to a request that came now, and how it would be refused.

        Raises:
            UnavailableError: if no replica takes requests.
        """
        now = self._context.clock.now()
        view = QueuedView(
            # As each try, it draws a lot of its own where not all are let in.
            f"estimate:{next(self._estimates)}",
            slo_from_proto(asked.slo, now),
            profile_from_proto(asked.profile),
            tenant=asked.tenant,
            max_tokens=asked.max_tokens,
            refusable=asked.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE,
        )
        # As before a decision; and what was asked is forgotten, though nobody may come for hours.
        self._keeping.advance(now)
        queue = self._keeping.admissions.seen_by(
            QueueView(
                line_of(self.book.line(), [view]),
                unpromised=frozenset({view.request_id}),
                experience=self._keeping.record,
            )
        )
        replicas = self.book.replica_views(self.routes, len(self.replicas))
        decision = self.in_force.policy.dispatch(queue, replicas, now)
        refusal = next((r for r in decision.refusals if r.request_id == view.request_id), None)
        promise = refusal.promise if refusal else decision.promises.get(view.request_id)
        if promise is None:
            raise UnavailableError(
                f"no replica of {self.model} takes requests at present; try again",
                reason="NO_REPLICA",
                retry_after_seconds=1.0,
            )
        return promise, refusal

    async def set_policy(self, record: common_pb2.ModelPolicy | None) -> str:
        """Change the policy from the next decision on; None: back to the services' defaults.

        Returns:
            The name of the one before.

        Raises:
            InvalidArgumentError: if there is none of that name, or a setting is not what it should
                be.
        """
        if record is not None:
            choice_of(record).check()
            check_class_defaults(record)
        previous = self.in_force.policy.name
        await self._queue.set_policy(record)
        self._decide_by(record)
        if self._inbox is not None:
            self._inbox.wake()
        return previous


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _keep_estimates(report: queue_pb2.ReplicaReport, before: queue_pb2.ReplicaReport) -> None:
    """Go on with what was known of a replica until it has measured it itself."""
    for name in (
        "slots",
        "kv_tokens_total",
        "prefill_seconds_per_token",
        "decode_step_seconds",
    ):
        if not getattr(report, name):
            setattr(report, name, getattr(before, name))
    if not report.HasField("cost") and before.HasField("cost"):
        report.cost.CopyFrom(before.cost)
