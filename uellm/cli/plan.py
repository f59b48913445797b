"""Command: plan. Where a model would go, without a GPU and without a mesh."""

from pathlib import Path
from typing import Annotated, cast

import typer

from uellm.cli.durations import parse_duration, parse_limit
from uellm.cli.options import Excluded, Json, Pins, finite

MOST_SEQUENCES = 1 << 20
"""Of a copy; more would not fit the numbers that bytes are counted with."""
MOST_COPIES = 4096
MOST_TOKENS = 1 << 30


def plan(
    model: Annotated[
        str,
        typer.Option(metavar="DIR|config.json|NAME", help="Its weights are not read."),
    ],
    topology: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME|discovered",
            help="A topology file, a cluster by name (3090x4, dgx1, mixed12, …), or what the mesh "
            "has found.",
        ),
    ] = "discovered",
    objective: Annotated[
        str,
        typer.Option(
            help="lr: least latency; he: least cost; helr: least cost that keeps --slo; "
            "throughput; goodput: replicas all over the cluster; even; or one that an installed "
            "package offers."
        ),
    ] = "helr",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16; by default float16, or what the mesh computes in."
        ),
    ] = "",
    replicas: Annotated[int, typer.Option(min=1, max=MOST_COPIES, help="Copies.")] = 1,
    stages: Annotated[
        int, typer.Option(min=0, max=MOST_SEQUENCES, help="Stages per copy; 0: what is best.")
    ] = 0,
    slots: Annotated[
        int, typer.Option(min=1, max=MOST_SEQUENCES, help="Most sequences at once per copy.")
    ] = 8,
    max_model_len: Annotated[
        int, typer.Option(min=0, max=MOST_TOKENS, help="Longest context; 0: the model's.")
    ] = 0,
    batch: Annotated[
        int,
        typer.Option(min=0, max=MOST_SEQUENCES, help="Sequences computed together; 0: the slots."),
    ] = 0,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_TOKENS, help="Of a request; 0: 512, or what the context has room for."
        ),
    ] = 0,
    output_tokens: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_TOKENS, help="Of a request, 90 % quantile; 0: 128, or likewise."
        ),
    ] = 0,
    in_flight: Annotated[
        int, typer.Option(min=1, max=MOST_SEQUENCES, help="Batches under way at once.")
    ] = 1,
    rate: Annotated[
        float,
        typer.Option(min=0, callback=finite, help="Requests per second; 0: all there is."),
    ] = 0.0,
    slo: Annotated[
        float,
        typer.Option(
            parser=parse_limit,
            metavar="DURATION",
            help="Longest time that a batch may take: 20s, 500ms; 0: no matter.",
        ),
    ] = "0",  # type: ignore[assignment]
    previous: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Where it is now, of --json.")
    ] = None,
    pin: Pins = None,
    exclude: Excluded = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE=COST", help="What using a device costs; repeatable."),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="add=T4@host-b,remove=host-c",
            help="What that would change; link=HOST~HOST: what the ways between two hosts cost; "
            "link=HOST~HOST*4: what faster ones bring; repeatable.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="A load to plan for; what is missing for it."),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="chain, which is what runs; full_stage: show besides how far stages of several "
            "devices would come, as in Helix: for planning alone."
        ),
    ] = "chain",
    budget: Annotated[
        float,
        typer.Option(
            parser=parse_duration,
            metavar="DURATION",
            help="Longest time to search where nothing exact is fast enough.",
        ),
    ] = "5s",  # type: ignore[assignment]
    redis: Annotated[
        str, typer.Option(envvar="UELLM_REDIS_URL", help="The mesh's, for `discovered`.")
    ] = "",
    explain: Annotated[bool, typer.Option("--explain", help="And why not otherwise.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw devices and layers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a model's layers would go on a cluster, how fast, and how good at least."""
    import asyncio
    import time

    from uellm.cli import planning
    from uellm.cli.device_options import read_cost, read_pins
    from uellm.cli.discovered import discover
    from uellm.cli.drawing import check_plot
    from uellm.cli.mesh_address import redis_url
    from uellm.cli.plan_files import read_plan
    from uellm.placement.views import EVERYWHERE, Objective, PlanRequest, Routing, Workload

    planning.check_routing(routing, objective)
    if plot is not None:
        check_plot(plot)
    if topology == planning.DISCOVERED:
        discovered = asyncio.run(discover(redis_url(redis), model))
        found, dtype = discovered.topology, dtype or discovered.dtype
    else:
        discovered = None
        found, dtype = planning.find_topology(topology), dtype or "float16"
    profile = planning.find_model(model, dtype)
    prompt_tokens, output_tokens = planning.lengths(
        profile, max_model_len, prompt_tokens, output_tokens
    )
    workload = Workload(
        replicas=replicas,
        stages=stages,
        slots=slots,
        max_tokens=max_model_len,
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        in_flight=in_flight,
        requests_per_second=rate,
        slo_seconds=slo,
    )
    mean_output_tokens = 0.0
    if trace is not None:
        workload, mean_output_tokens = planning.of_trace(trace, workload)
    pins, layer_pins = read_pins(pin or ())
    request = PlanRequest(
        topology=found,
        model=profile,
        workload=workload,
        objective=cast("Objective", objective),
        previous=read_plan(previous, "previous") if previous is not None else None,
        pins=pins,
        layer_pins=layer_pins,
        excluded=frozenset(exclude or ()),
        costs=dict(read_cost(text) for text in cost or ()),
        layer_times=discovered.layer_times(model, dtype, workload) if discovered else {},
        budget_seconds=budget,
        clock=time.monotonic,
        stock=discovered.stock if discovered else EVERYWHERE,
        routing=cast("Routing", routing),
    )
    asked = planning.Asked(
        request=request,
        explain=explain,
        as_json=as_json,
        plot=plot,
        what_if=what_if or (),
        mean_output_tokens=mean_output_tokens,
        as_deployed=discovered is not None,
    )
    raise typer.Exit(planning.run(asked))
