"""Command: verify. The comparison is the worker's, and runs in a process of its own."""

import json
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from uellm.cli import exits
from uellm.cli.options import Json


class Dtype(StrEnum):
    """A compute dtype."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Execution(StrEnum):
    """How the engine composes its steps."""

    CONTINUOUS = "continuous"
    STATIC = "static"


def verify(
    model: Annotated[
        str,
        typer.Argument(help="Directory or hub id of the model; by default the demo model."),
    ] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="LoRA adapter in peft's format: prompts take the model and each adapter in turn; "
            "may be given several times.",
        ),
    ] = None,
    shards: Annotated[
        int, typer.Option(min=0, help="Stages to split it into; 0: three, or one per layer.")
    ] = 0,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to try, one a line.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    dtype: Annotated[
        Dtype, typer.Option(help="In half precision rounding alone may change answers.")
    ] = Dtype.FLOAT32,
    execution: Annotated[
        Execution, typer.Option(help="static: in padded batches, one after another.")
    ] = Execution.CONTINUOUS,
    flips: Annotated[
        Dtype | None,
        typer.Option(help="Also count the tokens that this dtype chooses otherwise than float32."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads to compute with; 0: all.")] = 0,
    allow_download: Annotated[
        bool, typer.Option(help="Fetch a hub model that is not in the local cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare a model's split, batched, preempted answers with transformers' own, token by token.

    Exit status: 0 exact, 1 different, 2 the model cannot be used.
    """
    from uellm.core.errors import ConfigurationError
    from uellm.mesh.options import DEMO_MODEL
    from uellm.models import files
    from uellm.models.adapters import check_names, parse_adapter, resolve_adapter

    if find_spec("uellm_worker") is None or find_spec("torch") is None:
        raise ConfigurationError("the worker is not installed: pip install 'uellm[worker]'")
    directory = files.resolve(model or str(DEMO_MODEL), allow_download=allow_download)
    options = [f"--shards={shards}", f"--max-tokens={max_tokens}", f"--dtype={dtype.value}"]
    options.append(f"--execution={execution.value}")
    if flips is not None:
        if dtype is not Dtype.FLOAT32:
            raise ConfigurationError(
                f"flips are counted against float32, not {dtype.value}; leave out --dtype",
                field="flips",
            )
        options.append(f"--flips={flips.value}")
    for ref in check_names(parse_adapter(text)[1] for text in adapter or ()):
        found = resolve_adapter(ref, allow_download=allow_download)
        options.append(f"--adapter={ref.name}={found}")
    if prompts is not None:
        options.append(f"--prompts={prompts}")
    result = _run([str(directory), *options, f"--threads={threads}"])
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        _show(result)
    raise typer.Exit(exits.OK if result["exact"] else exits.FAILED)


def _run(arguments: list[str]) -> dict[str, Any]:
    """The worker's comparison.

    Raises:
        ConfigurationError: if it comes to no verdict.
    """
    import subprocess

    from rich.console import Console

    from uellm.core.errors import ConfigurationError

    # By name and not by import: the shared library depends on no service.
    command = [sys.executable, "-m", "uellm_worker.verify", *arguments]
    with Console(stderr=True).status("comparing with transformers"):
        done = subprocess.run(  # noqa: S603
            command, check=False, capture_output=True, text=True
        )
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ConfigurationError(
            f"the comparison ended with status {done.returncode}: {lines[-1]}"
        ) from None
    if "error" in result:
        raise ConfigurationError(result["error"], field=result["field"])
    return result


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["prompt", "tokens", "answer", "ties", "logit error", "verdict"]
    if adapted := any(prompt["adapter"] for prompt in result["prompts"]):
        columns.insert(1, "adapter")
    table = Table(*columns, box=None)
    for prompt in result["prompts"]:
        table.add_row(
            str(prompt["prompt"]),
            *([prompt["adapter"] or "none"] if adapted else []),
            str(prompt["prompt_tokens"]),
            str(prompt["answer_tokens"]),
            str(len(prompt["ties"])),
            f"{prompt['logit_error']:.1e}",
            _verdict(prompt, within=prompt["logits_agree"]),
        )
    console = Console(highlight=False)
    console.print(table)
    split = " + ".join(map(str, result["split"]))
    console.print(
        f"{'exact' if result['exact'] else 'different'}: {result['model']} in {result['dtype']}, "
        f"layers {split}, {result['execution']}, {result['slots']} at once, "
        f"{result['preemptions']} preemptions; {result['seconds']:.1f} s",
        soft_wrap=True,
    )
    if flips := result.get("flips"):
        console.print(
            f"{flips['dtype']}: {flips['flipped']} of {flips['tokens']} tokens "
            f"({flips['rate']:.2%}) are not those of float32",
            soft_wrap=True,
        )


def _verdict(prompt: dict[str, Any], *, within: bool) -> str:
    difference = prompt["difference"]
    if difference is None:
        return "exact" if within else f"logits differ, most at token {prompt['logit_error_at']}"
    got, wanted = (
        "its end" if difference[side] is None else str(difference[side])
        for side in ("got", "wanted")
    )
    return (
        f"differs at token {difference['token']}: {got}, and transformers says {wanted} "
        f"by {difference['margin']:.2g}"
    )
