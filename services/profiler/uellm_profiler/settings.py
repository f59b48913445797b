"""What a profiler is told."""

from typing import ClassVar

from pydantic import Field

from uellm.config import ServiceSettings


class ProfilerSettings(ServiceSettings):
    """Settings of a profiler."""

    role: ClassVar[str] = "profiler"

    poll_seconds: float = Field(
        1.0, gt=0, description="How often a profiler looks for new and withdrawn deployments."
    )
