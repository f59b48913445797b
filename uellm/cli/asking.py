"""Commands that ask something of a mesh: generate, estimate, chat, cancel."""

import sys
from typing import Annotated, Any

import typer

from uellm.cli.durations import parse_duration
from uellm.cli.options import Json, Server, finite

ModelName = Annotated[str, typer.Option(help="Served name; by default the only one served.")]
AdapterName = Annotated[
    str, typer.Option("--adapter", help="LoRA adapter of the model; by default none.")
]
Deadline = Annotated[
    float | None,
    typer.Option(
        parser=parse_duration,
        metavar="DURATION",
        help="When the whole answer is needed, from now: 500ms, 5s, 2m.",
    ),
]
Ttft = Annotated[
    float | None,
    typer.Option(
        parser=parse_duration, metavar="DURATION", help="When the first token is needed, from now."
    ),
]
Tpot = Annotated[
    float | None,
    typer.Option(
        parser=parse_duration,
        metavar="DURATION",
        help="What each token after the first may take, in the mean.",
    ),
]
Priority = Annotated[
    str, typer.Option(help="Its class: batch, normal or interactive; by default normal.")
]
Prompt = Annotated[str, typer.Argument(help="The prompt; - reads standard input.")]
Refuse = Annotated[
    bool,
    typer.Option(help="Have it refused if the deadline cannot be met; else done best-effort."),
]
AsChat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="With the model's chat template, or as it is; by default with, if there is one.",
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, callback=finite, help="0, the default, is greedy.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this string; may be given several times.")
]


def generate(
    prompt: Prompt,
    model: ModelName = "",
    adapter: AdapterName = "",
    deadline: Deadline = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    priority: Priority = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    stop: Stop = None,
    refuse: Refuse = False,
    chat: AsChat = None,
    server: Server = "",
    as_json: Json = False,
) -> None:
    """Stream an answer; say on standard error when it will be ready and whether that was kept."""
    from uellm.cli import generation
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import gateways

    wishes = _wishes(
        model=model,
        adapter=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop or (),
        deadline_seconds=deadline,
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        priority=priority,
        refuse=refuse,
    )
    text = _text(prompt)
    work = generation.generate(gateways(server), text, wishes, as_chat=chat, as_json=as_json)
    raise typer.Exit(run(work))


def estimate(
    prompt: Prompt,
    model: ModelName = "",
    adapter: AdapterName = "",
    deadline: Deadline = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    priority: Priority = "",
    max_tokens: MaxTokens = None,
    refuse: Refuse = False,
    chat: AsChat = None,
    server: Server = "",
    as_json: Json = False,
) -> None:
    """Say what would be promised now, and ask for nothing; status 1 if it would be refused."""
    from uellm.cli import generation
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import gateways

    wishes = _wishes(
        model=model,
        adapter=adapter,
        max_tokens=max_tokens,
        deadline_seconds=deadline,
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        priority=priority,
        refuse=refuse,
    )
    text = _text(prompt)
    work = generation.estimate(gateways(server), text, wishes, as_chat=chat, as_json=as_json)
    raise typer.Exit(run(work))


def chat(
    model: ModelName = "",
    adapter: AdapterName = "",
    system: Annotated[str, typer.Option(help="A system message to begin with.")] = "",
    deadline: Deadline = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    server: Server = "",
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from uellm.cli import generation
    from uellm.cli.mesh_address import gateways

    wishes = _wishes(
        model=model,
        adapter=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        deadline_seconds=deadline,
    )
    raise typer.Exit(generation.chat(gateways(server), wishes, system))


def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="The id of the request.")],
    server: Server = "",
    as_json: Json = False,
) -> None:
    """End a request."""
    from uellm.cli import generation
    from uellm.cli.loops import run
    from uellm.cli.mesh_address import gateways

    raise typer.Exit(run(generation.cancel(gateways(server), request_id, as_json=as_json)))


def _text(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _wishes(**fields: Any) -> Any:
    from uellm.cli.generation import Wishes

    return Wishes(**fields)
