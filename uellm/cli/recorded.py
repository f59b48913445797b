"""Commands that look at what was decided: why, decisions, replay."""

from pathlib import Path
from typing import Annotated

import typer

from uellm.cli.durations import parse_duration
from uellm.cli.options import Json, Redis, Server

File = Annotated[Path, typer.Argument(help="What `uellm decisions` wrote; - reads standard input.")]


def why(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="The id of the request.")],
    server: Server = "",
    as_json: Json = False,
) -> None:
    """Explain why a request was late, slow or refused, and what would have helped."""
    from uellm.cli import explaining
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import gateways

    raise typer.Exit(run(explaining.why(gateways(server), request_id, as_json=as_json)))


def decisions(
    model: Annotated[str, typer.Argument(help="Served name.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to, as JSON lines; - is standard output.")
    ] = Path("-"),
    since: Annotated[
        float | None,
        typer.Option(parser=parse_duration, metavar="DURATION", help="Only the latest: 10s, 5m."),
    ] = None,
    redis: Redis = "",
) -> None:
    """Write down what was decided of a model's requests, of all tenants, to replay it."""
    from uellm.cli import replaying
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(replaying.export(redis_url(redis), model, out, since)))


def replay(
    file: File,
    policy: Annotated[
        str, typer.Option(help="Decide by this policy instead; by default by the recorded one.")
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting to decide with instead; may be given several times.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide again what was recorded, and show what comes out otherwise.

    By the recorded policies nothing may: exit status 1 and the first difference if it does.
    """
    from uellm.cli import replaying

    raise typer.Exit(replaying.replay(file, policy, settings or (), as_json=as_json))
