"""Commands that look at a mesh: models, health, topology, version."""

import sys
from typing import Annotated

import typer

from uellm import __version__
from uellm.cli.durations import parse_duration
from uellm.cli.options import Json, Redis, Server


def models(server: Server = "", as_json: Json = False) -> None:
    """List the models being served."""
    from uellm.cli import overview
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import gateways

    raise typer.Exit(run(overview.models(gateways(server), as_json=as_json)))


def health(
    redis: Redis = "",
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


def topology(
    redis: Redis = "",
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure what is idle anew, which takes seconds.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="The served model that layers are measured of; by default the only one that is."
        ),
    ] = "",
    timeout: Annotated[
        float,
        typer.Option(
            parser=parse_duration,
            metavar="DURATION",
            help="How long to wait; measuring ends before.",
        ),
    ] = "60s",  # type: ignore[assignment]
    as_json: Json = False,
    as_yaml: Annotated[
        bool,
        typer.Option("--yaml", help="As a file that UELLM_DEPLOYER_TOPOLOGY_FILE may name."),
    ] = False,
) -> None:
    """Show devices, the ways between them, and how fast both are."""
    from uellm.cli import topology as command
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    if as_json and as_yaml:
        raise typer.BadParameter("--json and --yaml: choose one")
    raise typer.Exit(
        run(
            command.show(
                redis_url(redis),
                probe=probe,
                model=model,
                timeout=timeout,
                form="json" if as_json else "yaml" if as_yaml else "table",
            )
        )
    )


def version() -> None:
    """Print the version."""
    sys.stdout.write(f"uellm {__version__}\n")
