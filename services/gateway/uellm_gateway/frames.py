"""A gateway's frame streams: one reader per model that has watchers.

A frame is a wake-up and may be lost: the stream is trimmed, expires, and goes with Redis. So once
a second the records of watchers that heard nothing are compared with what they have.
"""

import asyncio
import time

from uellm.logs import logger
from uellm.service import Context
from uellm.streams.connection import BLOCK_MS
from uellm_gateway.watching import AnswerSource, Watcher

TTL_SECONDS = 30
KEEP_ALIVE_CHECKS = 5
CHECK_SECONDS = 1.0
LINGER_SECONDS = 30.0
CHECKED_AT_ONCE = 500
BUSY_SECONDS = 0.001
_FIRST_QUIET_CHECKS = (2, 3, 5)
_QUIET_CHECKS = 8
_log = logger("frames")


class ModelFrames:
    """Routes one model's frames to the watchers of its requests.

    Args:
        context: the service's.
        source: the model's queues.
        gateway: this gateway.
    """

    def __init__(self, context: Context, source: AnswerSource, gateway: str) -> None:
        self.source = source
        self._context = context
        self._gateway = gateway
        self._watchers: dict[str, list[Watcher]] = {}
        self._after = "0-0"
        self._reader: asyncio.Task[None] | None = None
        self._used_at = 0.0
        self._checks = 0

    async def open(self) -> None:
        """Have frames come from now on; call before a request is subscribed to."""
        self._used_at = time.monotonic()
        if self._reader is None:
            await self.source.queue.open_frames(self._gateway, TTL_SECONDS)
        if self._reader is None:
            reading = self._context.repeat(self._read, f"frames of {self.source.queue.model}")
            self._reader = self._context.aside(reading, "frames")

    @property
    def in_use(self) -> bool:
        """Whether anybody watches, or did a moment ago."""
        return bool(self._watchers) or time.monotonic() - self._used_at < LINGER_SECONDS

    async def close(self) -> None:
        """Stop reading; the stream goes by itself, or now if Redis is there."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
            await self.source.queue.close_frames(self._gateway)

    def add(self, watcher: Watcher) -> None:
        """Route a request's frames to a watcher."""
        self._watchers.setdefault(watcher.answer.request_id, []).append(watcher)

    def remove(self, watcher: Watcher) -> bool:
        """Stop that; returns whether nobody here watches the request any more."""
        request_id = watcher.answer.request_id
        watchers = self._watchers.get(request_id, [])
        if watcher in watchers:
            watchers.remove(watcher)
        if not watchers:
            self._watchers.pop(request_id, None)
        return not watchers

    def watches(self, request_id: str) -> bool:
        """Whether anybody here watches a request."""
        return request_id in self._watchers

    async def _read(self) -> None:
        after = self._after
        begun = time.monotonic()
        place, frames = await self.source.queue.read_frames(self._gateway, after, BLOCK_MS)
        if self._after == after:
            self._after = place
        watchers = self._watchers
        for frame in frames:
            for entry in frame.entries:
                for watcher in watchers.get(entry.request_id, ()):
                    watcher.push(entry)
        if time.monotonic() - begun < BUSY_SECONDS:
            # Frames come faster than reading them one by one pays.
            await asyncio.sleep(BUSY_SECONDS)

    async def check(self) -> None:
        """Keep the stream alive; find watchers that missed something."""
        if not self._watchers:
            return
        self._checks += 1
        if self._checks % KEEP_ALIVE_CHECKS == 0:
            await self.source.queue.open_frames(self._gateway, TTL_SECONDS)
        due = self._due()
        missed = 0
        for start in range(0, len(due), CHECKED_AT_ONCE):
            watchers = due[start : start + CHECKED_AT_ONCE]
            ids = [watcher.answer.request_id for watcher in watchers]
            standings = await self.source.queue.standings(ids)
            for watcher, standing in zip(watchers, standings, strict=True):
                if standing is None or standing.ended or standing.tokens > watcher.next_offset:
                    missed += 1
                    watcher.lost_frames()
        if missed:
            _log.info("frames were lost; reading the log", watchers=missed)
            await self.source.queue.open_frames(self._gateway, TTL_SECONDS)
            self._after = "0-0"

    def _due(self) -> list[Watcher]:
        """Watchers that heard nothing since the last check; those long silent every few."""
        due: list[Watcher] = []
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.quiet_checks += 1
                checks = watcher.quiet_checks
                if checks in _FIRST_QUIET_CHECKS or checks % _QUIET_CHECKS == 0:
                    due.append(watcher)
        return [watcher for watcher in due if watcher.up_to_date]
