"""The child processes of a worker, as its agent sees them. Linux and macOS; asyncio; no torch.

A fork server with the engine's libraries loaded is started once; children are forked from it, so
that one starts in milliseconds. Agent and child talk over a socket pair
(``uellm_worker.engine.wire``). A child ends when its socket closes, so none outlives the agent.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator

from uellm.v1.engine_pb2 import EngineCommand, EngineEvent
from uellm_worker.cores import WAITING
from uellm_worker.engine.forkserver import EXITED, KILL, REPLY, REQUEST, SPAWN, WARM
from uellm_worker.engine.wire import LENGTH, pack, unpack_length


class EngineChild:
    """One child process.

    Attributes:
        pid: its process id.
        exit_code: done when the process is gone; negative: the signal that ended it.
    """

    def __init__(
        self,
        pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        spawner: "ChildSpawner",
    ) -> None:
        self.pid = pid
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._spawner = spawner
        # Apart from the future, which whoever awaits it may cancel.
        self._gone = asyncio.Event()

    async def send(self, command: EngineCommand) -> None:
        """Send a command.

        Raises:
            ConnectionError: if the child is gone.
        """
        if self._writer.is_closing():
            raise ConnectionResetError(f"child {self.pid} is gone")
        self._writer.write(pack(command))
        await self._writer.drain()

    async def events(self) -> AsyncIterator[EngineEvent]:
        """The child's events, until it is gone. To be iterated once."""
        try:
            while True:
                length = unpack_length(await self._reader.readexactly(LENGTH.size))
                yield EngineEvent.FromString(await self._reader.readexactly(length))
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            self.close()

    async def kill(self) -> None:
        """End the process at once, and wait until it is gone."""
        if not self._gone.is_set():
            self._spawner.request_kill(self.pid)
        await self._gone.wait()
        self.close()

    def ended(self, code: int) -> None:
        """The process is gone; called by the spawner."""
        self._gone.set()
        if not self.exit_code.done():
            self.exit_code.set_result(code)

    def close(self) -> None:
        """Close the socket; a child that still runs ends by that."""
        self._writer.close()
        self._spawner.forget(self)


class ChildSpawner:
    """Owns the fork server and its children.

    Args:
        engine: "shard", or "instant" for the double that computes nothing.
        log_level: of the children's log, which goes to this process's standard error.
        instant_step_seconds: what each step of an instant engine is made to take.
    """

    def __init__(
        self, engine: str, *, log_level: str = "INFO", instant_step_seconds: float = 0.0
    ) -> None:
        self._engine = engine
        self._log_level = log_level
        self._step_seconds = instant_step_seconds
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._spawned: deque[asyncio.Future[int]] = deque()
        self._children: dict[int, EngineChild] = {}
        self._open: set[EngineChild] = set()
        self._early_exits: dict[int, int] = {}
        self._warm = asyncio.Event()

    async def start(self) -> None:
        """Start the fork server; it loads its libraries in the background."""
        self._warm = asyncio.Event()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "uellm_worker.engine.forkserver",
                f"--control-fd={theirs.fileno()}",
                f"--engine={self._engine}",
                f"--log-level={self._log_level}",
                f"--step-seconds={self._step_seconds}",
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
            )
        self._control = ours
        self._listener = asyncio.create_task(self._listen(ours))

    async def warm(self) -> None:
        """Wait until the libraries are loaded: from then on a child starts in milliseconds.

        Raises:
            ConnectionError: if the fork server ended instead; its own words are in the log.
        """
        assert self._listener is not None, "not started"  # noqa: S101
        warm = asyncio.create_task(self._warm.wait())
        await asyncio.wait({warm, self._listener}, return_when=asyncio.FIRST_COMPLETED)
        warm.cancel()
        if not self._warm.is_set():
            raise ConnectionResetError("the fork server ended while it loaded its libraries")

    async def spawn(self) -> EngineChild:
        """A new child, empty; the first one waits for the fork server's libraries.

        Raises:
            OSError: if there is no room for another process, or the fork server ended.
        """
        if self._listener is None or self._listener.done():
            await self.close()
            await self.start()
        assert self._control is not None  # noqa: S101 (set by start)
        ours, theirs = socket.socketpair()
        try:
            spawned = asyncio.get_running_loop().create_future()
            with theirs:
                socket.send_fds(self._control, [REQUEST.pack(SPAWN, 0)], [theirs.fileno()])
            self._spawned.append(spawned)
            pid = await spawned
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        child = EngineChild(pid, reader, writer, self)
        self._children[pid] = child
        self._open.add(child)
        if pid in self._early_exits:
            self._ended(pid, self._early_exits.pop(pid))
        return child

    def request_kill(self, pid: int) -> None:
        """Have the fork server kill a child; it alone knows that the pid is still that child's."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(REQUEST.pack(KILL, pid))

    def forget(self, child: EngineChild) -> None:
        """A child's socket was closed."""
        self._open.discard(child)

    async def close(self) -> None:
        """Kill every child and the fork server, and wait until they are gone."""
        await asyncio.gather(*(child.kill() for child in tuple(self._children.values())))
        for child in tuple(self._open):
            child.close()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # It may be importing still, and has nothing to save.
            await self._process.wait()
        self._control = self._process = self._listener = None

    async def _listen(self, control: socket.socket) -> None:
        """Take in the fork server's replies until it is gone."""
        loop = asyncio.get_running_loop()
        pending = b""
        try:
            while data := await loop.sock_recv(control, 4096):
                pending += data
                while len(pending) >= REPLY.size:
                    self._take(*REPLY.unpack_from(pending))
                    pending = pending[REPLY.size :]
        except OSError:
            pass  # Gone as well.
        finally:
            # The kernel kills the children of a fork server that dies.
            while self._spawned:
                lost = self._spawned.popleft()
                if not lost.done():
                    lost.set_exception(ConnectionResetError("the fork server is gone"))
            for pid in tuple(self._children):
                self._ended(pid, -9)

    def _take(self, kind: int, pid: int, code: int) -> None:
        """One reply of the fork server."""
        if kind == WARM:
            self._warm.set()
            return
        if kind == EXITED:
            self._ended(pid, code)
            return
        spawned = self._spawned.popleft()
        if spawned.done():
            return  # Its caller was cancelled; the child notices that its socket is closed.
        if pid:
            spawned.set_result(pid)
        else:
            spawned.set_exception(OSError(code, os.strerror(code)))

    def _ended(self, pid: int, code: int) -> None:
        child = self._children.pop(pid, None)
        if child is None:
            self._early_exits[pid] = code
        else:
            child.ended(code)


def _environment() -> dict[str, str]:
    """The fork server's: nothing starts threads or CUDA while importing, nothing spins for long."""
    return {
        **WAITING,
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
