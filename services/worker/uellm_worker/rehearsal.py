"""A leader's work for a step, done without requests, so that a probe can time it."""

import time

from uellm.core.errors import AbortedError
from uellm.streams.connection import UNREACHABLE
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append
from uellm.v1 import engine_pb2, inference_pb2

_LEASE_MS = 1000


class Rehearsal:
    """Says steps to Redis as a leader does, under the name of a replica that nobody routes to.

    Redis takes them for those of a leader that lost its route, and keeps nothing of them. Steps
    that do not come there do not count.

    Args:
        queue: of no model.
    """

    def __init__(self, queue: LeaderQueue) -> None:
        self._queue = queue
        self._steps = 0
        self._begun = self._ended = 0.0

    @property
    def seconds(self) -> float:
        """Processor time of this process for a step; 0 before the second one."""
        return (self._ended - self._begun) / (self._steps - 1) if self._steps > 1 else 0.0

    async def hear(self, step: engine_pb2.StepReport) -> None:
        """Take in a step, from its arrival until Redis has answered."""
        operations = [
            Append(out.request_id, out.generation, inference_pb2.Tokens(ids=out.token_ids))
            for out in step.outputs
            if out.token_ids
        ]
        try:
            await self._queue.append(
                "rehearsal", 0, _LEASE_MS, report=step.report, operations=operations
            )
        except AbortedError:
            pass
        except UNREACHABLE:
            return
        # The first one loads the script, and begins to count.
        self._steps += 1
        self._ended = time.process_time()
        self._begun = self._begun or self._ended
