"""The smallest service there is, for tests of the runner: it echoes, fails and waits as told.

Run as a module it is a process of its own, which writes what it does to its standard output.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, ClassVar

import grpc
from pydantic import Field

from uellm.config import ServiceSettings
from uellm.core.errors import ConfigurationError, NotFoundError
from uellm.service import Context, main, serve
from uellm.v1 import worker_pb2, worker_pb2_grpc

NAME = "uellm.v1.WorkerService"


class EchoSettings(ServiceSettings):
    """Settings of the smallest service; it takes the profiler's place."""

    role: ClassVar[str] = "profiler"

    fail_start: bool = Field(False, description="Raise when started.")
    drain_wait: float = Field(0.0, description="Seconds that draining takes.")


class EchoServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Echoes a probe, or raises what its payload names; the other methods are not offered.

    Args:
        go_on: what a call waits for that is held.
    """

    waiting = 0

    def __init__(self, go_on: asyncio.Event) -> None:
        self._go_on = go_on

    async def Probe(self, request: worker_pb2.ProbeRequest, context: Any) -> Any:
        """Answer, fail or wait, as the payload says."""
        match request.payload:
            case b"secret":
                raise RuntimeError("a secret that nobody may see")
            case b"not found":
                raise NotFoundError("no such thing", field="payload", metadata={"name": "thing"})
            case b"redis":
                raise ConnectionResetError("redis.internal:6379 went away")
            case b"abort":
                await context.abort(grpc.StatusCode.OUT_OF_RANGE, "said by the handler")
            case b"wait":
                EchoServicer.waiting += 1
                await asyncio.Event().wait()
        return worker_pb2.ProbeResponse(payload=request.payload)

    async def Prepare(
        self, request: worker_pb2.PrepareRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrepareResponse]:
        """Two messages, then what the replica's name says; "hold" holds the second until told."""
        del context
        replica = request.assignment.replica
        yield worker_pb2.PrepareResponse(loaded_bytes=1)
        if replica == "hold":
            await self._go_on.wait()
        yield worker_pb2.PrepareResponse(loaded_bytes=2)
        if replica == "secret":
            raise RuntimeError("a secret that nobody may see")
        if replica == "not found":
            raise NotFoundError("no such thing", field="assignment.replica")


class Echo:
    """See ``uellm.service.Application``; notes the order in which it is called.

    Attributes:
        go_on: lets calls that are held go on.
        drained: ends its draining before the time.
    """

    service_names: tuple[str, ...] = (NAME,)

    def __init__(
        self, settings: EchoSettings, context: Context, note: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self.context = context
        self.go_on, self.drained = asyncio.Event(), asyncio.Event()
        self._note = note

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        self._note("add")
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(
            EchoServicer(self.go_on),  # type: ignore[abstract]
            server,
        )

    async def start(self) -> None:
        """Start a loop that runs until the end."""
        self._note("start")
        if self._settings.fail_start:
            raise ConfigurationError("told to fail; set UELLM_PROFILER_FAIL_START=false")
        self.context.spawn(self._work(), "work")

    async def _work(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self._note("work ended")

    async def drain(self) -> None:
        """Take as long as told."""
        self._note("drain")
        with suppress(TimeoutError):
            await asyncio.wait_for(self.drained.wait(), self._settings.drain_wait)
        self._note("drained")

    async def close(self) -> None:
        """Nothing to let go of."""
        self._note("close")


def _say(what: str) -> None:
    print(what, flush=True)  # noqa: T201


async def start(settings: EchoSettings, *, ready: Callable[[str], None]) -> None:
    """Run as a process."""

    def serving(address: str) -> None:
        ready(address)
        _say("settled" if gc.get_freeze_count() else "unsettled")
        _say(address)

    await serve(settings, lambda context: Echo(settings, context, _say), ready=serving)


if __name__ == "__main__":
    main(EchoSettings, start)
