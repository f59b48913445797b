"""A child process as the stage that it serves sees it; it may outlive stages of old generations."""

import asyncio
from typing import Protocol

from uellm.logs import logger
from uellm.v1 import engine_pb2
from uellm_worker.children import EngineChild

_log = logger("child")
LEAVE_SECONDS = 2.0
"""How long a child may take to leave its group before it is replaced."""


class Listener(Protocol):
    """Who is told what a child says."""

    async def hear(self, event: engine_pb2.EngineEvent) -> None:
        """The child said something; the next event waits for this."""
        ...

    def lost(self, exit_code: int) -> None:
        """The child is gone."""
        ...


class StageChild:
    """A child process and its present listener.

    Args:
        child: freshly spawned.
    """

    def __init__(self, child: EngineChild) -> None:
        self._child = child
        self._listener: Listener | None = None
        self._left = asyncio.Event()
        self._gone = False

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the child still runs, as far as is known."""
        return not self._gone and not self._child.exit_code.done()

    def serve(self, listener: Listener | None) -> None:
        """From now on tell ``listener``; the one before hears nothing more."""
        self._listener = listener

    async def run(self) -> None:
        """Pass on the child's events until it is gone."""
        async for event in self._child.events():
            if event.WhichOneof("event") == "left":
                self._left.set()
            elif self._listener is not None:
                await self._listener.hear(event)
        exit_code = await self._child.exit_code
        self._gone = True
        if self._listener is not None:
            self._listener.lost(exit_code)

    async def send(self, command: engine_pb2.EngineCommand) -> None:
        """Send a command.

        Raises:
            ConnectionError: if the child is gone.
        """
        await self._child.send(command)

    async def leave(self) -> bool:
        """Have the child drop its peers and sequences; False if it does not answer in time."""
        self._left.clear()
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self.send(engine_pb2.EngineCommand(leave=engine_pb2.LeaveGroup()))
                await self._left.wait()
        except (TimeoutError, ConnectionError):
            _log.warning("a child did not leave its group; replacing it", pid=self.pid)
            return False
        return True

    async def kill(self) -> None:
        """End the child; its listener is not told."""
        self.serve(None)
        await self._child.kill()
