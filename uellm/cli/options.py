"""Options that several commands have."""

import re
from math import isfinite
from typing import Annotated

import typer


def finite(value: float | None) -> float | None:
    """The callback of options whose numbers are compared with others: nan is neither less nor more.

    Raises:
        typer.BadParameter: if it is not finite.
    """
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Server = Annotated[
    str,
    typer.Option(
        envvar="UELLM_SERVER",
        help="Gateway address host:port, or several with commas; "
        "by default the mesh that `uellm up` runs here.",
    ),
]
Redis = Annotated[
    str,
    typer.Option(
        envvar="UELLM_REDIS_URL",
        help="The mesh's Redis; by default that of the mesh that `uellm up` runs here.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE",
        help="Must be used; first=DEVICE, last=DEVICE; 0-11=NAME: layers on a device, worker "
        "or host; repeatable.",
    ),
]
Excluded = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Device, worker or host not to use; repeatable."),
]


def slo_missed(objective: str) -> str:
    """What is to be said of a plan that takes longer than the SLO."""
    return f"this misses --slo, which {objective} does not look at; --objective helr does"


_FLAGS = {
    "budget_seconds": "--budget",
    "in_flight": "--in-flight",
    "max_tokens": "--max-model-len",
    "output_tokens": "--output-tokens",
    "slo_seconds": "--slo",
}
"""Of `plan` and `deploy`, for fields that are named otherwise."""
_FIELD = re.compile(
    rf"\b(?:{'|'.join(_FLAGS)})\b|(?<= with )(?:batch|replicas|slots|stages)(?= \d)"
)


def in_flags(reason: str) -> str:
    """Why there is no plan, with the flags in place of the fields that a planner names."""
    return _FIELD.sub(lambda field: _FLAGS.get(field[0], f"--{field[0]}"), reason)
