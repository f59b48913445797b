"""What a gateway is told."""

from typing import ClassVar

from pydantic import Field

from uellm.config import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Settings of one gateway."""

    role: ClassVar[str] = "gateway"

    profile_budget_seconds: float = Field(
        0.1,
        gt=0,
        description="Longest time to wait for a profiler before the built-in prior answers.",
    )
    accept_seconds: float = Field(
        2.0, gt=0, description="Longest time to try to make a request durable."
    )
    max_request_bytes: int = Field(
        8 << 20, gt=0, description="Largest request that is taken, in bytes."
    )
    waiting_requests: int = Field(
        10_000, gt=0, description="Most requests of a model that wait before new ones are refused."
    )
    waiting_tokens: int = Field(
        20_000_000,
        gt=0,
        description="Most tokens (prompts and expected answers) of a model that wait before new "
        "requests are refused.",
    )
    tenant_requests: int = Field(
        10_000, gt=0, description="Most unfinished requests of one tenant and model."
    )
    opening_requests: int = Field(
        4096,
        gt=0,
        description="Most requests at once that this gateway checks, has profiled and makes "
        "durable; further ones are refused before anything is done for them.",
    )
    stream_interval_seconds: float = Field(
        0.02,
        ge=0,
        description="Shortest time between two messages of one stream, the first token and the "
        "end excepted: tokens that come faster share a message.",
    )
    buffered_entries: int = Field(
        512,
        gt=0,
        description="Most events that are held for a client that reads slowly; beyond it they "
        "are dropped here and read from the log again.",
    )
