"""The services that a gateway calls: live ones of a role, in turn, each over one channel."""

import time

import grpc

from uellm.rpc import channel
from uellm.streams.registry import Registry

FIRST_REST_SECONDS, REST_SECONDS = 0.1, 1.0
"""How long a peer that failed is left alone: twice as long with each failure in a row, at most."""


class Peer:
    """One live service."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel: grpc.aio.Channel = channel(address)
        # Now and not with the first call, which is not to wait for it.
        self.channel.get_state(try_to_connect=True)
        self._rests_until = 0.0
        self._rest_seconds = FIRST_REST_SECONDS

    @property
    def resting(self) -> bool:
        """Whether it failed just now."""
        return time.monotonic() < self._rests_until

    def rest(self) -> None:
        """It failed: leave it alone for a while."""
        if self.resting:  # calls that were under way together failed together
            return
        self._rests_until = time.monotonic() + self._rest_seconds
        self._rest_seconds = min(2 * self._rest_seconds, REST_SECONDS)

    def answered(self) -> None:
        """It did not fail."""
        self._rest_seconds = FIRST_REST_SECONDS


class Peers:
    """The live services of one role."""

    def __init__(self, registry: Registry, role: str) -> None:
        self._registry = registry
        self._role = role
        self._peers: list[Peer] = []
        self._turn = 0

    async def refresh(self) -> None:
        """Read the registry; channels of services that are gone are closed."""
        addresses = [service.address for service in await self._registry.find(self._role)]
        known = {peer.address: peer for peer in self._peers}
        self._peers = [
            known.pop(address) if address in known else Peer(address)
            for address in dict.fromkeys(addresses)
        ]
        for peer in known.values():
            await peer.channel.close(grace=1.0)

    def next(self) -> Peer | None:
        """The next that did not fail just now, or None."""
        for _ in self._peers:
            self._turn = (self._turn + 1) % len(self._peers)
            if not self._peers[self._turn].resting:
                return self._peers[self._turn]
        return None

    async def close(self) -> None:
        """Close all channels."""
        for peer in self._peers:
            await peer.channel.close()
        self._peers = []
