"""What a policy may look at, and what it may decide.

Times are seconds since the epoch by Redis TIME; durations are seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol, TypeVar

from uellm.core.cost import StepCost
from uellm.core.request import Promise, ResourceProfile, Slo
from uellm.policy.prospects import Forecasts, Prospects

NOT_RECORDED = "not recorded"
"""Marks a field that records of decisions leave out: the decision shows what came of it."""

# ---- level one: the scheduler ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueuedView:
    """A request that waits in the scheduler.

    Attributes:
        request_id: its id.
        slo: when it is needed.
        profile: what it will need.
        tenant: whose it is.
        max_tokens: cap on its answer.
        refusable: its caller asked to be refused when its deadline cannot be met.
        resume_tokens: output tokens already logged by an earlier attempt; to be prefilled.
        attempt: earlier starts; 0 for a new request.
        strikes: how often in a row it was running, without one new token, when its replica died;
            from 1 on it is a suspect and runs alone.
    """

    request_id: str
    slo: Slo
    profile: ResourceProfile
    tenant: str = "local"
    max_tokens: int = 0
    refusable: bool = False
    resume_tokens: int = 0
    attempt: int = 0
    strikes: int = 0


class Experience(Protocol):
    """What is known of how forecasts came true."""

    def prospects(self, forecasts: Forecasts, now: float) -> Prospects:
        """What can be promised, given what would be forecast."""
        ...


@dataclass(frozen=True, slots=True)
class QueueView:
    """The waiting requests of one model, oldest first.

    Attributes:
        waiting: all of them.
        unpromised: ids of requests that have not been given a promise yet; they wait, or were sent
            before their promise could be recorded.
        promised: the latest promise's median finish of those whose promise may be revised now,
            whether they wait or were sent.
        horizon: of those that have no promise so many are given one, the first of the order, and
            beside them some of the oldest and those that are let in; the others are for the next
            decisions. None: all.
        margin: so much longer than forecast, as a share, those may take that are let in; see
            ``uellm.policy.margin``.
        price: what one of those may cost; see ``uellm.policy.price``.
        experience: how promises were kept; None: nothing is known of that.
    """

    waiting: Sequence[QueuedView]
    unpromised: frozenset[str] = frozenset()
    promised: Mapping[str, float] = field(default_factory=dict)
    horizon: int | None = None
    margin: float = 0.1
    price: float = inf
    experience: Experience | None = field(
        default=None, compare=False, metadata={NOT_RECORDED: True}
    )


@dataclass(frozen=True, slots=True)
class InFlightView:
    """A request that was dispatched and has not ended, as its scheduler knows it.

    Attributes:
        request_id: its id.
        dispatched_at: when it left for its replica.
        prompt_tokens: tokens to prefill.
        output_p50: tokens it will still generate from there: median.
        output_p90: 90 % of the time fewer.
        alone: it is a suspect; nothing may run beside it.
        tenant: whose it is.
        accepted_at: when it became durable; infinite if that is not known.
        request: as it waited, or None if that is not known: it is taken to be before all others.
    """

    request_id: str
    dispatched_at: float
    prompt_tokens: int
    output_p50: float
    output_p90: float
    alone: bool = False
    tenant: str = "local"
    accepted_at: float = inf
    request: QueuedView | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """How far the answer to a request that was sent has come.

    Attributes:
        tokens: of it that are there, those of earlier replicas included.
        first_token_at: when the first of them came.
    """

    tokens: int
    first_token_at: float


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica that takes requests.

    Attributes:
        replica: its id.
        epoch: the placement it runs under.
        slots: most sequences that run at once.
        in_flight: dispatched and not ended.
        kv_tokens_total: KV room in all.
        prefill_seconds_per_token: estimated or reported.
        decode_step_seconds: estimated or reported, of a step at the present batch.
        reported_at: when the replica last reported; 0 if it has not.
        cached: prompt tokens that its KV cache is expected to hold already, by request id.
        cost: what its steps take, where that is known.
        others_to_come: the model has more replicas, which take no requests at present.
        answered: how far those have come, of what it was sent, that have begun here; by request id.
        answered_at: when that was looked at.
    """

    replica: str
    epoch: int
    slots: int
    in_flight: Sequence[InFlightView]
    kv_tokens_total: int
    prefill_seconds_per_token: float
    decode_step_seconds: float
    reported_at: float = 0.0
    cached: Mapping[str, int] = field(default_factory=dict)
    cost: StepCost | None = None
    others_to_come: bool = False
    answered: Mapping[str, Answered] = field(default_factory=dict)
    answered_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send a batch to a replica. The ids are in the policy's order."""

    replica: str
    epoch: int
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """End a request at admission, or because it expired while it waited.

    Attributes:
        request_id: whose.
        expired: its time passed while it waited; otherwise it was found infeasible.
        message: why, in plain words.
        promise: carries the earliest feasible finish, when one is known.
        retry_after_seconds: when the same request may be in time; None: not as things are.
    """

    request_id: str
    expired: bool
    message: str
    promise: Promise | None = None
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DispatchDecision:
    """What a scheduler is to carry out, and when to ask again.

    Attributes:
        dispatches: batches to send now.
        promises: new or materially changed promises, by request id.
        refusals: requests to end.
        let_in: of those that are seen for the first time, would rather be refused than late, and
            stay although not everybody has a slot: the seconds that each takes one, by id.
        crowded: the same of those that the others leave no time.
        order: ids of the requests that go on waiting, first to go first.
        reconsider_at: ask again at this time even if nothing happens, or None.
    """

    dispatches: tuple[Dispatch, ...] = ()
    promises: dict[str, Promise] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    let_in: Mapping[str, float] = field(default_factory=dict)
    crowded: Mapping[str, float] = field(default_factory=dict)
    order: Sequence[str] = ()
    reconsider_at: float | None = None


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """What every policy of level one is made with.

    Attributes:
        lookahead_requests: how many requests beyond its free slots a replica is sent, so that it
            does not starve between a finish and the next dispatch.
        kv_headroom: how much of a replica's KV room the predicted peaks (90 % quantile) of what
            is in flight may add up to; a little over 1, because they do not peak together.
        least_chance: who would rather be refused than late is let in beside others if it is in
            time even with an answer as long as this share of such answers at most is.
    """

    lookahead_requests: int = 2
    kv_headroom: float = 1.1
    least_chance: float = 0.9


class DispatchPolicy(Protocol):
    """A policy of level one. Implementations hold settings, never state."""

    name: str

    def dispatch(
        self, queue: QueueView, replicas: Sequence[ReplicaView], now: float
    ) -> DispatchDecision:
        """Decide. Pure and deterministic."""
        ...


# ---- level two: the engine ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequenceView:
    """A sequence in the engine.

    Attributes:
        request_id: its id.
        slo: when it is needed.
        profile: what it will need.
        prompt_tokens: tokens to prefill in all, earlier output included.
        computed_tokens: tokens whose KV is in the cache.
        output_tokens: tokens generated in this engine.
        max_output_tokens: most that it may still generate from where it started here.
        reserve_tokens: KV room to reserve for it with its slot, in tokens; while it runs, what it
            is expected to come to. See ``uellm.policy.reserving``.
        rank: place in the scheduler's order.
        arrived_at: when it reached the engine.
        preemptions: how often it was preempted here.
        first_token_at: when its first token here came, or None.
        tenant: whose it is.
    """

    request_id: str
    slo: Slo
    profile: ResourceProfile
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    max_output_tokens: int
    reserve_tokens: int
    rank: int
    arrived_at: float
    preemptions: int = 0
    first_token_at: float | None = None
    tenant: str = "local"


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine between two steps.

    Attributes:
        running: sequences with a slot, in order of admission.
        waiting: sequences without one, oldest first.
        slots: most sequences that run at once.
        kv_tokens_free: KV room that is not reserved; prefixes that are kept in it give way.
        kv_tokens_total: KV room in all.
        max_chunk_tokens: most tokens that one step may compute.
        block_tokens: KV room is given in blocks of so many tokens.
        cost: what its steps take, where that is known.
    """

    running: Sequence[SequenceView]
    waiting: Sequence[SequenceView]
    slots: int
    kv_tokens_free: int
    kv_tokens_total: int
    max_chunk_tokens: int
    block_tokens: int = 1
    cost: StepCost | None = None


class HasId(Protocol):
    """What an engine calls a sequence."""

    @property
    def request_id(self) -> str:
        """Its id."""
        ...


Named = TypeVar("Named", bound=HasId)


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What an engine is to do in its next step, and in those after it until it asks again.

    It asks when a sequence comes, has its first token or ends, when room runs short, and at
    ``reconsider_at``; without that, before every step while somebody waits and a slot is free.

    Attributes:
        admit: ids to give a slot, in order.
        preempt: ids to take it from; they wait again and are recomputed.
        hand_back: waiting ids to return to the scheduler.
        chunk_tokens: most prefill tokens in this step, over all sequences.
        reconsider_when: waiting work that no slot or KV room is left for is looked at again when
            at least this many KV tokens are free; None: at the next arrival or finish.
        reconsider_at: ask again at this time even if nothing happens, or None.
        reserve: KV room to reserve for those that are admitted, in tokens, where it is not their
            ``reserve_tokens``. A policy that reserves less than what may come preempts itself
            when room runs out, and is asked again when less is free than the next step takes.
        prefill: ids of those whose prompts are computed first, in order; the others follow by
            admission.
    """

    admit: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()
    hand_back: tuple[str, ...] = ()
    chunk_tokens: int = 0
    reconsider_when: int | None = None
    reconsider_at: float | None = None
    reserve: Mapping[str, int] = field(default_factory=dict)
    prefill: tuple[str, ...] = ()

    def prefill_order(self, sequences: Sequence[Named]) -> Sequence[Named]:
        """Those whose prompts are to be computed, given by admission: who goes first is first."""
        if not self.prefill or len(sequences) < 2:
            return sequences
        places = {request_id: place for place, request_id in enumerate(self.prefill)}
        return sorted(sequences, key=lambda s: places.get(s.request_id, len(places)))


class StepPolicy(Protocol):
    """A policy of level two. Implementations hold settings, never state."""

    name: str

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """Decide. Pure and deterministic."""
        ...
