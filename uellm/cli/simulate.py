"""Commands: simulate, simulate goodput. Policies compared on a mesh in simulated time."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uellm.cli.drawing import check_plot
from uellm.cli.options import Json, finite

if TYPE_CHECKING:
    from uellm.simulator.experiments import Cell, Goodput, Result, Setup
    from uellm.simulator.mesh import MeshSettings
    from uellm.simulator.metrics import KindMetrics, Metrics

app = typer.Typer(
    help="Compare policies on a mesh in simulated time, at given loads.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PlatformName = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="a100, r3090, cpu, or a TOML file.")
]
Workload = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="alpha, tier, loose, or a CSV trace.")
]
Policies = Annotated[
    str, typer.Option(metavar="A,B", help="Policies: NAME, NAME:SETTING=VALUE or DISPATCH+STEP.")
]
Predictor = Annotated[
    str, typer.Option(help="Of lengths: oracle, b80, noise, noise:SPREAD, class-mean or prior.")
]
Replicas = Annotated[int, typer.Option(min=1, max=256, help="Replicas of the model.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each case, with other requests.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests of a run; of a trace, at most.")]
Variation = Annotated[
    float,
    typer.Option(
        "--cv", min=0.05, max=20, callback=finite, help="Variation of the gaps; 1: Poisson."
    ),
]
ExecutionName = Annotated[
    str, typer.Option(metavar="continuous|static", help="How engines run their sequences.")
]
Refusable = Annotated[
    bool, typer.Option("--refuse", help="Requests that cannot be in time ask to be refused.")
]
Lookahead = Annotated[
    int, typer.Option(min=0, help="Requests that a replica is sent beyond its free slots.")
]
Headroom = Annotated[
    float,
    typer.Option(
        min=0.01, callback=finite, help="Predicted KV peaks that it is sent, in its KV room."
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Processes.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw attainment and goodput over load.")
]


@app.callback()
def simulate(
    context: typer.Context,
    platform: PlatformName = "a100",
    workload: Workload = "tier",
    policies: Policies = "fcfs,cslo-odbs",
    load: Annotated[
        str,
        typer.Option(
            metavar="X,Y",
            help="Loads: 1 is what first come, first served saturates at, or a trace's own pace.",
        ),
    ] = "0.8,1,1.2",
    predictor: Predictor = "b80",
    replicas: Replicas = 1,
    seeds: Seeds = 1,
    requests: Requests = 10_000,
    cv: Variation = 1.0,
    execution: ExecutionName = "continuous",
    refuse: Refusable = False,
    lookahead: Lookahead = 2,
    kv_headroom: Headroom = 1.1,
    jobs: Jobs = 1,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Compare policies on a mesh in simulated time, at given loads."""
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from uellm.policy.views import DispatchSettings
    from uellm.simulator.experiments import Cell, Setup
    from uellm.simulator.platforms import find_platform

    names, loads = _names(policies), _numbers("load", load, least=0.001)
    if plot is not None:
        check_plot(plot)
    mesh = _mesh(replicas, execution, refuse)
    dispatch = DispatchSettings(lookahead, kv_headroom)
    setup = _setup(
        Setup(find_platform(platform), workload, predictor, requests, cv, mesh, dispatch)
    )
    cells = [Cell(name, x, seed) for name in names for x in loads for seed in range(seeds)]
    results = _run(setup, cells, jobs)
    if plot is not None:
        from uellm.cli.simulate_drawing import draw

        draw(plot, setup, results)
    if as_json:
        _write(setup, results=results)
    else:
        _show(results)


@app.command(name="goodput")
def find_goodput(
    platform: PlatformName = "a100",
    workload: Workload = "tier",
    policies: Policies = "fcfs,cslo-odbs",
    attainment: Annotated[
        str, typer.Option(metavar="X,Y", help="Shares that have to be in time.")
    ] = "0.9,0.95,0.99",
    predictor: Predictor = "b80",
    replicas: Replicas = 1,
    seeds: Seeds = 1,
    requests: Requests = 10_000,
    cv: Variation = 1.0,
    execution: ExecutionName = "continuous",
    refuse: Refusable = False,
    lookahead: Lookahead = 2,
    kv_headroom: Headroom = 1.1,
    jobs: Jobs = 1,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Find the largest load that each policy serves in time, and what no policy exceeds."""
    from uellm.policy.views import DispatchSettings
    from uellm.simulator.experiments import Cell, Setup, goodput
    from uellm.simulator.platforms import find_platform

    shares = _numbers("attainment", attainment, least=0.001, most=1.0)
    names = _names(policies)
    if plot is not None:
        check_plot(plot)
    mesh = _mesh(replicas, execution, refuse)
    dispatch = DispatchSettings(lookahead, kv_headroom)
    setup = _setup(
        Setup(find_platform(platform), workload, predictor, requests, cv, mesh, dispatch)
    )
    found, tried = [], []
    for name in names:

        def attained(load: float, name: str = name) -> float:
            cells = [Cell(name, load, seed) for seed in range(seeds)]
            results = _run(setup, cells, min(jobs, seeds), f"{name} at load {load:.2f}")
            tried.extend(results)
            return sum(result.metrics.attainment for result in results) / seeds

        found += goodput(setup, name, shares, attained)
    if any(each.load > each.bound for each in found):
        sys.stderr.write(
            "more than any policy can for ever: the run ends before its longest deadlines; "
            f"give it more --requests than {requests}\n"
        )
    if plot is not None:
        from uellm.cli.simulate_drawing import draw

        draw(plot, setup, tried, found)
    if as_json:
        _write(setup, results=found, runs=tried)
        return
    _table(
        ("policy", "in time", "load", "requests/s", "of the bound"),
        [
            (
                each.policy,
                f"{each.attainment:.0%}",
                f"{each.load:.2f}",
                f"{each.requests_per_second:.3g}",
                f"{each.load / each.bound:.2f}",
            )
            for each in found
        ],
    )
    served = {(each.policy, each.load) for each in found}
    if costs := [run for run in tried if (run.cell.policy, run.cell.load) in served]:
        sys.stdout.write("\nwhat comes of the requests at these loads\n\n")
        _show(sorted(costs, key=lambda run: (names.index(run.cell.policy), run.cell.load)))


def _refuse_options(context: typer.Context) -> None:
    """Say that options before a command of this one would be passed over."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"write it behind {context.invoked_subcommand}", context, param_hint=option.opts[0]
            )


def _mesh(replicas: int, execution: str, refuse: bool) -> "MeshSettings":
    from uellm.core.errors import InvalidArgumentError
    from uellm.simulator.mesh import Execution, MeshSettings

    if execution not in list(Execution):
        raise InvalidArgumentError(
            f"execution: no {execution!r}; available: {', '.join(Execution)}", field="execution"
        )
    return MeshSettings(replicas, Execution(execution), refusable=refuse)


def _setup(setup: "Setup") -> "Setup":
    """An experiment; what is wrong with it is said before anything runs."""
    from uellm.simulator.predictors import check_predictor

    check_predictor(setup.predictor)
    requests = setup.draw(1.0, 0)
    if not any(each.deadline or each.ttft or each.tpot for each in requests):
        sys.stderr.write(
            f"{setup.workload}: no request has a deadline_s, ttft_s or tpot_s: all are in time\n"
        )
    return setup


def _names(text: str) -> list[str]:
    from uellm.core.errors import InvalidArgumentError
    from uellm.simulator.experiments import pair_of

    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidArgumentError("policies: none; name at least one", field="policies")
    for name in names:
        pair_of(name)
    return names


def _numbers(field: str, text: str, *, least: float, most: float = 1000.0) -> list[float]:
    from uellm.core.errors import InvalidArgumentError

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        raise InvalidArgumentError(
            f"{field}: {text!r}: numbers from {least:g} to {most:g}, by commas", field=field
        )
    return numbers


def _run(
    setup: "Setup", cells: "list[Cell]", jobs: int, title: str = "simulating"
) -> "list[Result]":
    """Results of all cells, with a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from uellm.simulator.experiments import simulate_all

    results = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(cells))
        for result in simulate_all(setup, cells, min(jobs, len(cells))):
            results.append(result)
            progress.advance(task)
    return results


def _write(setup: "Setup", **found: "Sequence[Goodput | Result]") -> None:
    facts = {"setup": asdict(setup), "reference_rate": setup.reference_rate()}
    facts |= {name: [asdict(each) for each in these] for name, these in found.items()}
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A narrow terminal breaks lines; figures are not cut off.
    console = Console(highlight=False)
    console.width = max(console.width, 160)
    console.print(table, crop=False)


_COLUMNS: "dict[str, tuple[str, Callable[[Metrics], float | None]]]" = {
    "in time": (".3f", lambda m: m.attainment),
    "refused": (".3f", lambda m: m.refused),
    "in time/s": (".3g", lambda m: m.met_per_second),
    "tokens/s": (".4g", lambda m: m.tokens_per_second),
    "in time tokens/s": (".4g", lambda m: m.met_tokens_per_second),
    "latency s": (".3g", lambda m: m.latency_mean),
    "longest wait s": (".3g", lambda m: m.max_wait),
    "preempted": (".2f", lambda m: m.preemptions),
    "wasted": (".1%", lambda m: m.wasted),
    "padding": (".1%", lambda m: m.padding),
    "p90 kept": (".2f", lambda m: m.calibration.p90_coverage),
}


_ELSE_LEFT_OUT = ("refused", "preempted", "padding")
"""Columns that are shown if they are not 0 everywhere."""
_OF_CLASSES: "dict[str, tuple[str, Callable[[KindMetrics], float | None]]]" = {
    "in time": (".3f", lambda m: m.attainment),
    "latency p50 s": (".3g", lambda m: m.latency_p50),
    "latency p99 s": (".3g", lambda m: m.latency_p99),
    "first token p50 s": (".3g", lambda m: m.ttft_p50),
    "first token p99 s": (".3g", lambda m: m.ttft_p99),
}


def _show(results: "list[Result]") -> None:
    """Tables of means over seeds, of all requests and of each class."""
    from uellm.simulator.experiments import by_case

    groups = by_case(results)
    _means(
        ("policy", "load"),
        {
            (policy, f"{load:.2f}"): [result.metrics for result in group]
            for (policy, load), group in groups.items()
        },
        _COLUMNS,
    )
    kinds = dict.fromkeys(kind for result in results for kind in result.metrics.kinds)
    sys.stdout.write("\n")
    _means(
        ("policy", "load", "class"),
        {
            (policy, f"{load:.2f}", kind): [
                result.metrics.kinds[kind] for result in group if kind in result.metrics.kinds
            ]
            for (policy, load), group in groups.items()
            for kind in kinds
        },
        _OF_CLASSES,
    )


def _means(
    heads: Sequence[str],
    groups: "Mapping[tuple[str, ...], Sequence[Any]]",
    columns: "Mapping[str, tuple[str, Callable[[Any], float | None]]]",
) -> None:
    """A table of means."""
    titles, cells = [*heads], [[*names] for names in groups]
    for title, (shape, pick) in columns.items():
        means = [_mean([pick(each) for each in group]) for group in groups.values()]
        if any(means) or title not in _ELSE_LEFT_OUT:
            titles.append(title)
            for row, mean in zip(cells, means, strict=True):
                row.append("-" if mean is None else format(mean, shape))
    _table(titles, cells)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
