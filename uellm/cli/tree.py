"""`uellm up`, behind its options."""

import sys
import time

from rich.console import Console

from uellm.cli import exits
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import MeshOptions
from uellm.models import files


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

    def done(self) -> None:
        """Nothing is being waited for any more."""
        if self._status is not None:
            self._status.stop()


def check(options: MeshOptions, *, allow_download: bool) -> None:
    """Find every model before anything is started; fetch it if that is wished.

    Raises:
        ModelFilesError: naming what is missing and the remedy.
    """
    for model in options.models:
        files.resolve(model.source, allow_download=allow_download)


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


async def _welcome(mesh: Mesh) -> None:
    console = Console(stderr=True, highlight=False)
    for model in mesh.options.models:
        for placed in await mesh.placements(model.name):
            console.print(f"{model.name}: {placed.replica}  {'  '.join(placed.stages)}")
    console.print(f"gateway {mesh.address}, Redis {mesh.redis_url}, logs {mesh.directory}")
    console.print("try: [bold]uellm generate 'Count from 1 to 20.' --deadline 5s[/bold]")
    console.print("Ctrl-C drains and ends; a second one forces")
