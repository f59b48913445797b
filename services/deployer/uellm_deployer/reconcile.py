"""What to do about a deployment's replicas, given what is wanted and who is there. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uellm.convert import device_shards
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer.replica import Phase, Replica, worker_of
from uellm_deployer.workers import Worker

_SERVING = (Phase.READY, Phase.MOVING)
SETTLED_SECONDS = 2.0
"""A heartbeat may be older than the answer that it crosses; after this it is not."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a deployment.

    Attributes:
        replicas: copies.
        stages: stages per copy; 0: any number.
    """

    replicas: int
    stages: int


@dataclass(frozen=True, slots=True)
class Suspend:
    """Route nothing more to a replica: it lost a stage.

    Attributes:
        replica: which.
        reason: why, in plain words.
        agent_lost: a worker is gone, not only its child.
    """

    replica: str
    reason: str
    agent_lost: bool


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop forming a replica: a worker that it was to stand on is gone."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class Form:
    """Place and form a replica."""

    replica: str


@dataclass(frozen=True, slots=True)
class Grow:
    """Form a replica anew over more devices: it has fewer stages than wanted."""

    replica: str


@dataclass(frozen=True, slots=True)
class End:
    """Let a replica go that is not wanted any more."""

    replica: str


@dataclass(frozen=True, slots=True)
class Wait:
    """A replica waits.

    Attributes:
        replica: which.
        message: for what, in plain words; "" while it waits to try again.
    """

    replica: str
    message: str


Action = Suspend | Abort | Form | Grow | End | Wait


@dataclass(frozen=True, slots=True)
class Situation:
    """Who is there. Times are monotonic seconds.

    Attributes:
        workers: all that are known, by id.
        now: the present.
        silence_seconds: after this a silent worker is lost.
        idle: no answer is running.
    """

    workers: Mapping[str, Worker]
    now: float
    silence_seconds: float
    idle: bool = False

    @property
    def devices(self) -> set[str]:
        """Ids of the devices that may be used."""
        return {
            device.id
            for worker in self.workers.values()
            if not worker.lost(self.now, self.silence_seconds)
            for device in worker.usable
        }


def decide(wanted: Wanted, replicas: Sequence[Replica], situation: Situation) -> list[Action]:
    """What to do now, at most one thing per replica."""
    actions: list[Action] = []
    # Those that serve are kept before those that are still to come.
    kept = sorted(standing(replicas), key=lambda r: (r.phase not in _SERVING, r.index))
    excess = {replica.id for replica in kept[wanted.replicas :]}
    for replica in replicas:
        if replica.phase is Phase.ENDING:
            continue
        given_up = replica.replaces and replica.phase is Phase.IDLE
        if replica.id in excess or replica.dismissed or given_up:
            actions.append(End(replica.id))
        elif replica.phase is Phase.READY:
            actions += _watch(wanted, replica, situation)
        elif replica.phase is Phase.MOVING:
            lost = loss(replica, situation)
            actions += [lost] if lost is not None else []
        elif replica.phase is Phase.FORMING:
            gone = _gone(replica, situation) if replica.assigned else ""
            actions += [Abort(replica.id, gone)] if gone else []
        else:
            actions.append(_begin(wanted, replica, replicas, situation))
    return actions


def standing(replicas: Sequence[Replica]) -> list[Replica]:
    """The copies that count: not those that end, nor one that is to take over from another."""
    return [
        replica
        for replica in replicas
        if replica.phase is not Phase.ENDING and not replica.dismissed and not replica.replaces
    ]


def _watch(wanted: Wanted, replica: Replica, situation: Situation) -> list[Action]:
    lost = loss(replica, situation)
    if lost is not None:
        return [lost]
    few = replica.num_devices < min(wanted.stages, len(situation.devices))
    if few and situation.idle and situation.now >= replica.grow_at:
        return [Grow(replica.id)]
    return []


def _begin(
    wanted: Wanted, replica: Replica, replicas: Sequence[Replica], situation: Situation
) -> Action:
    if situation.now < replica.retry_at:
        return Wait(replica.id, "")
    devices = situation.devices
    if not devices:
        return Wait(replica.id, "waits for a worker: none is there (`uellm serve worker`)")
    if replica.epoch:
        needed = wanted.stages or max(replica.num_devices, 1)
        there = len(devices - _used_by_others(replica, replicas))
    else:
        # All copies are new: the first one is not to take what is only the first device to come.
        needed = max(wanted.stages, 1) * wanted.replicas
        there = len(devices)
    left = replica.since + replica.patience_seconds - situation.now
    if there >= needed or left <= 0:
        return Form(replica.id)
    return Wait(replica.id, f"waits for devices: {there} of {needed} are there")


def _used_by_others(replica: Replica, replicas: Sequence[Replica]) -> set[str]:
    return {
        device
        for other in replicas
        if other is not replica and other.phase in (*_SERVING, Phase.FORMING)
        for assignment in other.assignments
        for device in assignment.device_ids
    }


def loss(replica: Replica, situation: Situation) -> Suspend | None:
    """Whether a replica that served has lost a stage."""
    reasons = []
    agent_lost = False
    for assignment in replica.assignments:
        name = worker_of(assignment)
        worker = situation.workers.get(name)
        if worker is not None and _restarted(replica, worker):
            # Its agent is back: nothing is gained by waiting for it.
            reasons.append(f"worker {name} was started again")
        elif why := _agent_loss(name, worker, replica, situation):
            reasons.append(why)
            agent_lost = True
        elif worker is not None and (
            why := _stage_loss(worker, replica, assignment.stage_index)
            or _device_loss(worker, assignment)
        ):
            reasons.append(why)
    return Suspend(replica.id, "; ".join(reasons), agent_lost) if reasons else None


def _restarted(replica: Replica, worker: Worker) -> bool:
    return replica.incarnations.get(worker.worker, worker.incarnation) != worker.incarnation


def _agent_loss(name: str, worker: Worker | None, replica: Replica, situation: Situation) -> str:
    unheard = situation.now - replica.trusted_at > situation.silence_seconds
    if worker is None:
        return f"worker {name} is not there" if unheard else ""
    if why := worker.lost(situation.now, situation.silence_seconds):
        return why
    if worker.going:
        return f"worker {name} is going"
    if worker.heard_at is None and unheard:
        return f"worker {name} does not say how its stages are"
    return ""


def _stage_loss(worker: Worker, replica: Replica, stage_index: int) -> str:
    if worker.heard_at is None:
        return ""
    status = worker.stages.get(replica.id)
    where = f"stage {stage_index} on worker {worker.worker}"
    if status is not None and status.generation == replica.epoch:
        if status.state == deployer_pb2.STAGE_STATE_SERVING:
            return ""
        if status.state == deployer_pb2.STAGE_STATE_FAILED:
            return f"{where} failed: {status.reason or 'no reason given'}"
    if worker.heard_at - replica.trusted_at <= SETTLED_SECONDS:
        return ""
    return f"{where} does not serve generation {replica.epoch} any more"


def _device_loss(worker: Worker, assignment: topology_pb2.ShardAssignment) -> str:
    """What computes on a device that is lost may hang for long before it fails."""
    parts = {part.device_id for part in device_shards(assignment)}
    lost = [device.id for device in worker.devices if device.lost and device.id in parts]
    return f"the driver has lost {' and '.join(lost)}" if lost else ""


def _gone(replica: Replica, situation: Situation) -> str:
    """Why a replica that is being formed cannot come up, or ""."""
    for name in replica.workers:
        worker = situation.workers.get(name)
        if worker is None:
            return f"worker {name} is not there"
        why = worker.lost(situation.now, situation.silence_seconds)
        if why:
            return why
        if _restarted(replica, worker):
            return f"worker {name} was started again"
    return ""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A stage that belongs to nothing that is wanted."""

    worker: str
    replica: str
    generation: int


def orphans(replicas: Mapping[str, Replica], situation: Situation) -> list[Orphan]:
    """Stages that workers hold of replicas that are unknown, older, or elsewhere now."""
    found = []
    for worker in situation.workers.values():
        if worker.lost(situation.now, situation.silence_seconds):
            continue
        for status in worker.stages.values():
            replica = replicas.get(status.replica)
            if replica is not None:
                if replica.phase in (Phase.ENDING, Phase.IDLE):
                    continue
                current = replica.assignments[0].generation if replica.assignments else 0
                held_here = worker.worker in replica.workers
                if status.generation > current or (held_here and replica.phase is Phase.FORMING):
                    continue
                if held_here and status.generation == current:
                    continue
            found.append(Orphan(worker.worker, status.replica, status.generation))
    return found
