"""Commands that choose how a model's requests are scheduled: list, show, set, reset."""

from typing import Annotated

import typer

from uellm.cli.options import Json, Redis

app = typer.Typer(
    no_args_is_help=True, help="List scheduling policies; show or choose that of a model."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's served name.")]


@app.command(name="list")
def list_policies(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="A policy, for its settings.")] = "",
    as_json: Json = False,
) -> None:
    """List the policies that are installed, or the settings of one."""
    from uellm.cli import choosing

    raise typer.Exit(choosing.list_policies(name, as_json=as_json))


@app.command()
def show(model: Model, redis: Redis = "", as_json: Json = False) -> None:
    """Show which policy is in force for a model, and its settings."""
    from uellm.cli import choosing
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(choosing.show(redis_url(redis), model, as_json=as_json)))


@app.command(name="set")
def choose(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A policy; see `policy list`.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings of the policy (dispatch.KEY or step.KEY: at one level alone), and "
            "what requests of a class need that do not say: class.interactive.ttft=2s, "
            "with batch, normal or interactive, and deadline, ttft or tpot.",
        ),
    ] = None,
    execution: Annotated[
        str,
        typer.Option(help="continuous or static; by default as the workers are set."),
    ] = "",
    redis: Redis = "",
) -> None:
    """Choose the policy of a model, while it serves; what is not given has its default."""
    from uellm.cli import choosing
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    request = choosing.request(model, name, settings or (), execution)
    raise typer.Exit(run(choosing.choose(redis_url(redis), request)))


@app.command()
def reset(model: Model, redis: Redis = "") -> None:
    """Go back to the policy that the mesh's services are set to."""
    from uellm.cli import choosing
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(choosing.choose(redis_url(redis), choosing.request(model, "", (), ""))))
