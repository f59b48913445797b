"""Policies by name: the built-in ones, and those that installed packages offer.

A package offers one by an entry point: in group ``uellm.dispatch_policies`` something that makes a
``DispatchPolicy`` of ``DispatchSettings``, in ``uellm.step_policies`` something that makes a
``StepPolicy`` of nothing. Settings of its own come as a further mapping from names to values, when
there are any. The entry point's name is the policy's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from uellm.core.errors import InvalidArgumentError
from uellm.policy.cslo_odbs import CsloOdbsStep
from uellm.policy.edf import EdfDispatch, EdfStep
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.past_future import PastFutureStep
from uellm.policy.priority import PriorityStep
from uellm.policy.settings import PolicySettings
from uellm.policy.sjf import SjfStep
from uellm.policy.static import (
    S3,
    Batching,
    CodedSloOdbs,
    Fifo,
    Morphling,
    Odbs,
    SloDbs,
    SloOdbs,
    StaticStep,
)
from uellm.policy.views import DispatchPolicy, DispatchSettings, StepPolicy

DISPATCH_GROUP = "uellm.dispatch_policies"
STEP_GROUP = "uellm.step_policies"

_DISPATCH: Mapping[str, Callable[[DispatchSettings], DispatchPolicy]] = {
    "edf": EdfDispatch,
    "fcfs": FcfsDispatch,
}
_CONTINUOUS: tuple[Any, ...] = (
    CsloOdbsStep,
    EdfStep,
    FcfsStep,
    PastFutureStep,
    PriorityStep,
    SjfStep,
)
_BATCHERS: tuple[Any, ...] = (CodedSloOdbs, Fifo, Morphling, Odbs, S3, SloDbs, SloOdbs)


@dataclass(frozen=True)
class _Kind:
    """A built-in policy of level two, and what it is made with."""

    settings: type[PolicySettings]
    make: Callable[[Any], StepPolicy]


def _batched(batching: Callable[[Any], Batching]) -> Callable[[Any], StepPolicy]:
    return lambda settings: StaticStep(batching(settings))


_STEP: Mapping[str, _Kind] = {
    **{made.name: _Kind(made.settings_type, made) for made in _CONTINUOUS},
    **{made.name: _Kind(made.settings_type, _batched(made)) for made in _BATCHERS},
}


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


def step_policy(name: str, settings: Mapping[str, object] | None = None) -> StepPolicy:
    """A policy of level two.

    Args:
        name: its name.
        settings: its own, by name; see ``step_settings``.

    Raises:
        InvalidArgumentError: if there is none of that name, or a setting is not what it should be.
    """
    known = _STEP.get(name)
    if known is None:
        make = _offered(STEP_GROUP, name, step_policies())
        policy: StepPolicy = make(settings) if settings else make()
        return policy
    return known.make(known.settings.parse(settings or {}))


def step_settings(name: str) -> Mapping[str, tuple[object, str]]:
    """Default and description of each setting of a built-in policy of level two."""
    known = _STEP.get(name)
    return known.settings.described() if known else {}


def _offered(group: str, name: str, available: list[str]) -> Callable[..., Any]:
    for entry_point in entry_points(group=group):
        if entry_point.name == name:
            make: Callable[..., Any] = entry_point.load()
            return make
    raise InvalidArgumentError(
        f"policy: no {name!r}; available: {', '.join(available)}", field="policy"
    )
