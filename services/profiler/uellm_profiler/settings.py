"""What a profiler is told."""

from typing import ClassVar

from pydantic import Field

from uellm.config import ServiceSettings


class ProfilerSettings(ServiceSettings):
    """Settings of a profiler."""

    role: ClassVar[str] = "profiler"

    poll_seconds: float = Field(
        1.0,
        gt=0,
        description="How often a profiler looks for new and withdrawn deployments, and for what "
        "was learnt.",
    )
    predictor: str = Field(
        "text",
        description="What predicts: text (learns from the words of prompts), llm (listens to a "
        "language model besides; see pretrained), prior (running quantiles), or one that an "
        "installed package offers.",
    )
    pretrained: str = Field(
        "",
        description="Directory of `uellm profiler train`: what the learner begins with, in place "
        "of nothing.",
    )
    keep_seconds: float = Field(
        2.0,
        gt=0,
        description="How often the learner keeps what it learnt for the others, at most.",
    )
    challenge_outcomes: int = Field(
        200,
        ge=1,
        description="What was fitted anew serves once it has predicted so many answers better, or "
        "fewer if that is beyond doubt.",
    )
