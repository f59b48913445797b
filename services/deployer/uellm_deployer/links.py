"""The ways to the workers: one channel each, watched, so that a dead worker is noticed at once."""

import asyncio
import functools
from collections.abc import Callable

import grpc

from uellm.rpc import channel
from uellm.service import Context
from uellm.v1 import files_pb2_grpc, worker_pb2_grpc
from uellm_deployer.workers import Worker

_READY = grpc.ChannelConnectivity.READY
_FAILING = grpc.ChannelConnectivity.TRANSIENT_FAILURE


class Links:
    """Channels to the workers that have registered.

    Args:
        context: to run the watching with.
        changed: called when a worker becomes unreachable, or reachable again.
    """

    def __init__(self, context: Context, changed: Callable[[], None]) -> None:
        self._context = context
        self._changed = changed
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._watching: dict[str, tuple[Worker, asyncio.Task[None]]] = {}

    def stub(self, worker: Worker) -> "worker_pb2_grpc.WorkerServiceAsyncStub":
        """How to call a worker."""
        return worker_pb2_grpc.WorkerServiceStub(self._channel(worker.address))

    def files(self, worker: Worker) -> "files_pb2_grpc.FilesServiceAsyncStub":
        """How to ask a worker for model files."""
        return files_pb2_grpc.FilesServiceStub(self._channel(worker.address))

    def watch(self, worker: Worker) -> None:
        """Keep ``worker.reachable`` up to date from now on."""
        watched = self._watching.get(worker.worker)
        if watched is not None and watched[0] is worker:
            return
        if watched is not None:
            watched[1].cancel()
        task = self._context.aside(self._watch(worker), f"link to {worker.worker}")
        self._watching[worker.worker] = (worker, task)
        task.add_done_callback(functools.partial(self._unwatched, worker.worker))

    def _unwatched(self, name: str, task: asyncio.Task[None]) -> None:
        if name in self._watching and self._watching[name][1] is task:
            del self._watching[name]

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = channel(address)
        return self._channels[address]

    async def _watch(self, worker: Worker) -> None:
        way = self._channel(worker.address)
        while True:
            state = way.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.SHUTDOWN:
                return
            if state in (_READY, _FAILING) and worker.reachable is not (state is _READY):
                worker.reachable = state is _READY
                self._changed()
            await way.wait_for_state_change(state)

    async def keep(self, workers: list[Worker]) -> None:
        """Close the channels to all others."""
        wanted = {worker.address for worker in workers}
        names = {worker.worker for worker in workers}
        for name in [name for name in self._watching if name not in names]:
            self._watching.pop(name)[1].cancel()
        for address in [address for address in self._channels if address not in wanted]:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        """Close all."""
        await self.keep([])
