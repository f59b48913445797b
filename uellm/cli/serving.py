"""Commands that run services: up, serve, demo."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from uellm.cli.options import Json

DEFAULT_PORT = 50051


class Role(StrEnum):
    """A service."""

    GATEWAY = "gateway"
    PROFILER = "profiler"
    SCHEDULER = "scheduler"
    DEPLOYER = "deployer"
    WORKER = "worker"


def up(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory or hub id of a causal LM in safetensors, or NAME=…; "
            "may be given several times. By default the demo model."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="LoRA adapter in peft's format that requests may name, a directory or hub id; "
            "MODEL:NAME=… with several models; may be given several times.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    stages: Annotated[int, typer.Option(min=0, help="Stages per copy; 0: what is best.")] = 0,
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies of each model; with --objective goodput the fewest.")
    ] = 1,
    objective: Annotated[
        str,
        typer.Option(
            help="What placements seek: helr, he, lr, throughput, goodput (as many copies as the "
            "load needs) or even; by default helr."
        ),
    ] = "",
    devices: Annotated[
        str,
        typer.Option(help="What each worker may use: cpu, cuda:0,cuda:1, sim:0-2:memory=4GiB, …"),
    ] = "",
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The gateway's port; 0: any free one.")
    ] = DEFAULT_PORT,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address of this machine that others may join at, in place of --host; prints how.",
        ),
    ] = "",
    redis: Annotated[
        str, typer.Option(metavar="URL", help="A Redis that runs; by default one of its own.")
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default as the device likes.")
    ] = "",
    slots: Annotated[
        int, typer.Option(min=0, help="Most sequences at once per replica; 0: the default.")
    ] = 0,
    max_model_len: Annotated[
        int, typer.Option(min=0, help="Longest context granted, in tokens; 0: the model's.")
    ] = 0,
    kv_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="KV room per replica, in tokens of all sequences together; 0: the longest "
            "context for every slot.",
        ),
    ] = 0,
    allow_download: Annotated[
        bool, typer.Option(help="Fetch hub models that are not in the local cache.")
    ] = False,
) -> None:
    """Run a whole mesh in one process tree, until Ctrl-C."""
    from uellm.cli import tree
    from uellm.cli.loops import run
    from uellm.core.errors import ConfigurationError
    from uellm.mesh.mesh import Mesh
    from uellm.mesh.options import DEMO_MODEL, MeshOptions, parse_models, with_adapters

    if listen and redis:
        raise ConfigurationError(
            "--listen opens the mesh's own Redis, and --redis names another; other machines join "
            "that one by `uellm serve worker --redis-url URL`",
            field="listen",
        )
    models = parse_models(model or [f"demo={DEMO_MODEL}"])
    options = MeshOptions(
        models=tuple(with_adapters(models, adapter or ())),
        workers=workers,
        devices=devices,
        stages=stages,
        replicas=replicas,
        objective=objective,
        dtype=dtype,
        slots=slots,
        max_tokens=max_model_len,
        kv_tokens=kv_tokens,
        host=listen or host,
        listens=bool(listen),
        port=port,
        redis_url=redis,
    )
    tree.check(options, allow_download=allow_download)
    progress = tree.Progress()
    mesh = Mesh(options, progress, announce=progress.note)
    raise typer.Exit(run(tree.keep_up(mesh, progress), mesh.kill))


def join(
    host: Annotated[
        str, typer.Argument(help="Where `uellm up --listen` runs: a name or an address.")
    ],
    token: Annotated[
        str,
        typer.Option(
            envvar="UELLM_JOIN_TOKEN",
            help="What it printed; in the variable, other users of this machine do not see it.",
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    devices: Annotated[
        str, typer.Option(help="What each worker may use: cpu, cuda:0,cuda:1, … By default all.")
    ] = "",
    address: Annotated[
        str, typer.Option(help="This machine's, as the mesh reaches it; by default found out.")
    ] = "",
    allow_download: Annotated[
        bool, typer.Option(help="Fetch hub models that are not in the local cache.")
    ] = False,
) -> None:
    """Make this machine's devices part of a mesh elsewhere, until Ctrl-C."""
    from uellm.cli import tree
    from uellm.cli.loops import run
    from uellm.mesh.joining import Guests, JoinOptions, Token

    options = JoinOptions(host, Token.parse(token), workers, devices, address, allow_download)
    guests = Guests(options)
    raise typer.Exit(run(tree.keep_joined(guests, tree.Progress()), guests.kill))


def serve(
    role: Annotated[Role, typer.Argument(help="The service to run.")],
    redis_url: Annotated[
        str, typer.Option(metavar="URL", help="The mesh's Redis (UELLM_REDIS_URL).")
    ] = "",
) -> None:
    """Run one service, as a container or a unit does; settings come from UELLM_* variables."""
    import os
    import runpy
    import sys
    from importlib.util import find_spec

    from uellm.core.errors import ConfigurationError

    module = f"uellm_{role.value}"
    if find_spec(module) is None:
        raise ConfigurationError(
            f"the {role.value} is not installed: pip install 'uellm[{role.value}]'"
        )
    if redis_url:
        os.environ["UELLM_REDIS_URL"] = redis_url
    sys.argv = [module]
    # By name and not by import: the shared library depends on no service.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def demo(
    once: Annotated[bool, typer.Option(help="End after the runs, even on a terminal.")] = False,
    as_json: Json = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the spans of every service there, as JSON lines."),
    ] = None,
) -> None:
    """Serve the shipped model over two workers, ask it 24 things at once, show every promise."""
    from uellm.cli.demo import show
    from uellm.cli.loops import run

    raise typer.Exit(run(show(once=once, as_json=as_json, trace=trace)))
