"""From what a replica reports of its steps to comparisons with what was predicted of them. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uellm.convert_topology import device_from_proto
from uellm.core.model import ModelProfile
from uellm.placement.discovery import BlockKey, Knowledge
from uellm.placement.learning import Comparison
from uellm.v1 import queue_pb2, topology_pb2
from uellm_deployer.planning import StepsSeen, expected
from uellm_deployer.replica import Replica
from uellm_deployer.stage_times import StageTime


@dataclass(frozen=True, slots=True)
class Reported:
    """Steps of one kind, and the seconds that they took by stage."""

    steps: StepsSeen
    took: tuple[float, ...]


def reported(report: queue_pb2.ReplicaReport) -> Iterator[Reported]:
    """The kinds of steps that a report tells of: those that only decode, and prompts alone.

    Of others it does not say what was computed when.
    """
    if report.prefill_tokens:
        return
    sequences, context = report.decode_step_sequences, report.decode_step_context_tokens
    if sequences:
        steps = StepsSeen(sequences, context / sequences, report.decode_steps_in_flight)
        yield Reported(steps, tuple(stage.decode_seconds for stage in report.stages))
    tokens = report.prefill_step_tokens
    # Of whole prompts; a part of one attends to more than itself.
    length = 2 * report.prefill_step_pairs / tokens - 1 if tokens else 0.0
    if 1 <= length <= tokens:
        steps = StepsSeen(tokens / length, length, prompts=True)
        yield Reported(steps, tuple(stage.prefill_seconds for stage in report.stages))


def stage_times(
    replica: Replica,
    model: ModelProfile,
    devices: Sequence[topology_pb2.Device],
    found: Reported,
    knowledge: Knowledge,
) -> list[StageTime]:
    """What stages took, beside what was predicted of them.

    Args:
        replica: with its plan and assignments.
        model: its needs in the dtype that it runs in.
        devices: of its parts.
        found: of each of them.
        knowledge: of devices and ways.
    """
    if replica.planned is None:
        return []
    assignment, steps = replica.assignments[0], found.steps
    plain = [device_from_proto(device) for device in devices]
    times = []
    for stage, device, took, part in zip(
        replica.planned.stages,
        devices,
        found.took,
        expected(replica, model, plain, steps, knowledge),
        strict=True,
    ):
        if not took:
            continue
        key = BlockKey(device.host, device.name, assignment.model.digest, assignment.dtype)
        guessed = key not in knowledge.blocks and not device.flops_per_second
        compared = Comparison(
            layers=stage.last_layer - stage.first_layer + 1,
            layers_seconds=part.layers,
            besides_seconds=part.besides,
            took_seconds=part.sustained(took),
            shape=(stage.has_embed, stage.has_head, round(steps.sequences).bit_length()),
            prompts=steps.prompts,
        )
        kind = (device.name or "unknown") if guessed else ""
        times.append(StageTime(device.id, kind, part.took, took, compared))
    return times
