"""A replica as the deployer runs it: where its stages are, and what is being done about it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from uellm.convert import device_shards, timestamp
from uellm.convert_topology import planned_to_proto
from uellm.placement.views import PlannedReplica
from uellm.v1 import topology_pb2

_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 10.0)


def backoff(failures: int) -> float:
    """How long to wait after so many failures in a row, in seconds."""
    return _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS)) - 1] if failures > 0 else 0.0


class Phase(Enum):
    """What is being done about a replica."""

    IDLE = "idle"
    """Nothing: it is to be formed."""
    FORMING = "forming"
    READY = "ready"
    MOVING = "moving"
    """It finishes what it runs, to be placed anew."""
    ENDING = "ending"


@dataclass(slots=True)
class Replica:
    """One whole copy of a model. Times are monotonic seconds, unless they say otherwise.

    Attributes:
        id: stable over generations.
        index: its place among the copies.
        phase: what is being done about it.
        epoch: the generation that is routed to; 0: none yet.
        assignments: its stages in order, of the generation that serves, forms or served last.
        assigned: FORMING, and they are of the generation that forms: its place is chosen.
        planned: the same as planned.
        fence: a generation that a worker is known to hold; a new one is above it.
        incarnations: of the workers when it became READY; empty if that was before this deployer.
        trusted_at: when all stages were last known to serve.
        since: when it began to need forming.
        patience_seconds: how long from then to wait for more devices.
        grow_at: not spread over more devices before.
        retry_at: not formed again before.
        failures: in a row.
        message: what it waits for, or why it failed.
        failed: it cannot be formed as things are.
        replaces: the replica that it takes over from once it serves; "": none.
        moved_at: when it was last begun to be placed anew without being asked to, by Redis TIME:
            the next deployer has it too.
        dismissed: it is to end: another one has taken over, or it is not needed any more.
    """

    id: str
    index: int
    phase: Phase = Phase.IDLE
    epoch: int = 0
    assignments: tuple[topology_pb2.ShardAssignment, ...] = ()
    assigned: bool = False
    planned: PlannedReplica | None = None
    fence: int = 0
    incarnations: dict[str, int] = field(default_factory=dict)
    trusted_at: float = 0.0
    since: float = 0.0
    patience_seconds: float = 0.0
    grow_at: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    message: str = ""
    failed: bool = False
    replaces: str = ""
    moved_at: tuple[float, ...] = ()
    dismissed: bool = False

    @property
    def workers(self) -> list[str]:
        """The workers of its stages, in stage order."""
        return [worker_of(assignment) for assignment in self.assignments]

    @property
    def num_devices(self) -> int:
        """Devices that it stands on: one for each stage that was planned."""
        return num_devices(self.assignments)

    def to_proto(self) -> topology_pb2.Replica:
        """As it is published."""
        state = {
            Phase.IDLE: topology_pb2.REPLICA_STATE_FORMING,
            Phase.FORMING: topology_pb2.REPLICA_STATE_FORMING,
            Phase.READY: topology_pb2.REPLICA_STATE_READY,
            Phase.MOVING: topology_pb2.REPLICA_STATE_DRAINING,
            Phase.ENDING: topology_pb2.REPLICA_STATE_DRAINING,
        }[self.phase]
        if self.failed and self.phase is Phase.IDLE:
            state = topology_pb2.REPLICA_STATE_FAILED
        return topology_pb2.Replica(
            id=self.id,
            epoch=self.epoch,
            state=state,
            stages=self.assignments,
            planned=planned_to_proto(self.planned) if self.planned is not None else None,
            moved_at=map(timestamp, self.moved_at),
        )


def worker_of(assignment: topology_pb2.ShardAssignment) -> str:
    """The worker that an assignment is for."""
    return next(peer.worker for peer in assignment.peers if peer.stage == assignment.stage_index)


def num_devices(assignments: Iterable[topology_pb2.ShardAssignment]) -> int:
    """Devices that hold these stages."""
    return sum(len(device_shards(assignment)) for assignment in assignments)
