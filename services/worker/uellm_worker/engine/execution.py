"""What a step computes of those that run: the two ways to execute."""

from collections.abc import Callable
from typing import Protocol

from uellm.policy.views import StepDecision
from uellm_worker.engine.capacity import Capacity
from uellm_worker.engine.continuous import Continuous
from uellm_worker.engine.flights import Padding, Share
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.roster import Roster
from uellm_worker.engine.static import Static

EXECUTIONS = ("continuous", "static")
"""Names of the ways."""


class Execution(Protocol):
    """A way to execute. It makes room for what it has computed, and preempts for that."""

    @property
    def name(self) -> str:
        """One of ``EXECUTIONS``."""
        ...

    @property
    def depth(self) -> int:
        """Steps worth having under way at once."""
        ...

    @property
    def admits(self) -> bool:
        """Sequences may be given slots now."""
        ...

    def account(self) -> KvManager:
        """The account of the KV cache, with nothing in it."""
        ...

    def next_step(
        self, roster: Roster, decision: StepDecision, rows: int, burden: Callable[[int], int]
    ) -> tuple[list[Share], list[Padding]]:
        """What the next step computes of whom, and what for nobody.

        Args:
            roster: who runs; somebody may lose a slot.
            decision: how many tokens of prompts all steps under way compute, and whose first.
            rows: most tokens in all.
            burden: steps under way of a group.
        """
        ...

    def start_again(self) -> None:
        """All sequences have lost their slots."""
        ...


def execution_of(name: str, capacity: Capacity, depth: int) -> Execution:
    """The execution of that name.

    Args:
        name: one of ``EXECUTIONS``; "" for the first.
        capacity: of the replica.
        depth: steps that the replica can have under way at once.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in ("", "continuous"):
        return Continuous(capacity, depth)
    if name == "static":
        return Static(capacity)
    raise ValueError(f"execution {name!r}: one of {', '.join(EXECUTIONS)}")
