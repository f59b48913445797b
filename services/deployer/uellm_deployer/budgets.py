"""The devices that a plan may use, and how much of their memory. Pure.

What a worker reports as free does not know about loads still to come, and counts as taken what the
replica to be planned holds itself.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from uellm.convert import device_from_proto
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
    held, owed, stages = _claims(planning, replicas, workers)
    found = []
    for worker in workers:
        for device in said(worker):
            if not device.healthy or worker.going:
                continue
            free = device.memory_free_bytes + held[device.id] - owed[device.id]
            memory_bytes = max(0, min(free, device.memory_total_bytes))
            found.append(device_from_proto(device, memory_bytes, stages[device.id]))
    return found


def _claims(
    planning: Collection[Replica], replicas: Iterable[Replica], workers: Sequence[Worker]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By device: bytes that ``planning`` holds, bytes that others will still take, their stages."""
    by_id = {worker.worker: worker for worker in workers}
    kinds = {device.id: device.kind for worker in workers for device in worker.devices}
    held: Counter[str] = Counter()
    owed: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    for replica in replicas:
        if replica.planned is None or (replica not in planning and replica.phase is Phase.IDLE):
            continue
        for stage in replica.planned.stages:
            worker = by_id.get(stage.device_id.rpartition("/")[0])
            status = worker.stages.get(replica.id) if worker is not None else None
            resident = 0
            if status is not None and status.pid:
                resident = _resident(stage, kinds.get(stage.device_id), status)
            if replica in planning:
                held[stage.device_id] += resident
            else:
                owed[stage.device_id] += stage.memory_bytes - resident
                stages[stage.device_id] += 1
    return held, owed, stages


def _resident(stage: PlannedStage, kind: int | None, status: deployer_pb2.StageStatus) -> int:
    """What a stage that is there has taken of what its device counts as free.

    A child's resident memory is the host's. What it takes of a CUDA device, which counts what its
    libraries take as well, is not reported, and is taken to be what was planned. Of any other the
    worker counts what the child says that it holds.
    """
    if kind == topology_pb2.DEVICE_KIND_CPU:
        return min(stage.memory_bytes, status.resident_bytes)
    if kind in (topology_pb2.DEVICE_KIND_SIMULATED, topology_pb2.DEVICE_KIND_OTHER):
        held = sum(u.held_bytes for u in status.devices if u.device_id == stage.device_id)
        return min(stage.memory_bytes, held)
    return stage.memory_bytes
