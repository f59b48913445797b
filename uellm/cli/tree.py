"""`uellm up`, behind its options."""

import sys
import time

from rich.console import Console

from uellm.cli import exits
from uellm.core.errors import ConfigurationError
from uellm.mesh.joining import Guests
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import MeshOptions
from uellm.models import files
from uellm.models.adapters import resolve_adapter
from uellm.models.profile import read_profile
from uellm.models.tokenizer import Tokenizer
from uellm.placement.explain import size
from uellm.placement.placers import placer_of


class Progress:
    """Says on standard error what is being waited for: one changing line on a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._started = time.monotonic()

    def __call__(self, words: str) -> None:
        """Say it."""
        if self._status is None:
            sys.stderr.write(f"[{time.monotonic() - self._started:5.1f} s] {words}\n")
        else:
            self._status.update(words)
            self._status.start()

    def note(self, words: str) -> None:
        """Say what has to be still there when the next is said."""
        if self._status is None:
            self(words)
        else:
            self._console.print(words, soft_wrap=True, highlight=False)

    def done(self) -> None:
        """Nothing is being waited for any more."""
        if self._status is not None:
            self._status.stop()


def check(options: MeshOptions, *, allow_download: bool) -> None:
    """Find and read every model and adapter before anything is started; fetch it if that is wished.

    Raises:
        UellmError: naming what is missing or impossible, and the remedy.
    """
    if options.objective:
        placer_of(options.objective)
    longest = 0
    for model in options.models:
        directory = files.resolve(model.source, allow_download=allow_download)
        Tokenizer(directory)
        for adapter in model.adapters:
            resolve_adapter(adapter, allow_download=allow_download)
        longest = max(longest, read_profile(directory, options.dtype or "float32").max_tokens)
    if options.max_tokens > longest:
        raise ConfigurationError(
            f"--max-model-len: {options.max_tokens}; at most {longest}, the model's own length",
            field="max-model-len",
        )


async def keep_up(mesh: Mesh, progress: Progress) -> int:
    """Run a mesh until it is interrupted or a service has to be given up."""
    try:
        async with mesh.running():
            progress.done()
            await _welcome(mesh)
            await mesh.watch()
    finally:
        progress.done()
    return exits.FAILED


async def keep_joined(guests: Guests, progress: Progress) -> int:
    """Keep workers in a mesh elsewhere until it is interrupted or one has to be given up."""
    try:
        progress("joining")
        async with guests.running() as devices:
            progress.done()
            console = Console(stderr=True, highlight=False)
            for device in devices:
                console.print(f"joined: {device.id}, {size(device.memory_total_bytes)}")
            console.print(f"logs {guests.directory}", soft_wrap=True)
            console.print("Ctrl-C drains and leaves; a second one forces")
            await guests.watch()
    finally:
        progress.done()
    return exits.FAILED


def _choice(mesh: Mesh) -> str:
    """The option that says which model, if there are several."""
    models = mesh.options.models
    return f" --model {models[0].name}" if len(models) > 1 else ""


def _public(url: str) -> str:
    """A URL without its password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


async def _welcome(mesh: Mesh) -> None:
    console = Console(stderr=True, highlight=False)
    for model in mesh.options.models:
        for placed in await mesh.placements(model.name):
            console.print(f"{model.name}: {placed.replica}  {'  '.join(placed.stages)}")
    # Not wrapped: paths and commands are there to be copied.
    for line in (
        *([f"join: [bold]{mesh.invitation}[/bold]"] if mesh.invitation else []),
        f"gateway {mesh.address}, Redis {_public(mesh.redis_url)}, logs {mesh.directory}",
        f"try: [bold]uellm generate 'Count from 1 to 20.' --deadline 5s{_choice(mesh)}[/bold]",
    ):
        console.print(line, soft_wrap=True)
    console.print("Ctrl-C drains and ends; a second one forces")
