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


Item = EngineCommand | StepAnnounced | PeerLost


class Inbox:
    """Commands and news from peers, in the order they came.

    Attributes:
        generation: news of other generations are old and are left out.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._queue: SimpleQueue[Item | ResultArrived] = SimpleQueue()
        self._put_off: deque[EngineCommand] = deque()
        self._results: deque[ResultArrived] = deque()
        self._leaves = 0
        self._lock = Lock()

    @property
    def leaving(self) -> bool:
        """A command that ends the present generation is waiting."""
        return self._leaves > 0

    def put(self, item: Item | ResultArrived) -> None:
        """Add an item; from any thread."""
        if _ends_generation(item):
            with self._lock:
                self._leaves += 1
        self._queue.put(item)

    def take(self, patience: float | None) -> Item | None:
        """The next item; None if none comes for so many seconds. Results do not count as one.

        Results are kept for ``wait_result``.

        Args:
            patience: seconds to wait for it; None: for ever.
        """
        while True:
            try:
                item = (
                    self._put_off.popleft()
                    if self._put_off
                    else self._queue.get(block=patience != 0, timeout=patience or None)
                )
            except Empty:
                return None
            if _ends_generation(item):
                with self._lock:
                    self._leaves -= 1
            if isinstance(item, ResultArrived):
                self._results.append(item)
            elif isinstance(item, EngineCommand) or item.generation == self.generation:
                return item

    def wait_result(self, *, patient: bool = True) -> bytes | None:
        """Wait for the last stage's answer to the oldest step under way; commands are put off.

        Args:
            patient: False: stop waiting as soon as there is a command.

        Returns:
            The answer; None if a command came first.

        Raises:
            PeerLostError: a peer is gone, so that no answer will come.
            LeaveRequestedError: the agent wants this generation to end; the command is put off.
        """
        while True:
            while self._results:
                result = self._results.popleft()
                if result.generation == self.generation:
                    return result.data
            if self._put_off and not patient:
                return None
            item = self._queue.get()
            if isinstance(item, ResultArrived):
                self._results.append(item)
            elif isinstance(item, EngineCommand):
                self._put_off.append(item)
                if _ends_generation(item):
                    raise LeaveRequestedError("the agent ended the generation during a step")
            elif isinstance(item, PeerLost) and item.generation == self.generation:
                raise PeerLostError(item.message)


def _ends_generation(item: Item | ResultArrived) -> bool:
    return isinstance(item, EngineCommand) and item.WhichOneof("command") in ("leave", "prepare")
