"""A policy as it is chosen for a model: one name and its settings, for both levels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from uellm.core.errors import InvalidArgumentError
from uellm.policy.registry import (
    dispatch_policies,
    dispatch_policy,
    dispatch_settings,
    is_built_in,
    step_policies,
    step_policy,
    step_settings,
)
from uellm.policy.views import DispatchPolicy, DispatchSettings, StepPolicy

DISPATCH, STEP = "dispatch", "step"
LEVELS = (DISPATCH, STEP)
EXECUTIONS = ("continuous", "static")
"""How engines compose steps: sequences come and go between them, or in padded batches."""

_Described = Mapping[str, tuple[object, str]]
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class PolicyChoice:
    """Which policy decides.

    Attributes:
        name: its name, at every level that has one of it.
        settings: its settings by name, where they are not its defaults; ``dispatch.NAME`` and
            ``step.NAME`` are for one level alone.
        execution: one of ``EXECUTIONS``; "": the engine's default.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    execution: str = ""

    def check(self) -> None:
        """Make it at all its levels.

        Raises:
            InvalidArgumentError: naming what is not known or beyond its limit.
        """
        if self.execution not in ("", *EXECUTIONS):
            raise InvalidArgumentError(
                f"execution: {self.execution!r}: one of {', '.join(EXECUTIONS)}", field="execution"
            )
        levels = levels_of(self.name)
        if not levels:
            raise InvalidArgumentError(
                f"policy: no {self.name!r}; available: {', '.join(policies())}", field="policy"
            )
        self._check_names(levels)
        self.dispatch()
        self.step()

    def _check_names(self, levels: tuple[str, ...]) -> None:
        if not is_built_in(self.name):
            # It is another package's: that checks them itself.
            return
        known = {level: _DESCRIBED[level](self.name) for level in levels}
        names = {name for described in known.values() for name in described}
        names |= {f"{level}.{name}" for level, described in known.items() for name in described}
        for name in self.settings:
            if name not in names:
                level = name.partition(".")[0]
                if level in known:
                    there, more = {*known[level]}, f"at level {level}"
                else:
                    there = {name for described in known.values() for name in described}
                    more = "with dispatch. or step. before it for one level alone"
                raise InvalidArgumentError(
                    f"{name}: no such setting of {self.name}; available: "
                    f"{', '.join(sorted(there)) or 'none'}; {more}",
                    field=name,
                )

    def at(self, level: str) -> dict[str, str]:
        """Its settings at one level."""
        described = _DESCRIBED[level](self.name)
        common = {
            name: value
            for name, value in self.settings.items()
            if name in described or not (is_built_in(self.name) or name.startswith(_PREFIXES))
        }
        prefix = f"{level}."
        return common | {
            name.removeprefix(prefix): value
            for name, value in self.settings.items()
            if name.startswith(prefix)
        }

    def dispatch(self, settings: DispatchSettings | None = None) -> DispatchPolicy | None:
        """The policy of level one; None if there is none of that name.

        Args:
            settings: what all policies are made with.

        Raises:
            InvalidArgumentError: if a setting is not what it should be.
        """
        if self.name not in dispatch_policies():
            return None
        return _made(self.name, lambda: dispatch_policy(self.name, settings, self.at(DISPATCH)))

    def step(self) -> StepPolicy | None:
        """The policy of level two; None if there is none of that name.

        Raises:
            InvalidArgumentError: if a setting is not what it should be.
        """
        if self.name not in step_policies():
            return None
        return _made(self.name, lambda: step_policy(self.name, self.at(STEP)))


_DESCRIBED: Mapping[str, Callable[[str], _Described]] = {
    DISPATCH: dispatch_settings,
    STEP: step_settings,
}
_PREFIXES = tuple(f"{level}." for level in LEVELS)


def policies() -> list[str]:
    """Names of all policies, whatever their levels."""
    return sorted({*dispatch_policies(), *step_policies()})


def levels_of(name: str) -> tuple[str, ...]:
    """The levels at which there is a policy of that name."""
    named = {DISPATCH: dispatch_policies(), STEP: step_policies()}
    return tuple(level for level in LEVELS if name in named[level])


def settings_of(choice: PolicyChoice, level: str) -> dict[str, tuple[str, str, str]]:
    """Value, default and description of each setting of a built-in policy at one level."""
    given = choice.at(level)
    return {
        name: (str(given.get(name, default)), str(default), description)
        for name, (default, description) in _DESCRIBED[level](choice.name).items()
    }


def _made(name: str, make: Callable[[], _Made]) -> _Made:
    """What ``make`` makes; a package's own errors are those of the settings."""
    try:
        return make()
    except (TypeError, ValueError, LookupError) as error:
        raise InvalidArgumentError(f"settings: {name}: {error}", field="settings") from error
