"""Decisions as they are kept: what a policy saw, and what it made of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from uellm.core.errors import InvalidArgumentError
from uellm.policy.registry import dispatch_policy, step_policy
from uellm.policy.views import (
    DispatchDecision,
    DispatchPolicy,
    DispatchSettings,
    EngineView,
    QueuedView,
    QueueView,
    ReplicaView,
    StepDecision,
    StepPolicy,
)

REFUSALS = 256
"""Of a decision on a long queue so many are recorded."""


@dataclass(frozen=True, slots=True)
class DispatchPolicyUsed:
    """A policy of level one, by what makes it again.

    Attributes:
        name: its name in the registry.
        settings: what every policy is made with.
        options: its own settings, where they are not its defaults.
    """

    name: str
    settings: DispatchSettings = field(default_factory=DispatchSettings)
    options: Mapping[str, str] = field(default_factory=dict)

    def make(self) -> DispatchPolicy:
        """The policy.

        Raises:
            InvalidArgumentError: if it is not installed here.
        """
        return dispatch_policy(self.name, self.settings, self.options)

    def made(self) -> DispatchPolicy | None:
        """The policy; None if it is not installed here."""
        try:
            return self.make()
        except InvalidArgumentError:
            return None


@dataclass(frozen=True, slots=True)
class StepPolicyUsed:
    """A policy of level two, by what makes it again; see ``DispatchPolicyUsed``."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def make(self) -> StepPolicy:
        """The policy.

        Raises:
            InvalidArgumentError: if it is not installed here.
        """
        return step_policy(self.name, self.options)

    def made(self) -> StepPolicy | None:
        """The policy; None if it is not installed here."""
        try:
            return self.make()
        except InvalidArgumentError:
            return None


@dataclass(frozen=True, slots=True)
class DispatchRecord:
    """One decision of a scheduler.

    Attributes:
        now: when, in seconds since the epoch by Redis TIME.
        policy: by what.
        queue: of which queue.
        replicas: of which replicas.
        decision: what was decided.
        waiting: how many requests waited.
        truncated: too many to record: of ``queue`` and ``decision.order`` there are only the first
            of the order. Cannot be replayed.
    """

    now: float
    policy: DispatchPolicyUsed
    queue: QueueView
    replicas: tuple[ReplicaView, ...]
    decision: DispatchDecision
    waiting: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decision of an engine. Only some are recorded.

    Attributes:
        now: when, in seconds since the epoch by Redis TIME.
        replica: whose engine.
        step: steps that it had begun before.
        policy: by what.
        engine: of what.
        decision: what was decided.
        running: how many sequences had a slot.
        waiting: how many waited for one.
        truncated: the sequences are left out. Cannot be replayed.
    """

    now: float
    replica: str
    step: int
    policy: StepPolicyUsed
    engine: EngineView
    decision: StepDecision
    running: int = 0
    waiting: int = 0
    truncated: bool = False


Record = DispatchRecord | StepRecord


def dispatch_record(
    policy: DispatchPolicyUsed,
    queue: QueueView,
    replicas: Sequence[ReplicaView],
    now: float,
    decision: DispatchDecision,
    *,
    most: int,
    find: Callable[[str], QueuedView],
) -> DispatchRecord:
    """The record of a decision; of a long queue the first of the order, and who is refused.

    Args:
        policy: that decided.
        queue: what waited.
        replicas: where it could go.
        now: when.
        decision: what was decided.
        most: so many requests that go on waiting are recorded.
        find: the waiting request of an id of the decision.
    """
    waiting = len(queue.waiting)
    if waiting <= most:
        return DispatchRecord(now, policy, queue, tuple(replicas), decision, waiting)
    # Asked for some of it, an order puts itself together whole.
    order = tuple(decision.order[:most]) if most else ()
    near = frozenset(order)
    promises = {i: p for i, p in decision.promises.items() if i in near}
    refusals = decision.refusals[:REFUSALS]
    first = QueueView(
        # Of who is refused there is soon no other record.
        waiting=tuple(map(find, [*order, *(refusal.request_id for refusal in refusals)])),
        unpromised=near & queue.unpromised,
        horizon=queue.horizon,
        margin=queue.margin,
        price=queue.price,
    )
    kept = DispatchDecision(
        dispatches=decision.dispatches,
        promises=promises,
        refusals=refusals,
        let_in={i: cost for i, cost in decision.let_in.items() if i in near},
        order=order,
        reconsider_at=decision.reconsider_at,
    )
    return DispatchRecord(now, policy, first, tuple(replicas), kept, waiting, truncated=True)
