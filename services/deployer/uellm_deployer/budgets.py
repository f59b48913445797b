"""The devices that a plan may use, and how much of their memory. Pure.

What a worker reports as free does not know about loads still to come, and counts as taken what the
replica to be planned holds itself.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from uellm.convert_topology import device_from_proto
from uellm.placement.topology import Device
from uellm.placement.views import PlannedStage
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer.replica import Phase, Replica
from uellm_deployer.workers import Worker


def devices_for(
    planning: Collection[Replica],
    replicas: Iterable[Replica],
    workers: Sequence[Worker],
    said: Callable[[Worker], Sequence[topology_pb2.Device]] = lambda worker: worker.devices,
) -> list[Device]:
    """The devices as a plan for ``planning`` may fill them.

    Args:
        planning: the replicas to be placed; what they hold now is free for them.
        replicas: all replicas of all deployments.
        workers: those that are not lost.
        said: a worker's devices, with what is known of them besides.
    """
    claims = _claims(planning, replicas, workers)
    found = []
    for worker in workers:
        for device in said(worker):
            if not device.healthy or worker.going:
                continue
            owed = claims.owed[device.id]
            free = device.memory_free_bytes + claims.held[device.id] - owed
            # A device that is overfull says that nothing is free, and not by how much.
            most = device.memory_total_bytes - claims.others[device.id] - owed
            memory_bytes = max(0, min(free, most))
            found.append(device_from_proto(device, memory_bytes, claims.stages[device.id]))
    return found


@dataclass(frozen=True, slots=True)
class _Claims:
    """What replicas have of devices, by id.

    Attributes:
        held: bytes that those to be placed hold.
        others: bytes that others hold.
        owed: bytes that others will still take.
        stages: of others.
    """

    held: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    owed: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)


def _claims(
    planning: Collection[Replica], replicas: Iterable[Replica], workers: Sequence[Worker]
) -> _Claims:
    by_id = {worker.worker: worker for worker in workers}
    kinds = {device.id: device.kind for worker in workers for device in worker.devices}
    found = _Claims()
    for replica in replicas:
        if replica.planned is None or (replica not in planning and replica.phase is Phase.IDLE):
            continue
        for stage in replica.planned.stages:
            worker = by_id.get(stage.device_id.rpartition("/")[0])
            status = worker.stages.get(replica.id) if worker is not None else None
            taken = 0
            if status is not None and status.pid:
                taken = _taken(stage, kinds.get(stage.device_id), status)
            if replica in planning:
                found.held[stage.device_id] += taken
            else:
                found.others[stage.device_id] += taken
                found.owed[stage.device_id] += max(stage.memory_bytes - taken, 0)
                found.stages[stage.device_id] += 1
    return found


def _taken(stage: PlannedStage, kind: int | None, status: deployer_pb2.StageStatus) -> int:
    """What a stage that is there has taken of what its device counts as free.

    A child's resident memory is the host's, its libraries' as well: whatever takes its place takes
    that too, and has no less room than where no child was. What it takes of a CUDA device, which
    counts what its libraries take as well, is not reported, and is taken to be what was planned. Of
    any other the worker counts what the child says that it holds.
    """
    if kind == topology_pb2.DEVICE_KIND_CPU:
        return status.resident_bytes
    if kind in (topology_pb2.DEVICE_KIND_SIMULATED, topology_pb2.DEVICE_KIND_OTHER):
        held = sum(u.held_bytes for u in status.devices if u.device_id == stage.device_id)
        return min(stage.memory_bytes, held)
    return stage.memory_bytes
