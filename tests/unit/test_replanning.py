"""When a deployer looks for better places, and that a fault is not met again at once."""

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from uellm_deployer.guard import Guard
from uellm_deployer.replanning import Replanner

from uellm.faults import Faults


class Looks:
    """Counts looks at how many copies there should be; each fails, if it is to."""

    def __init__(self, *, fail: bool) -> None:
        self.count, self._fail = 0, fail
        self.tasks: list[asyncio.Task[None]] = []

    async def look(self) -> None:
        self.count += 1
        if self._fail:
            raise ArithmeticError("of the scaler")

    def aside(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]


@pytest.mark.parametrize("fail", [False, True])
async def test_what_is_approved_is_done_at_once_and_a_fault_not_met_again_at_once(
    fail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(fail=fail)
    settings = SimpleNamespace(replan_seconds=60.0)
    tools: Any = SimpleNamespace(aside=looks.aside, settings=settings)
    # Nothing of it is placed anew: only how many copies there should be is looked at.
    approved = SimpleNamespace(
        approved=False,
        approved_copies=True,
        guard=Guard("m", Faults()),
        model=None,
        ending=False,
        replicas=[],
    )
    deployments: Any = {"m": approved}
    replanner = Replanner(tools, lambda: deployments)
    monkeypatch.setattr(replanner, "scaler", looks)
    for _ in range(5):
        replanner.turn(0.0)
        await asyncio.gather(*looks.tasks, return_exceptions=True)
    assert looks.count == (1 if fail else 5)
