"""The process that children are forked from, with the libraries loaded once.

Importing torch and transformers takes many seconds; a fork of a process that has done so takes
milliseconds. ``multiprocessing``'s fork server is not used: there is one per program, it imports
the program's main module into each child, and it can be stopped only through private names.

Over the control socket, from the agent: 5 bytes, kind and pid; with SPAWN comes the child's end
of its socket pair. To the agent: 9 bytes, kind, pid and exit code. When the agent is gone, the
children are killed; when this process is gone, the kernel kills them.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import logging
import os
import pkgutil
import selectors
import signal
import socket
import struct
import sys
from typing import NoReturn

REQUEST = struct.Struct("!BI")
"""Kind and pid."""
REPLY = struct.Struct("!BIi")
"""Kind, pid (0: not forked) and exit code (not forked: the errno); of WARM the kind alone."""
SPAWN, KILL = 1, 2
SPAWNED, EXITED, WARM = 1, 2, 3

_PRELOAD = {
    "instant": ("uellm_worker.engine.child", "uellm_worker.engine.instant"),
    "shard": (
        "uellm_worker.engine.child",
        "uellm_worker.engine.shard_engine",
        "transformers.models.llama.modeling_llama",
        "uellm_worker.engine.native:load",
    ),
}
"""Modules to import, and functions to call: what children would else do, each for itself."""
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


class ForkServer:
    """Forks children on request, and reports their ends.

    Args:
        control: to the agent.
        options: the command line's.
    """

    def __init__(self, control: socket.socket, options: argparse.Namespace) -> None:
        self._control = control
        self._options = options
        self._pids: set[int] = set()
        # The signal's arrival must wake the selector, hence a pipe rather than a handler alone.
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def serve(self) -> None:
        """Say that the libraries are loaded, then serve until the agent is gone."""
        self._control.sendall(REPLY.pack(WARM, 0, 0))
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                        self._reap()
                    elif not self._request():
                        return

    def close(self) -> None:
        """Kill and reap what is left."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)

    def _request(self) -> bool:
        """Carry out one request; False when the agent is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, REQUEST.size, 1)
        except OSError:
            return False
        if len(data) < REQUEST.size:
            return False
        kind, pid = REQUEST.unpack(data)
        if kind == SPAWN:
            self._spawn(socket.socket(fileno=fds[0]))
        elif kind == KILL and pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        return True

    def _spawn(self, sock: socket.socket) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # No process or no memory left: for this child, not for all.
            sock.close()
            self._control.sendall(REPLY.pack(SPAWNED, 0, error.errno or 0))
            return
        if pid == 0:
            self._be_child(sock, server)
        sock.close()
        self._pids.add(pid)
        self._control.sendall(REPLY.pack(SPAWNED, pid, 0))

    def _be_child(self, sock: socket.socket, server: int) -> NoReturn:
        """What the forked process does; does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in (self._control, self._wake, self._woken):
                inherited.close()
            die_with_parent(server)
            child = importlib.import_module("uellm_worker.engine.child")
            child.serve(sock, child.new_engine(self._options.engine, self._options.step_seconds))
            code = 0
        except BrokenPipeError:
            code = 0  # The agent went away in the middle of an event.
        except BaseException:
            _log.exception("a child process failed")
        finally:
            os._exit(code)

    def _reap(self) -> None:
        for pid in tuple(self._pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._pids.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                self._control.sendall(REPLY.pack(EXITED, pid, code))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # It died before the call.
            os._exit(1)


def main() -> None:
    """Run the fork server; see ``uellm_worker.children``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--engine", choices=sorted(_PRELOAD), required=True)
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--step-seconds", type=float, default=0.0)
    options = parser.parse_args()
    # A terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group, but it is the agent
    # that decides: it drains first, then closes its sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(name)s %(message)s")
    control = socket.socket(fileno=options.control_fd)
    for name in _PRELOAD[options.engine]:
        found = pkgutil.resolve_name(name)
        if callable(found):
            found()
    # The libraries' hundreds of thousands of objects are never garbage: unfrozen, each child's
    # collections would walk them, for 0.2 s at a time, and unshare their pages.
    gc.collect()
    gc.freeze()
    server = ForkServer(control, options)
    try:
        server.serve()
    except BrokenPipeError:
        pass
    finally:
        server.close()


if __name__ == "__main__":
    main()
