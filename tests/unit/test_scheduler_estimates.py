"""Estimates beside decisions: however many ask, the scheduler goes on with its work."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from uellm_scheduler.servicer import SchedulerServicer

from tests.support.dispatching import NOW
from uellm.core.request import Promise
from uellm.v1 import common_pb2, scheduler_pb2

SECONDS = 0.02
"""What an estimate takes."""
QUANTILES = common_pb2.QuantileFunction(levels=[0.5], values=[10.0])
ASKED = scheduler_pb2.SchedulerServiceEstimateRequest(
    model="m", profile=common_pb2.ResourceProfile(output_tokens=QUANTILES)
)


class Owner:
    """Computes, for a while."""

    def estimate(self, asked: Any) -> tuple[Promise, None]:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            pass
        return Promise(NOW, NOW, NOW, NOW, None, 0, "fcfs", "", 1, 1), None


async def test_half_of_the_time_is_left_to_decisions() -> None:
    ownership: Any = SimpleNamespace(owned={"m": Owner()})
    nothing: Any = SimpleNamespace()
    servicer = SchedulerServicer(nothing, ownership, nothing)
    began = time.monotonic()
    answers = await asyncio.gather(*(servicer.Estimate(ASKED, nothing) for _ in range(8)))
    assert all(answer.promise.policy == "fcfs" for answer in answers)
    assert time.monotonic() - began >= 2 * 8 * SECONDS
