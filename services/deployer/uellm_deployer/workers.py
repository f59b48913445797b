"""The workers as the deployer knows them, by what they say and by whether they can be reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from uellm.core.errors import AbortedError
from uellm.v1 import deployer_pb2, topology_pb2

FORGET_SECONDS = 60.0
"""A worker that was lost for so long is not shown any more."""
LISTEN_SECONDS = 0.25
"""How often the deployer makes sure that it was there to hear."""


@dataclass(slots=True)
class Worker:
    """One start of a worker. Times are monotonic seconds.

    Attributes:
        worker: its id, stable over restarts.
        address: where its WorkerService is reached.
        incarnation: rises with every start.
        devices: by its latest message.
        links: between its devices, as their driver says.
        seen_at: its latest message, and later by the time for which nobody was there to hear.
        heard_at: its latest heartbeat, which says how its stages are; None: there was none yet.
        stages: by replica.
        reachable: whether its address answers; None: nobody has heard yet.
        going: it says that it is about to end.
    """

    worker: str
    address: str
    incarnation: int
    devices: Sequence[topology_pb2.Device]
    seen_at: float
    heard_at: float | None = None
    stages: Mapping[str, deployer_pb2.StageStatus] = field(default_factory=dict)
    links: Sequence[topology_pb2.Link] = ()
    reachable: bool | None = None
    going: bool = False

    def lost(self, now: float, silence_seconds: float) -> str:
        """Why it counts as lost, or ""."""
        if self.reachable is False:
            return f"worker {self.worker} at {self.address} cannot be reached"
        if now - self.seen_at > silence_seconds:
            return f"worker {self.worker} has not been heard of for {silence_seconds:g} s"
        return ""

    @property
    def condition(self) -> object:
        """What there is something to decide about as soon as it is another."""
        stages = {name: (stage.generation, stage.state) for name, stage in self.stages.items()}
        lost = {device.id for device in self.devices if device.lost}
        return self.heard_at is None, self.going, stages, lost, {d.id for d in self.usable}

    @property
    def usable(self) -> list[topology_pb2.Device]:
        """The devices that may be given layers; none when the worker is going."""
        return [device for device in self.devices if device.healthy and not self.going]


class Workers:
    """All workers, by id."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._listened_at = float("inf")

    def register(self, request: deployer_pb2.RegisterWorkerRequest, now: float) -> Worker:
        """Take note of a worker; a newer start replaces an older one.

        Raises:
            AbortedError: if a newer start of it has registered.
        """
        known = self._workers.get(request.worker)
        if known is not None and known.incarnation > request.incarnation:
            raise AbortedError(
                f"a newer start of worker {request.worker} has registered; two workers with one "
                "id? Give each its own UELLM_WORKER_SERVICE_ID",
                field="incarnation",
                reason="STALE_INCARNATION",
            )
        if (
            known is not None
            and known.incarnation == request.incarnation
            and known.address == request.address
        ):
            known.devices, known.seen_at = tuple(request.devices), now
            return known
        worker = Worker(
            request.worker,
            request.address,
            request.incarnation,
            tuple(request.devices),
            now,
            links=tuple(request.links),
        )
        self._workers[request.worker] = worker
        return worker

    def hear(self, request: deployer_pb2.HeartbeatRequest, now: float) -> bool:
        """Take note of a sign of life; False if the worker has to register first.

        Raises:
            AbortedError: if a newer start of it has registered.
        """
        known = self._workers.get(request.worker)
        if known is None or known.incarnation < request.incarnation:
            return False
        if known.incarnation > request.incarnation:
            raise AbortedError(
                f"a newer start of worker {request.worker} has registered",
                field="incarnation",
                reason="STALE_INCARNATION",
            )
        known.stages = {stage.replica: stage for stage in request.stages}
        known.going = request.going
        if request.devices:
            known.devices = tuple(request.devices)
        known.seen_at = known.heard_at = now
        return True

    def listen(self, now: float) -> None:
        """Be there to hear; to be called every ``LISTEN_SECONDS``, and before anybody is judged.

        Where it comes late this process was held up itself: that says nothing of the workers, whose
        messages wait to be read.
        """
        late = now - self._listened_at - LISTEN_SECONDS
        if late > LISTEN_SECONDS:
            for worker in self._workers.values():
                worker.seen_at = min(worker.seen_at + late, now)
        self._listened_at = now

    def get(self, worker: str) -> Worker | None:
        """A worker by its id."""
        return self._workers.get(worker)

    @property
    def all(self) -> Sequence[Worker]:
        """All of them, by id."""
        return [self._workers[name] for name in sorted(self._workers)]

    def live(self, now: float, silence_seconds: float) -> list[Worker]:
        """Those that are not lost, by id."""
        return [worker for worker in self.all if not worker.lost(now, silence_seconds)]

    def absent(self, now: float, silence_seconds: float) -> list[str]:
        """Why others count as lost, in words; those that were told to go left in order."""
        there = [worker for worker in self.all if not worker.going]
        return [why for worker in there if (why := worker.lost(now, silence_seconds))]

    def clear(self) -> None:
        """Forget all of them: they register again with the deployer that acts."""
        self._workers = {}

    def forget(self, now: float) -> None:
        """Drop those that have been silent for long."""
        self._workers = {
            name: worker
            for name, worker in self._workers.items()
            if now - worker.seen_at <= FORGET_SECONDS
        }
