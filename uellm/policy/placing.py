"""Which replica a request goes to, as late as the slots allow."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from uellm.policy.estimate import peak_tokens
from uellm.policy.views import Dispatch, DispatchSettings, QueuedView, ReplicaView


@dataclass(slots=True)
class Room:
    """What a replica can still take.

    Attributes:
        view: the replica.
        free: requests that it may still be sent.
        in_flight: requests that it was sent, those of this decision included.
        kv_tokens_left: KV room that the predicted peaks leave.
        closed: it has a suspect, or is kept for one: nothing may join.
        taken: what it is sent by this decision.
    """

    view: ReplicaView
    free: int
    in_flight: int
    kv_tokens_left: float
    closed: bool = False
    taken: list[str] = field(default_factory=list)

    def fits(self, request: QueuedView) -> bool:
        """Whether it can take a request. An empty one takes any."""
        if self.closed or self.free <= 0:
            return False
        return self.in_flight == 0 or peak_tokens(request) <= self.kv_tokens_left

    def take(self, request: QueuedView) -> None:
        """Send it a request."""
        self.taken.append(request.request_id)
        self.free -= 1
        self.in_flight += 1
        self.kv_tokens_left -= peak_tokens(request)

    def load(self, request: QueuedView) -> tuple[float, float, str]:
        """Least first: share of slots in use, then pace."""
        del request
        view = self.view
        return (self.in_flight / max(view.slots, 1), view.decode_step_seconds, view.replica)


def has_suspect(view: ReplicaView) -> bool:
    """Whether a suspect runs there."""
    return any(request.alone for request in view.in_flight)


def free_places(view: ReplicaView, settings: DispatchSettings) -> int:
    """How many more requests a replica may be sent, if nothing else speaks against it."""
    return max(view.slots, 1) + settings.lookahead_requests - len(view.in_flight)


def plain_room(view: ReplicaView, settings: DispatchSettings) -> Room:
    """Room by slots, and by the sum of predicted peaks."""
    kv = view.kv_tokens_total * settings.kv_headroom if view.kv_tokens_total else float("inf")
    used = sum(request.prompt_tokens + request.output_p90 for request in view.in_flight)
    return Room(
        view,
        free_places(view, settings),
        len(view.in_flight),
        kv - used,
        closed=has_suspect(view),
    )


def place(
    order: Iterable[QueuedView],
    rooms: Sequence[Room],
    passes: Callable[[QueuedView], bool] | None = None,
) -> tuple[tuple[Dispatch, ...], list[int]]:
    """Send requests to replicas in order, each to the least loaded that it fits.

    The first request that fits nowhere ends it: none overtakes. Only suspects are overtaken, while
    a replica is emptied for them; one is, at a time.

    Args:
        order: the first to go first.
        rooms: of the replicas.
        passes: asked of a request that fits nowhere: whether others may overtake it.

    Returns:
        The batches, and the places in the order of what is in them.
    """
    placed: list[int] = []
    suspects = Suspects(rooms)
    for i, request in enumerate(order):
        if request.strikes:
            if suspects.place(request):
                placed.append(i)
            continue
        fitting = [room for room in rooms if room.fits(request)]
        if fitting:
            min(fitting, key=lambda room: room.load(request)).take(request)
            placed.append(i)
        elif passes is None or not passes(request):
            break
    return sent(rooms), placed


def sent(rooms: Iterable[Room]) -> tuple[Dispatch, ...]:
    """The batches of a decision."""
    return tuple(
        Dispatch(room.view.replica, room.view.epoch, tuple(room.taken))
        for room in rooms
        if room.taken
    )


class Suspects:
    """Places suspects, each on a replica of its own; empties one replica at a time for them.

    Args:
        rooms: of the replicas.
    """

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms = rooms
        self._emptying = False

    def place(self, request: QueuedView) -> bool:
        """Send a suspect to an empty replica, or else keep the emptiest one free for it."""
        available = [
            room for room in self._rooms if room.free > 0 and not (room.closed or room.taken)
        ]
        if self._emptying or not available:
            self._emptying = True
            return False
        room = min(available, key=lambda room: (room.in_flight, room.load(request)))
        placed = room.in_flight == 0
        if placed:
            room.take(request)
        room.closed = True
        self._emptying = not placed
        return placed
