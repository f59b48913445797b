"""What a scheduler is told."""

from typing import ClassVar

from pydantic import Field

from uellm.config import ServiceSettings
from uellm.policy.registry import DEFAULT_POLICY
from uellm.policy.views import DispatchSettings


class SchedulerSettings(ServiceSettings):
    """Settings of a scheduler."""

    role: ClassVar[str] = "scheduler"

    policy: str = Field(
        DEFAULT_POLICY,
        description="Dispatch policy of models for which none was chosen while running: one of "
        "`uellm policy list`, which installed packages add to.",
    )
    lookahead_requests: int = Field(
        2,
        ge=0,
        description="How many requests a replica is sent beyond its free slots. Enough to bridge "
        "the milliseconds from a finish to the next dispatch; more would bind requests early.",
    )
    kv_headroom: float = Field(
        1.1,
        gt=0,
        description="How far the predicted KV peaks (90 % quantile) of what a replica is sent may "
        "add up beyond its KV room (1: not beyond).",
    )
    least_chance: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="A request whose caller prefers a refusal to being late is let in beside "
        "others only if it would be in time even with an answer as long as this quantile of its "
        "predicted length. Lower: more are let in, and more of them are late.",
    )
    most_strikes: int = Field(
        3,
        ge=1,
        description="A request is given up when its replica died this many times in a row while "
        "it was running, without one new token.",
    )
    most_attempts: int = Field(
        10,
        ge=1,
        description="A request is given up after this many starts in a row without one new token, "
        "whatever their end.",
    )
    load_window_seconds: float = Field(
        30.0,
        gt=0,
        description="Rates, lengths and attainment of a model's load are those of so many latest "
        "seconds; `uellm status` shows them, and the objective goodput plans by them.",
    )
    recorded_requests: int = Field(
        256,
        ge=1,
        description="Of a longer queue than this, decisions are recorded with so many first of the "
        "order only, and with who is refused; such a record explains, but cannot be replayed.",
    )

    @property
    def dispatch_settings(self) -> DispatchSettings:
        """What policies are made with."""
        return DispatchSettings(self.lookahead_requests, self.kv_headroom, self.least_chance)

    @property
    def lease_ms(self) -> int:
        """The lease of an owner, and of a replica on what it was sent."""
        return max(1, round(self.lease_seconds * 1000))

    @property
    def renew_seconds(self) -> float:
        """How often leases are renewed and judged: five times within one."""
        return self.lease_seconds / 5
