"""The step policies by name."""

from uellm.core.errors import ConfigurationError
from uellm.policy.fcfs import FcfsStep
from uellm.policy.views import StepPolicy

STEP_POLICIES: dict[str, StepPolicy] = {policy.name: policy for policy in (FcfsStep(),)}
"""Every policy of level two."""


def step_policy(name: str) -> StepPolicy:
    """The policy of that name; the empty name means "fcfs".

    Raises:
        ConfigurationError: if there is none.
    """
    try:
        return STEP_POLICIES[name or "fcfs"]
    except KeyError:
        known = ", ".join(sorted(STEP_POLICIES))
        raise ConfigurationError(f"no step policy {name!r}; there are: {known}") from None
