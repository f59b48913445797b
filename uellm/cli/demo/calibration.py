"""Deadlines for a machine whose speed is known only once it runs.

The demo's deadlines say how urgent its prompts are relative to each other. One factor makes them
seconds: the least for which deadline order can keep all of them, by a simulation with room to
spare. Whether it does keep them is then measured, not simulated.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from uellm.demo.prompts import DemoPrompt

ROOM = 1.3
"""Answers may take this much longer than measured."""
FIXED_SECONDS = 0.3
"""For what does not grow with the answer: the way through the mesh, and a machine that is busy."""
LENGTH_SHARE = 0.85
"""Of the length limit: no right answer of the demo's prompts is longer."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and what follows from it.

    Attributes:
        seconds_per_token: of one answer while all slots are taken.
        scale: factor on the prompts' deadlines.
    """

    seconds_per_token: float
    scale: float

    def deadline_seconds(self, prompt: DemoPrompt) -> float:
        """A prompt's deadline on this machine."""
        return round(prompt.deadline_s * self.scale, 2)


def finish_times(
    order: Sequence[int], seconds: Sequence[float], slots: int, busy_seconds: float
) -> dict[int, float]:
    """When each job ends if every free slot takes the next in order; all are taken at first."""
    free = [busy_seconds] * slots
    ends: dict[int, float] = {}
    for job in order:
        ends[job] = heapq.heappop(free) + seconds[job]
        heapq.heappush(free, ends[job])
    return ends


def calibrate(
    prompts: Sequence[DemoPrompt], slots: int, seconds_per_token: float, busy_tokens: int
) -> Calibration:
    """The least scale with room to spare.

    Args:
        prompts: all of the burst.
        slots: how many answers run at once.
        seconds_per_token: of one answer while all slots are taken.
        busy_tokens: what every slot still has to do when the burst arrives.
    """
    urgency = sorted(range(len(prompts)), key=lambda i: prompts[i].deadline_s)
    seconds = [LENGTH_SHARE * p.max_tokens * seconds_per_token for p in prompts]
    ends = finish_times(urgency, seconds, slots, busy_tokens * seconds_per_token)
    scale = max((ROOM * ends[i] + FIXED_SECONDS) / prompts[i].deadline_s for i in ends)
    return Calibration(seconds_per_token, scale)
