"""One stage of one replica at one generation: its state, and who waits for it to change."""

import asyncio
import signal
from collections.abc import Callable, Sequence

from uellm.logs import logger
from uellm.models.tokenizer import Tokenizer
from uellm.v1 import deployer_pb2, engine_pb2, topology_pb2, worker_pb2
from uellm_worker.leader import Leader
from uellm_worker.stage_child import StageChild

_log = logger("stage")

LOADING = deployer_pb2.STAGE_STATE_LOADING
PREPARED = deployer_pb2.STAGE_STATE_PREPARED
SERVING = deployer_pb2.STAGE_STATE_SERVING
FAILED = deployer_pb2.STAGE_STATE_FAILED


class Stage:
    """A stage that this worker holds.

    Args:
        assignment: which, what, with how much.
        changed: called at every change of state.

    Attributes:
        state: LOADING, PREPARED, SERVING or FAILED.
        reason: why it failed.
        child: its child, once there is one.
        leader: of its replica, on stage 0 while it serves.
        tokenizer: of its model, on stage 0.
        fetched: bytes of files that came from other workers, and that have to.
        loaded: the latest progress of loading.
        prepared: what the child said when the weights were there.
    """

    def __init__(
        self, assignment: topology_pb2.ShardAssignment, changed: Callable[[], None]
    ) -> None:
        self.assignment = assignment
        self.state: deployer_pb2.StageState.ValueType = LOADING
        self.reason = ""
        self.child: StageChild | None = None
        self.leader: Leader | None = None
        self.tokenizer: Tokenizer | None = None
        self.fetched = (0, 0)
        self.loaded = engine_pb2.LoadProgress()
        self.prepared = engine_pb2.ShardPrepared()
        self.on_serving: Callable[[Stage], None] = lambda _: None
        self.on_failed: Callable[[Stage], None] = lambda _: None
        self._changed = changed
        self._news = asyncio.Event()

    @property
    def replica(self) -> str:
        """Of which replica."""
        return self.assignment.replica

    @property
    def generation(self) -> int:
        """Of which generation."""
        return self.assignment.generation

    @property
    def leads(self) -> bool:
        """Whether it is the replica's first stage."""
        return self.assignment.stage_index == 0

    async def news(self) -> None:
        """Wait for the next change of state or progress."""
        await self._news.wait()

    def fetching(self, fetched_bytes: int, fetch_bytes: int) -> None:
        """So much has come from other workers, of so much."""
        self.fetched = (fetched_bytes, fetch_bytes)
        self.tell()

    def tell(self) -> None:
        """Wake whoever waits for news."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _become(self, state: "deployer_pb2.StageState.ValueType") -> None:
        self.state = state
        self.tell()
        self._changed()

    def fail(self, reason: str) -> None:
        """It cannot go on."""
        if self.state != FAILED:
            _log.warning(
                "a stage failed", replica=self.replica, generation=self.generation, reason=reason
            )
            self.end(reason)
            self.on_failed(self)

    def end(self, reason: str) -> None:
        """It is not wanted any more; whoever waits for it is told."""
        if self.state != FAILED:
            self.reason = reason
            self._become(FAILED)

    async def hear(self, event: engine_pb2.EngineEvent) -> None:
        """See ``uellm_worker.stage_child.Listener``."""
        match event.WhichOneof("event"):
            case "step":
                if self.leader is not None:
                    await self.leader.report(event.step)
            case "progress":
                self.loaded = event.progress
                self.tell()
            case "prepared":
                self.prepared = event.prepared
                self._become(PREPARED)
            case "serving":
                if event.serving.generation == self.generation:
                    self.on_serving(self)
                    self._become(SERVING)
            case "failed":
                failed = event.failed
                self.fail(f"{failed.reason}: {failed.message}")

    @property
    def serving(self) -> bool:
        """See ``uellm_worker.stage_child.Listener``."""
        return self.state == SERVING

    @property
    def owed_steps(self) -> bool:
        """See ``uellm_worker.stage_child.Listener``."""
        return self.leader is not None and self.leader.owed_steps

    def lost(self, exit_code: int) -> None:
        """See ``uellm_worker.stage_child.Listener``."""
        self.fail(f"CHILD_LOST: its process {describe_exit(exit_code)}")

    def progress(self) -> worker_pb2.PrepareResponse:
        """How far its loading is, as the deployer is told."""
        fetched_bytes, fetch_bytes = self.fetched
        progress = worker_pb2.PrepareResponse(
            loaded_bytes=self.loaded.loaded_bytes,
            total_bytes=self.loaded.total_bytes,
            fetched_bytes=fetched_bytes,
            fetch_bytes=fetch_bytes,
        )
        if self.state == PREPARED:
            progress.loaded_bytes = progress.total_bytes = self.prepared.total_bytes
            progress.prepared = True
            progress.rendezvous = self.prepared.rendezvous
            progress.kept_bytes = self.prepared.kept_bytes
        return progress

    def status(self, resident_bytes: Callable[[int], int]) -> deployer_pb2.StageStatus:
        """As the deployer is told; ``resident_bytes`` measures a process."""
        pid = self.child.pid if self.child is not None and self.child.alive else 0
        return deployer_pb2.StageStatus(
            replica=self.replica,
            generation=self.generation,
            stage_index=self.assignment.stage_index,
            state=self.state,
            reason=self.reason,
            pid=pid,
            first_layer=self.assignment.first_layer,
            last_layer=self.assignment.last_layer,
            resident_bytes=resident_bytes(pid) if pid else 0,
            devices=self.held if pid else (),
        )

    @property
    def held(self) -> Sequence[topology_pb2.DeviceUse]:
        """What it holds on its devices, as far as its child has said."""
        return self.prepared.devices if self.child is not None else ()


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    advice = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{advice}"
