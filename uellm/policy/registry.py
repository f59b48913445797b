"""Policies by name: the built-in ones, and those that installed packages offer.

A package offers one by an entry point: in group ``uellm.dispatch_policies`` something that makes a
``DispatchPolicy`` of ``DispatchSettings``, in ``uellm.step_policies`` something that makes a
``StepPolicy`` of nothing. The entry point's name is the policy's.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from uellm.core.errors import InvalidArgumentError
from uellm.policy.edf import EdfDispatch
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.views import DispatchPolicy, DispatchSettings, StepPolicy

DISPATCH_GROUP = "uellm.dispatch_policies"
STEP_GROUP = "uellm.step_policies"

_DISPATCH: Mapping[str, Callable[[DispatchSettings], DispatchPolicy]] = {
    "edf": EdfDispatch,
    "fcfs": FcfsDispatch,
}
_STEP: Mapping[str, Callable[[], StepPolicy]] = {"fcfs": FcfsStep}


def dispatch_policies() -> list[str]:
    """Names that ``dispatch_policy`` takes."""
    return sorted({*_DISPATCH, *entry_points(group=DISPATCH_GROUP).names})


def step_policies() -> list[str]:
    """Names that ``step_policy`` takes."""
    return sorted({*_STEP, *entry_points(group=STEP_GROUP).names})


def dispatch_policy(name: str, settings: DispatchSettings | None = None) -> DispatchPolicy:
    """A policy of level one.

    Raises:
        InvalidArgumentError: if there is none of that name.
    """
    make = _DISPATCH.get(name) or _offered(DISPATCH_GROUP, name, dispatch_policies())
    policy: DispatchPolicy = make(settings or DispatchSettings())
    return policy


def step_policy(name: str) -> StepPolicy:
    """A policy of level two.

    Raises:
        InvalidArgumentError: if there is none of that name.
    """
    make = _STEP.get(name) or _offered(STEP_GROUP, name, step_policies())
    policy: StepPolicy = make()
    return policy


def _offered(group: str, name: str, available: list[str]) -> Callable[..., Any]:
    for entry_point in entry_points(group=group):
        if entry_point.name == name:
            make: Callable[..., Any] = entry_point.load()
            return make
    raise InvalidArgumentError(
        f"policy: no {name!r}; available: {', '.join(available)}", field="policy"
    )
