"""A child process as the stage that it serves sees it; it may outlive stages of old generations."""

import asyncio
import contextlib
from typing import Protocol

from uellm.faults import described
from uellm.logs import logger
from uellm.v1 import engine_pb2
from uellm_worker.children import EngineChild

_log = logger("child")
LEAVE_SECONDS = 2.0
"""How long a child may take to leave its group before it is replaced."""
BEAT_SECONDS = 1.0
MOST_SILENT_BEATS = 5
"""A child that serves and leaves so many questions in a row unanswered is stopped or stuck. Beats
are counted, not seconds: what stops the agent as well does not count against the child."""
MOST_STEPLESS_BEATS = 300
"""A child that owes steps and ends none for so long is stuck in one; the longest that a slow
machine takes is far below."""


class Listener(Protocol):
    """Who is told what a child says."""

    async def hear(self, event: engine_pb2.EngineEvent) -> None:
        """The child said something; the next event waits for this."""
        ...

    def lost(self, exit_code: int) -> None:
        """The child is gone."""
        ...

    @property
    def serving(self) -> bool:
        """Whether the child has to answer: loading may keep it from that."""
        ...

    @property
    def owed_steps(self) -> bool:
        """Whether the child has sequences to compute."""
        ...

    def fail(self, reason: str) -> None:
        """The child is no good any more, and is being ended."""
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
        self._telling = False
        self._silent_beats = 0
        self._stepless_beats = 0

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
        """Pass on the child's events until it is gone.

        Raises:
            Exception: what nobody foresaw in who listens; the child is ended, its listener failed.
        """
        watch = asyncio.create_task(self._watch(), name=f"watch of child {self.pid}")
        try:
            await self._hear()
        except Exception as error:
            self._gone = True
            if self._listener is not None:
                self._listener.fail(f"LEADER_FAILED: {by_fault(error)}")
            await self.kill()
            raise
        finally:
            watch.cancel()
        exit_code = await self._child.exit_code
        self._gone = True
        if self._listener is not None:
            self._listener.lost(exit_code)

    async def _hear(self) -> None:
        async for event in self._child.events():
            self._silent_beats = 0
            kind = event.WhichOneof("event")
            if kind == "step":
                self._stepless_beats = 0
            if kind == "left":
                self._left.set()
            elif kind != "alive" and self._listener is not None:
                self._telling = True
                try:
                    await self._listener.hear(event)
                finally:
                    self._telling = False

    async def _watch(self) -> None:
        """End a child that is stopped or stuck: nobody else would notice one without peers."""
        ping = engine_pb2.EngineCommand(ping=engine_pb2.Ping())
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self.send(ping)
            listener = self._listener
            if listener is None or not listener.serving or self._telling:
                # While the listener is busy, nobody reads what the child says.
                self._silent_beats = self._stepless_beats = 0
                continue
            self._silent_beats += 1
            self._stepless_beats = self._stepless_beats + 1 if listener.owed_steps else 0
            if self._silent_beats > MOST_SILENT_BEATS:
                why = f"its process {self.pid} does not answer"
            elif self._stepless_beats > MOST_STEPLESS_BEATS:
                why = f"its process {self.pid} does not come to the end of a step"
            else:
                continue
            _log.error("a child hangs; ending it", pid=self.pid, reason=why)
            listener.fail(f"CHILD_HUNG: {why}")
            await self.kill()
            return

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


def by_fault(error: Exception) -> str:
    """What says that a stage failed by a fault of the program."""
    return f"a fault of uellm, {described(error)}; the worker's log has more"
