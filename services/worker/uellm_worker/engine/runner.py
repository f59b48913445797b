"""What the engine loop and the child process need of whatever computes a stage."""

from collections.abc import Callable
from typing import Protocol

from uellm.v1.engine_pb2 import (
    BlockProbed,
    CopiesProbed,
    PrepareShard,
    ProbeBlock,
    ProbeCopies,
    ProbeLink,
    StepReport,
)
from uellm_worker.engine.capacity import Prepared
from uellm_worker.engine.group import Group
from uellm_worker.engine.inbox import Inbox
from uellm_worker.engine.link_probe import Carrier
from uellm_worker.engine.plan import StepPlan, StepResult

Progress = Callable[[int, int], None]
"""Called with (loaded bytes, total bytes) while weights are read."""
Tell = Callable[[StepReport], None]
"""Called with each step that a leader would say."""


class Runner(Protocol):
    """Computes steps for the loop, on stage 0, with or without further stages behind it.

    Every stage computes its part of every step in the order of submission, so that a slot may be
    given to another sequence while an older step with it is still under way.
    """

    @property
    def depth(self) -> int:
        """Steps worth having under way at once: one per stage."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begin a step: compute the first stage's part and pass it on.

        Raises:
            PeerLostError: a stage behind this one is gone.
        """
        ...

    def collect(self, *, patient: bool = True) -> StepResult | None:
        """What came of the oldest step under way; waits for it.

        Args:
            patient: False: stop waiting when the agent has a command, which may bring work for
                the stages that idle.

        Returns:
            The result; None if a command came first.

        Raises:
            PeerLostError: a stage behind this one is gone.
            LeaveRequestedError: the agent asked to leave while the step was under way.
        """
        ...


class Member(Runner, Protocol):
    """A stage that has joined its peers: a runner on stage 0, ``follow`` on the others."""

    def follow(self, meta: bytes) -> None:
        """Compute the step that the stage before announced, and pass it on.

        Raises:
            PeerLostError: another stage is gone.
        """
        ...

    def close(self) -> None:
        """Give up the data plane; the weights stay."""
        ...


class Engine(Protocol):
    """What a child can be: the shard engine, or its instant double."""

    def prepare(self, command: PrepareShard, progress: Progress) -> Prepared:
        """Load a stage, keeping what an earlier one has in common with it.

        Raises:
            ModelFilesError: the checkpoint is missing, broken or of a kind that is not served.
        """
        ...

    def offer(self, bind_host: str) -> str:
        """On stage 0 of several: what the others need to join the data plane, opened now."""
        ...

    def join(self, group: Group | None, inbox: Inbox) -> Member:
        """Join the data plane; ``group`` is None for a replica of one stage.

        Raises:
            PeerLostError: the others did not come.
        """
        ...

    def probe_block(self, command: ProbeBlock, tell: Tell) -> BlockProbed:
        """Measure layers of a model; nothing is loaded afterwards.

        Args:
            command: what.
            tell: told the steps that are timed of a leader.

        Raises:
            ModelFilesError: as of ``prepare``.
        """
        ...

    def probe_copies(self, command: ProbeCopies) -> CopiesProbed:
        """Measure copies between devices."""
        ...

    def place(self, device_id: str) -> str:
        """A device's name in the world, as ``Prepared.device`` has it."""
        ...

    def carrier(self, group: Group, inbox: Inbox, command: ProbeLink) -> Carrier:
        """The data plane of a group of two, to be measured."""
        ...
