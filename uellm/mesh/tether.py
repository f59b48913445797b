"""Run a command that ends when its parent does, however the parent ends.

Usage: ``python -m uellm.mesh.tether PARENT_PID COMMAND…``

The kernel remembers the wish over exec, and sends SIGKILL: a mesh whose supervisor was killed must
not go on half. It is asked for after the fork in a fresh interpreter, because code between fork
and exec is not safe in a process that has threads. Only Linux offers this; elsewhere the command
simply runs.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """``command``, to be started by this process and to end with it."""
    # Isolated and without site packages: it starts in milliseconds and needs neither.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            raise SystemExit(1)
    os.execvp(command[0], command)  # noqa: S606 - the point of this program


if __name__ == "__main__":
    main()
