"""Commands: profiler train, eval, profile, versions, rollback. Predictors of output lengths."""

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uellm.cli.options import Json, Redis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uellm.learning.examples import Example
    from uellm.learning.training import Judged, Progress

app = typer.Typer(
    help="Predictors of output lengths: train and judge them, see what a mesh has learnt.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[
    Path,
    typer.Option(
        metavar="FILE.jsonl",
        help='Lines {"prompt", "output_tokens"}, and if known "prompt_tokens", "model", "regime" '
        '(greedy or sampled), "censored"; .gz too.',
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail at the first malformed line.")]


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the predictor is kept.")],
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="text, llm, prior, or one that a package offers.")
    ] = "text",
    base_model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For llm: the model to tune, in transformers' layout."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the predictor; repeatable."),
    ] = None,
    strict: Strict = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take the place of a predictor that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a predictor on prompts and the lengths of their answers.

    Interrupted, it goes on where it was last kept when it is started again.
    """
    from uellm.learning import training

    examples, skipped = _examples(data, strict=strict)
    chosen = _settings(settings or [])
    if base_model is not None:
        chosen["base_model"] = str(base_model.resolve())
    with _progress(len(examples)) as progress:
        made = training.train(backend, examples, out, chosen, force=force, progress=progress)
    facts = {
        "profiler": str(out),
        "predictor": made.name,
        "version": made.version,
        "examples": len(examples),
        "skipped": skipped,
    }
    if as_json:
        _write(facts)
    else:
        sys.stdout.write(f"{out}: {made.name} {made.version}, {len(examples)} examples\n")


@app.command(name="eval")
def evaluate(
    profiler: Annotated[
        Path, typer.Option(metavar="DIR", help="A predictor that `train` has kept.")
    ],
    data: Data,
    online: Annotated[
        bool, typer.Option("--online", help="Learn from each example after it was predicted.")
    ] = False,
    strict: Strict = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw predicted over true lengths, and coverage."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge a predictor by prompts and the lengths of their answers; cut answers are left out."""
    from uellm.cli.drawing import check_plot
    from uellm.learning import training
    from uellm.learning.store import load_predictor

    if plot is not None:
        check_plot(plot)
    learnt = load_predictor(profiler)
    examples, skipped = _examples(data, strict=strict)
    judged = training.evaluate(learnt, examples, online=online)
    if plot is not None:
        _draw(plot, judged)
    # JSON knows no NaN.
    numbers = {name: _finite(value) for name, value in asdict(judged.scores).items()}
    facts = {
        "predictor": learnt.name,
        "version": learnt.version,
        **numbers,
        "seconds_per_request": judged.seconds_per_request,
        "skipped": skipped,
    }
    if as_json:
        _write(facts)
        return
    for name, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else value
        sys.stdout.write(f"{name:22} {shown}\n")


@app.command()
def profile(
    model: Annotated[
        Path, typer.Option(metavar="DIR", help="Its config.json and tokenizer; no weights.")
    ],
    prompt: Annotated[str, typer.Argument(help="What a user says.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Shown with it: PNG, JPEG, WebP or GIF; repeatable."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens to generate; 0: the context that is left.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float16",
    profiler: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A predictor that `train` has kept; by default prior."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a request would take of a model, by its files alone; images included."""
    from uellm.cli import profiling

    facts = profiling.profile(model, prompt, image or [], max_tokens, dtype, profiler)
    if as_json:
        _write(facts)
        return
    for name, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        sys.stdout.write(f"{name:22} {shown}\n")


@app.command()
def versions(redis: Redis = "", as_json: Json = False) -> None:
    """List what the mesh's profilers learnt: the latest version serves, others can again."""
    from uellm.cli import versions as listing
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(listing.show(redis_url(redis), as_json=as_json)))


@app.command()
def rollback(
    number: Annotated[int, typer.Argument(min=1, help="Of a version, as `versions` lists it.")],
    redis: Redis = "",
) -> None:
    """Let an earlier version serve again, as a new one."""
    from uellm.cli import versions as listing
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import redis_url

    raise typer.Exit(run(listing.roll_back(redis_url(redis), number)))


def _examples(path: Path, *, strict: bool) -> "tuple[list[Example], int]":
    """Examples of a file, and how many lines are none; each of those is named."""
    from uellm.core.errors import InvalidArgumentError
    from uellm.learning.examples import Problem, read_examples

    examples, skipped = [], 0
    for each in read_examples(path):
        if not isinstance(each, Problem):
            examples.append(each)
            continue
        if strict:
            raise InvalidArgumentError(str(each), field="data")
        skipped += 1
        sys.stderr.write(f"uellm: skipped {each}\n")
    return examples, skipped


def _settings(given: list[str]) -> dict[str, str]:
    from uellm.core.errors import InvalidArgumentError

    settings = {}
    for each in given:
        name, found, value = each.partition("=")
        if not found or not name:
            raise InvalidArgumentError(f"set: {each!r} is not NAME=VALUE", field="set")
        settings[name] = value
    return settings


@contextmanager
def _progress(total: int) -> "Iterator[Progress]":
    """A bar on a terminal's standard error, lines elsewhere where something else begins."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task, doing = bar.add_task("", total=total), ""

        def tell(what: str, done: int) -> None:
            nonlocal doing
            bar.update(task, description=what, completed=done)
            if what != doing and not console.is_terminal:
                sys.stderr.write(f"{what}: {done} of {total} examples\n")
            doing = what

        yield tell


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or isfinite(value) else None


def _write(facts: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")


def _draw(path: Path, judged: "Judged") -> None:
    import numpy as np
    from matplotlib.figure import Figure

    from uellm.core.request import LEVELS

    true = np.maximum(judged.lengths, 1)
    quantiles = np.array([each.values for each in judged.predictions])
    figure = Figure(figsize=(9, 4), layout="constrained")
    points, coverage = figure.subplots(1, 2)
    points.scatter(true, quantiles[:, LEVELS.index(0.5)], s=4, alpha=0.3)
    points.axline((1, 1), (2, 2), color="grey", linewidth=1)
    points.set(xscale="log", yscale="log", xlabel="true length", ylabel="predicted median")
    covered = [(true <= quantiles[:, i]).mean() for i in range(len(LEVELS))]
    coverage.plot(LEVELS, covered, marker="o")
    coverage.axline((0, 0), (1, 1), color="grey", linewidth=1)
    coverage.set(xlabel="promised coverage", ylabel="coverage", xlim=(0, 1), ylim=(0, 1))
    for axes in (points, coverage):
        axes.grid(alpha=0.3)
    figure.savefig(path)
