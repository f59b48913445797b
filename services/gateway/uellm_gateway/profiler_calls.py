"""Calls to the profilers: requests that come at the same time share one.

A unary call costs a gateway half as much as all the rest of a request. Under load most requests
come while a call is under way; they go together in the next.
"""

import asyncio
from typing import TypeAlias

import grpc

from uellm.v1 import profiler_pb2
from uellm.v1.profiler_pb2_grpc import ProfilerServiceStub
from uellm_gateway.peers import Peers

MOST_ITEMS = 64
CONCURRENT_CALLS = 2
"""One on its way while the next is put together."""

_Waiting: TypeAlias = tuple[
    profiler_pb2.ProfileItem, "asyncio.Future[profiler_pb2.ProfiledItem | None]"
]


class ProfilerCalls:
    """Asks the profilers in turn; one that fails is left alone for up to a second.

    Args:
        peers: the profilers.
        budget_seconds: longest time that a request waits.
    """

    def __init__(self, peers: Peers, budget_seconds: float) -> None:
        self._peers = peers
        self._budget_seconds = budget_seconds
        self._waiting: list[_Waiting] = []
        self._callers: set[asyncio.Task[None]] = set()

    async def profile(self, item: profiler_pb2.ProfileItem) -> profiler_pb2.ProfiledItem | None:
        """A profiler's answer, or None if there was none in time."""
        future: asyncio.Future[profiler_pb2.ProfiledItem | None]
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._callers) < CONCURRENT_CALLS:
            caller = asyncio.create_task(self._call_all(), name="profiler calls")
            self._callers.add(caller)
            caller.add_done_callback(self._callers.discard)
        try:
            async with asyncio.timeout(self._budget_seconds):
                return await future
        except TimeoutError:
            return None

    async def _call_all(self) -> None:
        while self._waiting:
            asked = [(item, future) for item, future in self._waiting if not future.done()]
            asked, self._waiting = asked[:MOST_ITEMS], asked[MOST_ITEMS:]
            if not asked:
                return
            answers = await self._call([item for item, _ in asked])
            for (_, future), answer in zip(asked, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _call(
        self, items: list[profiler_pb2.ProfileItem]
    ) -> list[profiler_pb2.ProfiledItem | None]:
        unanswered: list[profiler_pb2.ProfiledItem | None] = [None] * len(items)
        peer = self._peers.next()
        if peer is None:
            return unanswered
        request = profiler_pb2.ProfileRequest(items=items)
        stub = ProfilerServiceStub(peer.channel)
        try:
            # Ends before those who wait give up, so that the next finds the peer at rest.
            response = await stub.Profile(request, timeout=0.9 * self._budget_seconds)
        except grpc.aio.AioRpcError:
            peer.rest()
            return unanswered
        if len(response.items) != len(items):
            peer.rest()
            return unanswered
        peer.answered()
        return [item if item.HasField("profile") else None for item in response.items]
