"""Which service of a role acts: one at a time, by a lease with a fencing token."""

import asyncio
import time

from uellm.logs import logger
from uellm.service import Context
from uellm.streams.scripts import Scripts

_log = logger("leadership")
LEASE_SECONDS = 3.0
RENEW_SECONDS = 0.75


class Leadership:
    """The lease of the one that acts.

    Args:
        context: the service's.
        prefix: of the keys in Redis that the lease is for.

    Attributes:
        token: of the lease; 0 while another holds it.
        term: rises every time that this service begins to act, or does so again after its lease
            ran out. Within a term nobody else can have acted, even if Redis lost its data.
        leader: address of the holder, or "".
        changed: set when any of it changes; the listener clears it.
    """

    def __init__(self, context: Context, prefix: str) -> None:
        self._prefix = prefix
        self._scripts = Scripts(context.redis)
        self._me = f"{context.identity}@{context.address}"
        self._held_until = float("-inf")
        self.token = 0
        self.term = 0
        self.leader = ""
        self.changed = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether this service may act now.

        Judged by this process's own clock from before the lease was asked for, so that it ends
        here before it ends in Redis.
        """
        return self.token > 0 and time.monotonic() < self._held_until

    async def renew(self) -> None:
        """Take or renew the lease, then wait a while."""
        before = time.monotonic()
        lease_ms = round(LEASE_SECONDS * 1000)
        token, holder = await self._scripts("own", self._prefix, self._me, lease_ms)
        token, leader = int(token), holder.decode().rpartition("@")[2]
        resumed = bool(token) and not self.held
        self.term += resumed
        if token:
            self._held_until = before + LEASE_SECONDS
        if resumed or (token, leader) != (self.token, self.leader):
            if bool(token) != bool(self.token):
                _log.info("acts" if token else "stands by", leader=leader, token=token)
            self.token, self.leader = token, leader
            self.changed.set()
        await asyncio.sleep(RENEW_SECONDS)

    async def release(self) -> None:
        """Let go of the lease, for another to take at once."""
        self.token, self._held_until = 0, float("-inf")
        await self._scripts("own", self._prefix, self._me, 0)
