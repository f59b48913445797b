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
from uellm.core.settings import Settings
from uellm.policy.cslo_dispatch import CsloOdbsDispatch
from uellm.policy.cslo_odbs import CsloOdbsStep
from uellm.policy.edf import EdfDispatch, EdfStep
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.past_future import PastFutureDispatch, PastFutureStep
from uellm.policy.priority import PriorityDispatch, PriorityStep
from uellm.policy.sjf import SjfDispatch, SjfStep
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
from uellm.policy.static_dispatch import StaticDispatch
from uellm.policy.views import DispatchPolicy, DispatchSettings, StepPolicy

DEFAULT_POLICY = CsloOdbsStep.name
"""At both levels."""
DISPATCH_GROUP = "uellm.dispatch_policies"
STEP_GROUP = "uellm.step_policies"

_DISPATCHERS: tuple[Any, ...] = (
    CsloOdbsDispatch,
    EdfDispatch,
    FcfsDispatch,
    PastFutureDispatch,
    PriorityDispatch,
    SjfDispatch,
)
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
class _Dispatch:
    """A built-in policy of level one, and what it is made with."""

    settings: type[Settings]
    make: Callable[[DispatchSettings, Any], DispatchPolicy]


@dataclass(frozen=True)
class _Step:
    """A built-in policy of level two, and what it is made with."""

    settings: type[Settings]
    make: Callable[[Any], StepPolicy]


def _static_dispatch(batching: Callable[[Any], Batching]) -> _Dispatch:
    kind: Any = batching
    return _Dispatch(
        kind.settings_type,
        lambda settings, options: StaticDispatch(batching(options), settings),
    )


def _static_step(batching: Callable[[Any], Batching]) -> _Step:
    kind: Any = batching
    return _Step(kind.settings_type, lambda settings: StaticStep(batching(settings)))


_DISPATCH: Mapping[str, _Dispatch] = {
    **{made.name: _Dispatch(made.settings_type, made) for made in _DISPATCHERS},
    **{made.name: _static_dispatch(made) for made in _BATCHERS},
}
_STEP: Mapping[str, _Step] = {
    **{made.name: _Step(made.settings_type, made) for made in _CONTINUOUS},
    **{made.name: _static_step(made) for made in _BATCHERS},
}


def dispatch_policies() -> list[str]:
    """Names that ``dispatch_policy`` takes."""
    return sorted({*_DISPATCH, *entry_points(group=DISPATCH_GROUP).names})


def step_policies() -> list[str]:
    """Names that ``step_policy`` takes."""
    return sorted({*_STEP, *entry_points(group=STEP_GROUP).names})


def is_built_in(name: str) -> bool:
    """Whether a policy is one of uellm's own, at both levels."""
    return name in _DISPATCH and name in _STEP


def dispatch_policy(
    name: str,
    settings: DispatchSettings | None = None,
    options: Mapping[str, object] | None = None,
) -> DispatchPolicy:
    """A policy of level one.

    Args:
        name: its name.
        settings: what all policies are made with.
        options: its own settings, by name; see ``dispatch_settings``.

    Raises:
        InvalidArgumentError: if there is none of that name, or a setting is not what it should be.
    """
    known = _DISPATCH.get(name)
    settings = settings or DispatchSettings()
    if known is None:
        make = _offered(DISPATCH_GROUP, name, dispatch_policies())
        policy: DispatchPolicy = make(settings, options) if options else make(settings)
        return policy
    return known.make(settings, known.settings.parse(options or {}))


def dispatch_settings(name: str) -> Mapping[str, tuple[object, str]]:
    """Default and description of each setting of a built-in policy of level one."""
    known = _DISPATCH.get(name)
    return known.settings.described() if known else {}


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
