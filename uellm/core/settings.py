"""Settings of policies and predictors: frozen dataclasses whose fields know their limits.

They come as a mapping from names to values, from a command line or a service's settings, so that
text is taken for the number that it stands for.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from typing import Any, Self

from uellm.core.errors import InvalidArgumentError

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def setting(
    default: float | bool,
    description: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of ``Settings``: a number within its limits, or a choice of two."""
    limits = {"description": description, "least": least, "above": above, "most": most}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Settings:
    """What a policy or a predictor is made with.

    Raises:
        InvalidArgumentError: if a value is beyond a limit; it names the field and the limit.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name), each.metadata)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> Self:
        """Settings by name; what is not named has its default.

        Raises:
            InvalidArgumentError: if there is no such setting, or a value is not what it should be.
        """
        known = {each.name: each for each in fields(cls)}
        parsed = {}
        for name, value in values.items():
            if name not in known:
                raise InvalidArgumentError(
                    f"{name}: no such setting; available: {', '.join(sorted(known)) or 'none'}",
                    field=name,
                )
            default = known[name].default
            assert default is not MISSING  # noqa: S101 - ``setting`` gives one
            parsed[name] = _converted(name, value, type(default))
        return cls(**parsed)

    @classmethod
    def described(cls) -> dict[str, tuple[object, str]]:
        """Default and description of each setting, by name."""
        return {each.name: (each.default, each.metadata["description"]) for each in fields(cls)}


def _converted(name: str, value: object, kind: type) -> object:
    """A value as its setting's type."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
    elif not isinstance(value, bool) and isinstance(value, str | int | float):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if kind is float and isfinite(number):
            return number
        if kind is int and number.is_integer():
            return int(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise InvalidArgumentError(f"{name}: {value!r} is not {wanted}", field=name)


def _check(name: str, value: float, limits: Mapping[str, Any]) -> None:
    least, above, most = limits["least"], limits["above"], limits["most"]
    if not isfinite(value):
        problem = "a finite number"
    elif least is not None and value < least:
        problem = f"at least {least:g}"
    elif above is not None and value <= above:
        problem = f"above {above:g}"
    elif most is not None and value > most:
        problem = f"at most {most:g}"
    else:
        return
    raise InvalidArgumentError(f"{name}: {value:g} must be {problem}", field=name)
