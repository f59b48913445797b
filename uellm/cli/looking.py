"""Commands that look at a mesh: models, health, version."""

import sys
from typing import Annotated

import typer

from uellm import __version__
from uellm.cli.asking import Json, Server


def models(server: Server = "", as_json: Json = False) -> None:
    """List the models being served."""
    from uellm.cli import overview
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import gateways

    raise typer.Exit(run(overview.models(gateways(server), as_json=as_json)))


def health(
    redis: Annotated[
        str,
        typer.Option(
            envvar="UELLM_REDIS_URL",
            help="The mesh's Redis; by default that of the mesh that `uellm up` runs here.",
        ),
    ] = "",
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Ask only the service at this address.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Ask every service how it is; exit with 0 only if all are there and serving."""
    from uellm.cli import overview
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import check_address, redis_url

    if address:
        check_address(address, "--address")
        raise typer.Exit(run(overview.probe(address, as_json=as_json)))
    raise typer.Exit(run(overview.health(redis_url(redis), as_json=as_json)))


def version() -> None:
    """Print the version."""
    sys.stdout.write(f"uellm {__version__}\n")
