"""What the engine loop has to say with its next report."""

from collections.abc import Iterable

from uellm.v1.decisions_pb2 import DecisionSegment
from uellm.v1.engine_pb2 import DropSequence, SequenceOutput, StepReport
from uellm.v1.queue_pb2 import ReplicaReport


class Outbox:
    """Outputs, and who was handed back, until they are reported."""

    def __init__(self) -> None:
        self._outputs: list[SequenceOutput] = []
        self._handed_back: list[str] = []

    def __bool__(self) -> bool:
        """There is something to say."""
        return bool(self._outputs or self._handed_back)

    def add(self, output: SequenceOutput) -> None:
        """Say what a sequence got."""
        self._outputs.append(output)

    def hand_back(self, request_ids: Iterable[str]) -> None:
        """Say whom the policy returned."""
        self._handed_back += request_ids

    def drop(self, command: DropSequence) -> None:
        """Say nothing of one holder of one request."""
        dropped = (command.request_id, command.generation)
        self._outputs = [o for o in self._outputs if (o.request_id, o.generation) != dropped]

    def report(self, report: ReplicaReport, decisions: DecisionSegment | None) -> StepReport:
        """All of it, and nothing is left; beside how the replica is doing, and what was decided."""
        said = StepReport(
            outputs=self._outputs,
            handed_back=self._handed_back,
            report=report,
            decisions=decisions,
        )
        self._outputs, self._handed_back = [], []
        return said
