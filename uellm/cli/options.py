"""Options that several commands have."""

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
