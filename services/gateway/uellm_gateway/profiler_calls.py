"""Calls to the profilers: requests that come at the same time share one.

A unary call costs a gateway half as much as all the rest of a request. Under load most requests
come while a call is under way; they go together in the next, soon after.
"""

import asyncio
from dataclasses import dataclass

import grpc

from uellm.v1 import profiler_pb2
from uellm.v1.profiler_pb2_grpc import ProfilerServiceStub
from uellm_gateway.peers import Peers

MOST_ITEMS = 64
CONCURRENT_CALLS = 2
"""One on its way while the next is put together."""
MOST_CALLS = 16
"""Under way at a time, where they take long."""
LINGER_SECONDS = 0.005
"""Requests wait so long for one of the calls under way to end, to share the next with others. A
profiler that reads prompts with care takes much longer."""
RETURN_SHARE = 0.1
"""Of the budget, what calls end before those who wait give up: the next finds the peer at rest."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    item: profiler_pb2.ProfileItem
    answer: "asyncio.Future[profiler_pb2.ProfiledItem | None]"
    latest: float
    """When its call has to have ended, by the loop's clock."""


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
        self._lingering: asyncio.TimerHandle | None = None

    async def profile(self, item: profiler_pb2.ProfileItem) -> profiler_pb2.ProfiledItem | None:
        """A profiler's answer, or None if there was none in time."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + (1 - RETURN_SHARE) * self._budget_seconds
        waiting = _Waiting(item, loop.create_future(), latest)
        self._waiting.append(waiting)
        if len(self._callers) < CONCURRENT_CALLS:
            self._begin()
        elif self._lingering is None:
            self._lingering = loop.call_later(LINGER_SECONDS, self._no_longer)
        try:
            async with asyncio.timeout(self._budget_seconds):
                return await waiting.answer
        except TimeoutError:
            return None

    def _begin(self) -> None:
        caller = asyncio.create_task(self._call_all(), name="profiler calls")
        self._callers.add(caller)
        caller.add_done_callback(self._callers.discard)

    def _no_longer(self) -> None:
        """Call for those that still wait."""
        self._lingering = None
        for _ in range(0, len(self._waiting), MOST_ITEMS):
            if len(self._callers) < MOST_CALLS:
                self._begin()

    async def _call_all(self) -> None:
        while self._waiting:
            now = asyncio.get_running_loop().time()
            asked = [each for each in self._waiting if not each.answer.done()]
            # A call that has no time would only fail, and take others with it.
            for each in asked:
                if each.latest - now < RETURN_SHARE * self._budget_seconds:
                    each.answer.set_result(None)
            asked = [each for each in asked if not each.answer.done()]
            asked, self._waiting = asked[:MOST_ITEMS], asked[MOST_ITEMS:]
            if not asked:
                return
            answers = await self._call([each.item for each in asked], asked[0].latest - now)
            for each, answer in zip(asked, answers, strict=True):
                if not each.answer.done():
                    each.answer.set_result(answer)

    async def _call(
        self, items: list[profiler_pb2.ProfileItem], seconds: float
    ) -> list[profiler_pb2.ProfiledItem | None]:
        unanswered: list[profiler_pb2.ProfiledItem | None] = [None] * len(items)
        peer = self._peers.next()
        if peer is None:
            return unanswered
        request = profiler_pb2.ProfileRequest(items=items)
        stub = ProfilerServiceStub(peer.channel)
        try:
            response = await stub.Profile(request, timeout=seconds)
        except grpc.aio.AioRpcError:
            peer.rest()
            return unanswered
        if len(response.items) != len(items):
            peer.rest()
            return unanswered
        peer.answered()
        return [item if item.HasField("profile") else None for item in response.items]
