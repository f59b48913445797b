"""Commands that change what a mesh serves: deploy, undeploy; and status, which shows it."""

from pathlib import Path
from typing import Annotated

import typer

from uellm.cli.durations import parse_duration
from uellm.cli.options import Excluded, Json, Pins, Redis, finite

Wait = Annotated[bool, typer.Option(help="Wait until it is so, and show how far it is.")]


def deploy(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Directory or hub id, or NAME=SOURCE."),
    ] = "",
    approve: Annotated[
        str,
        typer.Option(metavar="NAME", help="Carry out the proposed changes of a deployment."),
    ] = "",
    name: Annotated[str, typer.Option(help="Served name; by default of the source.")] = "",
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies; with --objective goodput the fewest.")
    ] = 1,
    most_replicas: Annotated[
        int, typer.Option(min=0, help="With goodput, the most copies; 0: what there is room for.")
    ] = 0,
    rate: Annotated[
        float,
        typer.Option(
            min=0,
            callback=finite,
            help="With goodput, requests per second that are expected anyway.",
        ),
    ] = 0.0,
    stages: Annotated[int, typer.Option(min=0, help="Stages per copy; 0: what is best.")] = 0,
    objective: Annotated[
        str,
        typer.Option(
            help="helr: fewest devices that keep --slo; he: fewest that fit; lr: least latency; "
            "throughput; goodput: as many copies as the load needs; even: equal shares. By default "
            "as the deployer is set."
        ),
    ] = "",
    slo: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration,
            metavar="DURATION",
            help="Longest time that a full batch may take from prompt to last token.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Expected of a request, 90 % quantile; 0: 512.")
    ] = 0,
    output_tokens: Annotated[
        int, typer.Option(min=0, help="Expected of a request, 90 % quantile; 0: 128.")
    ] = 0,
    slots: Annotated[
        int, typer.Option(min=0, help="Most sequences at once per copy; 0: the default.")
    ] = 0,
    kv_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="KV room per copy, in tokens of all sequences; 0: all slots full."
        ),
    ] = 0,
    max_model_len: Annotated[
        int, typer.Option(min=0, help="Longest context granted, in tokens; 0: the model's.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default as the devices like.")
    ] = "",
    pin: Pins = None,
    exclude: Excluded = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE=COST",
            help="What using a device costs, for helr and he; 1 by default; repeatable.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Place it as `uellm plan --json` says, or stages with device_id, first_layer and "
            "last_layer, as YAML or JSON.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]SOURCE", help="LoRA adapter, in peft's format; repeatable."),
    ] = None,
    grow: Annotated[
        bool,
        typer.Option(
            "--grow",
            help="Begin with fewer stages than --stages where devices lack, and grow onto those "
            "that come.",
        ),
    ] = False,
    wait: Wait = True,
    redis: Redis = "",
) -> None:
    """Have a model served: show where it goes, then how far it is, until it takes requests."""
    from uellm.cli import deployments
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    if bool(model) == bool(approve):
        raise typer.BadParameter("name a MODEL to deploy, or a deployment with --approve NAME")
    if approve:
        raise typer.Exit(run(deployments.approve(redis_url(redis), approve, wait=wait)))
    request = deployments.plan_request(
        model,
        name,
        adapters=adapter or (),
        pins=pin or (),
        excluded=exclude or (),
        costs=cost or (),
    )
    said: dict[str, float | str] = {
        "replicas": replicas,
        "most_replicas": most_replicas,
        "requests_per_second": rate,
        "stages": stages,
        "objective": objective,
        "slo_seconds": slo or 0.0,
        "slots": slots,
        "kv_tokens": kv_tokens,
        "max_tokens": max_model_len,
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    for field, value in said.items():
        deployments.say(request, field, value)
    if plan is not None:
        deployments.as_told(request, plan)
    raise typer.Exit(run(deployments.deploy(redis_url(redis), request, wait=wait, grow=grow)))


def undeploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Served name; `uellm status` lists.")],
    wait: Wait = True,
    redis: Redis = "",
) -> None:
    """Stop serving a model, once the answers that it is giving are complete."""
    from uellm.cli import deployments
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(deployments.undeploy(redis_url(redis), name, wait=wait)))


def status(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Served name; by default all.")
    ] = "",
    redis: Redis = "",
    as_json: Json = False,
) -> None:
    """Show what is served where, how fast it was to be and is, and what waits for what."""
    from uellm.cli import deployments
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(deployments.status(redis_url(redis), name, as_json=as_json)))
