"""Which replica a request goes to, as late as the slots allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from uellm.policy.estimate import peak_tokens
from uellm.policy.views import Dispatch, DispatchSettings, QueuedView, ReplicaView


@dataclass(slots=True)
class _Room:
    """What a replica can still take."""

    view: ReplicaView
    free: int
    in_flight: int
    kv_tokens_left: float
    taken: list[str]

    def fits(self, request: QueuedView) -> bool:
        if self.free <= 0:
            return False
        return self.in_flight == 0 or peak_tokens(request) <= self.kv_tokens_left

    def take(self, request: QueuedView) -> None:
        self.taken.append(request.request_id)
        self.free -= 1
        self.in_flight += 1
        self.kv_tokens_left -= peak_tokens(request)

    @property
    def load(self) -> tuple[float, float, str]:
        """Least first: share of slots in use, then pace."""
        view = self.view
        return (self.in_flight / max(view.slots, 1), view.decode_step_seconds, view.replica)


def _room(view: ReplicaView, settings: DispatchSettings) -> _Room:
    in_flight = len(view.in_flight)
    alone = any(request.alone for request in view.in_flight)
    free = 0 if alone else max(view.slots, 1) + settings.lookahead_requests - in_flight
    kv = view.kv_tokens_total * settings.kv_headroom if view.kv_tokens_total else float("inf")
    used = sum(request.prompt_tokens + request.output_p90 for request in view.in_flight)
    return _Room(view, free, in_flight, kv - used, [])


def place(
    order: Sequence[QueuedView], replicas: Sequence[ReplicaView], settings: DispatchSettings
) -> tuple[tuple[Dispatch, ...], list[QueuedView]]:
    """Send requests to replicas in order, each to the least loaded; returns who goes on waiting.

    The first request that fits nowhere ends it: none overtakes. Only suspects are overtaken, while
    a replica is emptied for them; one is, at a time.
    """
    rooms = [_room(view, settings) for view in replicas]
    waiting: list[QueuedView] = []
    emptying = False
    for i, request in enumerate(order):
        if request.strikes:
            if emptying or not _place_alone(request, rooms):
                emptying = True
                waiting.append(request)
            continue
        fitting = [room for room in rooms if room.fits(request)]
        if not fitting:
            waiting.extend(order[i:])
            break
        min(fitting, key=lambda room: room.load).take(request)
    dispatches = (
        Dispatch(room.view.replica, room.view.epoch, tuple(room.taken))
        for room in rooms
        if room.taken
    )
    return tuple(dispatches), waiting


def _place_alone(request: QueuedView, rooms: list[_Room]) -> bool:
    """Send a suspect to an empty replica, or else keep the emptiest one free for it."""
    available = [room for room in rooms if room.free > 0 and not room.taken]
    if not available:
        return False
    room = min(available, key=lambda room: (room.in_flight, room.load))
    placed = room.in_flight == 0
    if placed:
        room.take(request)
    room.free = 0
    return placed
