"""What an explanation is made of, and what it is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from uellm.core.request import Promise, ResourceProfile, Slo


@dataclass(frozen=True, slots=True)
class Facts:
    """What is stored of a request itself.

    Attributes:
        request_id: its id.
        tenant: whose it is, and for whom it is explained.
        state: of its record, for instance "QUEUED".
        slo: when it was needed.
        profile: what it was expected to need.
        promise: the latest promise, or None.
        dispatched_at: when it last left for a replica, or None.
        first_token_at: when its first token was logged, or None.
        finished_at: when it ended, or None.
        output_tokens: of its answer, so far.
        refused: it ended at admission, because it could not be in time.
        message: why it did not end well, in words; "": it did, or goes on.
        attempts: how often it was started.
    """

    request_id: str
    tenant: str
    state: str
    slo: Slo
    profile: ResourceProfile
    promise: Promise | None = None
    dispatched_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    output_tokens: int = 0
    refused: bool = False
    message: str = ""
    attempts: int = 0

    @property
    def answered_at(self) -> float | None:
        """When its whole answer was there; None: it is not, or it ended without one."""
        return self.finished_at if self.state == "DONE" else None


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the time between acceptance and end: queue, engine, prefill, decode or restart.

    Attributes:
        name: which.
        began_at: in seconds since the epoch.
        seconds: how long it took, or has taken so far.
        expected_seconds: how long the first promise took it to take, or None.
    """

    name: str
    began_at: float
    seconds: float
    expected_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a request, or was decided of it."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that made a request wait, or take longer than promised.

    Attributes:
        kind: for machines.
        text: for people.
        seconds: how much time it is to blame for, where that can be told.
        requests: who went ahead for this reason, by names that the tenant may see.
    """

    kind: str
    text: str
    seconds: float | None = None
    requests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """What a recorded decision comes to without some of the requests that it saw.

    Attributes:
        without: these requests, by names that the tenant may see.
        seconds_earlier: of the estimated finish, or of a slot in the engine.
        text: the same for people.
        decided_at: when the decision was made.
    """

    without: tuple[str, ...]
    seconds_earlier: float
    text: str
    decided_at: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request was answered when it was.

    Attributes:
        summary: in a sentence or two.
        promise: the first promise that is on record, or None.
        phases: where the time went.
        events: what happened, oldest first.
        causes: what held it up, the largest first.
        counterfactuals: what would have helped, the largest first.
        notes: what is missing here.
    """

    summary: str
    promise: Promise | None
    phases: tuple[Phase, ...]
    events: tuple[Event, ...]
    causes: tuple[Cause, ...]
    counterfactuals: tuple[Counterfactual, ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Names:
    """What a tenant may call requests: its own by their ids, others by a number.

    Attributes:
        tenant: who asks.
        tenants: whose each request is; one that is not in it is taken to be another's.
    """

    tenant: str
    tenants: Mapping[str, str]
    _others: dict[str, str] = field(default_factory=dict)

    def of(self, request_id: str) -> str:
        """The name of a request."""
        if self.tenants.get(request_id) == self.tenant:
            return request_id
        label = f"another tenant's request {len(self._others) + 1}"
        return self._others.setdefault(request_id, label)
