"""Builders of what dispatch policies look at."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from uellm.core.request import LEVELS, Priority, QuantileFunction, ResourceProfile, Slo
from uellm.policy import registry
from uellm.policy.views import (
    DispatchDecision,
    DispatchPolicy,
    DispatchSettings,
    InFlightView,
    QueuedView,
    ReplicaView,
)

NOW = 1000.0


def lengths(median: float) -> QuantileFunction:
    return QuantileFunction(LEVELS, [median * (0.5 + level) for level in LEVELS])


def queued(name: str, deadline: float | None = None, **facts: Any) -> QueuedView:
    """A request accepted at NOW - 1, or at ``accepted``, due ``deadline`` seconds after NOW."""
    slo = Slo(
        accepted_at=facts.pop("accepted", NOW - 1),
        deadline_at=None if deadline is None else NOW + deadline,
        ttft_at=facts.pop("ttft_at", None),
        priority=facts.pop("priority", Priority.NORMAL),
    )
    profile = ResourceProfile(facts.pop("prompt", 10), lengths(facts.pop("tokens", 20.0)))
    return QueuedView(name, slo, profile, **facts)


def replica(name: str = "r0", slots: int = 4, in_flight: int = 0, **facts: Any) -> ReplicaView:
    running = tuple(
        InFlightView(f"{name}-{i}", NOW - 0.1, 10, 20.0, 40.0) for i in range(in_flight)
    )
    defaults: dict[str, Any] = {
        "epoch": 1,
        "kv_tokens_total": 0,
        "prefill_seconds_per_token": 0.001,
        "decode_step_seconds": 0.01,
    }
    return ReplicaView(name, slots=slots, **{"in_flight": running, **defaults, **facts})


def sent(decision: DispatchDecision) -> list[str]:
    return [request_id for batch in decision.dispatches for request_id in batch.request_ids]


REQUESTS = st.builds(
    queued,
    st.just("unnamed"),
    st.one_of(st.none(), st.floats(-5, 50)),
    accepted=st.floats(NOW - 100, NOW),
    prompt=st.integers(1, 500),
    tokens=st.floats(1, 300),
    priority=st.sampled_from(Priority),
    refusable=st.booleans(),
    strikes=st.sampled_from([0, 0, 0, 1]),
    max_tokens=st.sampled_from([0, 50]),
)

QUEUES = st.lists(REQUESTS, max_size=25).map(
    lambda requests: [replace(r, request_id=f"q{i:02d}") for i, r in enumerate(requests)]
)

REPLICAS = st.lists(
    st.builds(
        replica,
        st.just("unnamed"),
        st.integers(0, 5),
        st.integers(0, 7),
        kv_tokens_total=st.sampled_from([0, 100, 1000]),
        decode_step_seconds=st.sampled_from([0.0, 0.01, 0.5]),
    ),
    max_size=3,
).map(lambda views: [replace(view, replica=f"r{i}") for i, view in enumerate(views)])


def cslo(**options: object) -> DispatchPolicy:
    """As with several replicas, of which tests need but one."""
    options = {"ahead_alone": 0, **options}
    return registry.dispatch_policy("cslo-odbs", DispatchSettings(lookahead_requests=0), options)
