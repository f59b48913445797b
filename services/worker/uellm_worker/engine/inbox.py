"""The one place where a child's engine thread waits: for its agent and for its peers."""

from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock

from uellm.v1.engine_pb2 import EngineCommand
from uellm_worker.engine.errors import LeaveRequestedError, PeerLostError


@dataclass(frozen=True, slots=True)
class StepAnnounced:
    """The stage before this one has computed a step; its activation is on the way."""

    generation: int
    meta: bytes


@dataclass(frozen=True, slots=True)
class ResultArrived:
    """The last stage has sampled."""

    generation: int
    data: bytes


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A peer died, stopped, left or cannot be reached."""

    generation: int
    message: str


PeerNews = StepAnnounced | ResultArrived | PeerLost
Item = EngineCommand | PeerNews


class Inbox:
    """Commands and news from peers, in the order they came.

    Attributes:
        generation: news of other generations are old and are left out.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self._put_off: deque[Item] = deque()
        self._leaves = 0
        self._lock = Lock()

    @property
    def leaving(self) -> bool:
        """A command that ends the present generation is waiting."""
        return self._leaves > 0

    def put(self, item: Item) -> None:
        """Add an item; from any thread."""
        if _ends_generation(item):
            with self._lock:
                self._leaves += 1
        self._queue.put(item)

    def take(self, *, block: bool) -> Item | None:
        """The next item; None if there is none and ``block`` is not set."""
        while True:
            try:
                item = self._put_off.popleft() if self._put_off else self._queue.get(block=block)
            except Empty:
                return None
            if _ends_generation(item):
                with self._lock:
                    self._leaves -= 1
            if isinstance(item, EngineCommand) or item.generation == self.generation:
                return item

    def wait_result(self) -> bytes:
        """Wait for the last stage's answer to the step under way; commands are put off.

        Raises:
            PeerLostError: a peer is gone, so that no answer will come.
            LeaveRequestedError: the agent wants this generation to end; the command is put off.
        """
        while True:
            item = self._queue.get()
            if isinstance(item, EngineCommand):
                self._put_off.append(item)
                if _ends_generation(item):
                    raise LeaveRequestedError("the agent ended the generation during a step")
            elif item.generation != self.generation:
                continue
            elif isinstance(item, ResultArrived):
                return item.data
            elif isinstance(item, PeerLost):
                raise PeerLostError(item.message)


def _ends_generation(item: Item) -> bool:
    return isinstance(item, EngineCommand) and item.WhichOneof("command") in ("leave", "prepare")
