"""Fits in processes of their own: predictions do not wait for an interpreter that is busy fitting.

``python -m uellm_profiler.fits`` does a pickled ``Refit`` from its standard input, and writes what
it makes to its standard output.
"""

import asyncio
import contextlib
import os
import pickle
import sys

from uellm.prediction.interface import Refit, State
from uellm.prediction.states import pack, unpack

NICENESS = 10
"""Those who serve go first where cores are few."""


async def fitted(refit: Refit) -> State:
    """Do it; whoever is cancelled ends the process.

    Raises:
        RuntimeError: if it failed, with the last that was said of it.
    """
    work = await asyncio.to_thread(pickle.dumps, refit)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        made, said = await process.communicate(work)
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or ["nothing was said of it"]
        raise RuntimeError(f"a fit ended with status {process.returncode}: {lines[-1]}")
    return await asyncio.to_thread(unpack, made)


def main() -> None:
    """Do what is asked."""
    os.nice(NICENESS)
    # What libraries print must not end up in what is made.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        refit: Refit = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the parent
        out.write(pack(refit()))


if __name__ == "__main__":
    main()
