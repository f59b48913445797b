"""Builders of what step policies look at."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from uellm.core.cost import StepCost
from uellm.core.request import LEVELS, Priority, QuantileFunction, ResourceProfile, Slo
from uellm.policy.registry import step_policy
from uellm.policy.views import EngineView, SequenceView

NOW = 1000.0
COST = StepCost(overhead=0.002, weights=0.018, per_token=0.0004, per_context=7e-7)
"""Of a 7B model on a GPU of 24 GB; its knee is 45."""


def lengths(median: float, spread: float = 0.5) -> QuantileFunction:
    """An answer's length: at least one, with its median in the middle."""
    return QuantileFunction(
        LEVELS, [max(median * (1 + spread * (2 * level - 1)), 1.0) for level in LEVELS]
    )


def sequence(name: str, **facts: Any) -> SequenceView:
    """A sequence of 10 prompt tokens and about 20 more, accepted and arrived at NOW - 1."""
    prompt = facts.pop("prompt", 10)
    accepted = facts.pop("accepted", NOW - 1)
    slo = Slo(
        accepted_at=accepted,
        deadline_at=facts.pop("deadline_at", None),
        ttft_at=facts.pop("ttft_at", None),
        tpot_seconds=facts.pop("tpot", None),
        priority=facts.pop("priority", Priority.NORMAL),
    )
    output = facts.get("output_tokens", 0)
    defaults: dict[str, Any] = {
        "prompt_tokens": prompt,
        "computed_tokens": 0,
        "output_tokens": 0,
        "max_output_tokens": 500,
        "reserve_tokens": prompt + output + 30,
        "rank": 0,
        "arrived_at": accepted,
    }
    profile = ResourceProfile(prompt, lengths(facts.pop("tokens", 20.0), facts.pop("spread", 0.5)))
    return SequenceView(name, slo, profile, **{**defaults, **facts})


def decoding(name: str, output: int = 1, **facts: Any) -> SequenceView:
    """A sequence that has so many tokens of its answer."""
    prompt = facts.get("prompt", 10)
    return sequence(
        name,
        output_tokens=output,
        computed_tokens=prompt + output - 1,
        **{"first_token_at": NOW - 0.5, **facts},
    )


def engine(running: list[SequenceView], waiting: list[SequenceView], **facts: Any) -> EngineView:
    """An engine with four slots and 1,000 tokens of KV room."""
    held = sum(s.computed_tokens for s in running)
    total = facts.pop("kv_tokens_total", 1000)
    defaults: dict[str, Any] = {"slots": 4, "max_chunk_tokens": 256, "cost": COST}
    return EngineView(
        running=running,
        waiting=waiting,
        kv_tokens_free=facts.pop("kv_tokens_free", max(total - held, 0)),
        kv_tokens_total=total,
        **{**defaults, **facts},
    )


_SLOS: dict[str, st.SearchStrategy[Any]] = {
    "deadline_at": st.one_of(st.none(), st.floats(NOW - 5, NOW + 60)),
    "ttft_at": st.one_of(st.none(), st.floats(NOW - 5, NOW + 20)),
    "tpot": st.one_of(st.none(), st.floats(0.001, 0.5)),
    "priority": st.sampled_from(Priority),
    "accepted": st.floats(NOW - 900, NOW),
    "tokens": st.floats(1, 300),
    "preemptions": st.integers(0, 4),
    "tenant": st.sampled_from(["a", "b"]),
}
WAITING = st.lists(
    st.builds(sequence, st.just("unnamed"), prompt=st.integers(1, 300), **_SLOS), max_size=20
)
RUNNING = st.lists(
    st.builds(
        decoding,
        st.just("unnamed"),
        st.integers(1, 300),
        prompt=st.integers(1, 300),
        **_SLOS,
    ),
    max_size=6,
)


@st.composite
def engines(draw: st.DrawFn) -> EngineView:
    """Engines that may be full, and whose sequences may have outgrown the KV room."""
    named = [replace(s, request_id=f"r{i}") for i, s in enumerate(draw(RUNNING))]
    waiting = [replace(s, request_id=f"w{i:02d}") for i, s in enumerate(draw(WAITING))]
    return engine(
        named,
        waiting,
        slots=max(draw(st.integers(1, 8)), len(named)),
        kv_tokens_total=draw(st.sampled_from([300, 1000, 5000])),
        block_tokens=draw(st.sampled_from([1, 16])),
        cost=draw(st.sampled_from([None, COST])),
    )


def admitted(name: str, *waiting: object, **facts: object) -> tuple[str, ...]:
    """Whom a policy admits into an engine in which nothing runs."""
    slots = facts.pop("slots", 1)
    return (
        step_policy(name)
        .step(
            engine([], list(waiting), slots=slots, **facts),  # type: ignore[arg-type]
            NOW,
        )
        .admit
    )
