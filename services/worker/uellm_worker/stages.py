"""All stages of a worker, one per replica, fenced by generation.

A replica comes up by Prepare then Commit on each of its workers; every newer generation replaces
the older one here, and an older one is refused. A child that is alive is used again: it keeps the
weights that the new generation still needs.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Protocol

from uellm.core.errors import AbortedError, FailedPreconditionError
from uellm.models.tokenizer import Tokenizer
from uellm.policy.registry import DEFAULT_POLICY
from uellm.v1 import common_pb2, engine_pb2, topology_pb2, worker_pb2
from uellm_worker.children import EngineChild
from uellm_worker.cores import granted_cores
from uellm_worker.files.supply import Directories
from uellm_worker.leader import Leader, Spawn
from uellm_worker.stage import FAILED, LOADING, PREPARED, SERVING, Stage
from uellm_worker.stage_child import StageChild, by_fault

Lead = Callable[[topology_pb2.ShardAssignment, Tokenizer, StageChild], Leader]
Holders = Sequence[worker_pb2.FilesHolder]
AtHand = Callable[
    [topology_pb2.ShardAssignment, Holders, Callable[[int, int], None]],
    AbstractAsyncContextManager[Directories],
]
Simulate = Callable[
    [topology_pb2.ShardAssignment, Mapping[str, int]], Sequence[engine_pb2.SimulatedDevice]
]


class Spawner(Protocol):
    """Where children come from."""

    async def spawn(self) -> EngineChild:
        """A new, empty child."""
        ...


class Stages:
    """The stages that a worker holds.

    Args:
        spawner: where children come from.
        spawn: runs a coroutine beside the server, under a name; told what to do if it fails.
        at_hand: has the files of a stage on this host; see ``Supply``.
        lead: makes the leader of a replica whose first stage is here.
        threads: that each child may use; 0: its share of the cores.
        data_host: address that the data plane binds to.
        step_policy: of the replicas led here.
        execution: of the replicas led here.
        record_every_steps: of their engines; see ``CommitShard``.
        now: by Redis TIME.
        simulate: says what the simulated devices of a stage are like, given what others hold.

    Attributes:
        changed: set at every change of a stage's state; the listener clears it.
    """

    def __init__(
        self,
        spawner: Spawner,
        spawn: Spawn,
        at_hand: AtHand,
        lead: Lead,
        *,
        threads: int,
        data_host: str,
        step_policy: str = DEFAULT_POLICY,
        execution: str = "continuous",
        record_every_steps: int = 0,
        now: Callable[[], float] = time.time,
        simulate: Simulate = lambda assignment, held: (),
    ) -> None:
        self._spawner = spawner
        self._spawn = spawn
        self._at_hand = at_hand
        self._lead = lead
        self._threads = threads
        self._data_host = data_host
        self._step_policy = step_policy
        self._execution = execution
        self._record_every_steps = record_every_steps
        self._now = now
        self._simulate = simulate
        self._held: dict[str, Stage] = {}
        self._fences: dict[str, int] = {}
        self.changed = asyncio.Event()

    @property
    def held(self) -> list[Stage]:
        """All stages, by replica."""
        return [self._held[replica] for replica in sorted(self._held)]

    def busy(self) -> str:
        """Why nothing can be measured beside the stages, or ""."""
        for stage in self.held:
            if stage.state == LOADING:
                return f"{stage.replica} is being loaded"
            if stage.owed_steps:
                return f"{stage.replica} is answering"
        return ""

    @property
    def computing(self) -> bool:
        """Whether a stage has something to compute, as far as is known here: its leader knows."""
        return any(stage.serving and (stage.owed_steps or not stage.leads) for stage in self.held)

    def held_bytes(self, but: str = "") -> Mapping[str, int]:
        """What the stages hold by device id, those of one replica left out."""
        held: Counter[str] = Counter()
        for stage in self._held.values():
            if stage.replica != but:
                held.update({use.device_id: use.held_bytes for use in stage.held})
        return held

    # ---- prepare -------------------------------------------------------------------------------

    async def prepare(
        self, assignment: topology_pb2.ShardAssignment, holders: Holders = ()
    ) -> AsyncIterator[worker_pb2.PrepareResponse]:
        """Load a stage, or as much of it as an earlier generation's child lacks.

        Args:
            assignment: the stage.
            holders: workers that may have files which this host lacks.

        Raises:
            AbortedError: a newer generation, or this one, is here already.
            FailedPreconditionError: it cannot be loaded; nothing of it is left.
            ModelFilesError: the files of model or adapter are neither here nor to be had.
            UnavailableError: workers that have them cannot be reached.
        """
        earlier = self._admit(assignment)
        if earlier is not None and earlier.assignment == assignment and earlier.state == PREPARED:
            yield earlier.progress()
            return
        stage = Stage(assignment, self.changed.set)
        stage.on_serving, stage.on_failed = self._begin, self._failed
        self._held[assignment.replica] = stage
        self._fences[assignment.replica] = assignment.generation
        self.changed.set()
        try:
            async with self._loading(stage, earlier, holders) as loading:
                while stage.state == LOADING:
                    if loading.done():
                        loading.result()
                    await stage.news()
                    if stage.state == LOADING:
                        yield stage.progress()
            self._check_current(stage)
            if stage.state == FAILED:
                raise FailedPreconditionError(
                    f"stage {assignment.stage_index} of {assignment.replica} cannot be loaded: "
                    f"{stage.reason}",
                    reason="STAGE_NOT_LOADED",
                )
        except BaseException:
            await self._discard(stage)
            raise
        yield stage.progress()

    def _admit(self, assignment: topology_pb2.ShardAssignment) -> Stage | None:
        """Check the fence; the stage that is replaced, if there is one."""
        self._check_fence("Prepare", assignment.replica, assignment.generation)
        earlier = self._held.get(assignment.replica)
        if (
            earlier is not None
            and earlier.generation == assignment.generation
            and (earlier.state == SERVING or earlier.assignment != assignment)
        ):
            raise _stale("Prepare", assignment.replica, assignment.generation, earlier.generation)
        return earlier

    @asynccontextmanager
    async def _loading(
        self, stage: Stage, earlier: Stage | None, holders: Holders
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Bring a child to load the stage; its files stay at hand as long as the context."""
        async with AsyncExitStack() as files:
            loading = asyncio.create_task(self._load(stage, earlier, holders, files))
            loading.add_done_callback(lambda _: stage.tell())
            try:
                yield loading
            finally:
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)

    async def _load(
        self, stage: Stage, earlier: Stage | None, holders: Holders, files: AsyncExitStack
    ) -> None:
        """Have a child load the stage: the earlier generation's, else a new one."""
        assignment = stage.assignment
        if earlier is not None:
            stage.child = await self._take_over(earlier)
        self._check_current(stage)
        found = await files.enter_async_context(self._at_hand(assignment, holders, stage.fetching))
        if stage.leads:
            # Here rather than at Commit, where everyone waits for everyone.
            stage.tokenizer = await asyncio.to_thread(Tokenizer, found.model)
        if stage.child is None:
            self._check_current(stage)
            stage.child = await self._new_child()
        self._check_current(stage)
        stage.child.serve(stage)
        prepare = engine_pb2.PrepareShard(
            assignment=assignment,
            model_dir=str(found.model),
            threads=self._threads or max(1, granted_cores() // max(len(self._held), 1)),
            bind_host=self._data_host,
            simulated=self._simulate(assignment, self.held_bytes(but=assignment.replica)),
            adapter_dirs=map(str, found.adapters),
        )
        with contextlib.suppress(ConnectionError):  # Its end is heard where its events end.
            await stage.child.send(engine_pb2.EngineCommand(prepare=prepare))

    async def _new_child(self) -> StageChild:
        try:
            child = StageChild(await self._spawner.spawn())
        except (ConnectionError, OSError) as error:
            raise FailedPreconditionError(
                f"no child process could be started: {error}", reason="STAGE_NOT_LOADED"
            ) from None
        self._spawn(child.run(), f"child {child.pid}")
        return child

    async def _take_over(self, earlier: Stage) -> StageChild | None:
        """End an earlier generation; its child if it can be used again."""
        usable = earlier.state != LOADING
        child, earlier.child = earlier.child, None
        leader, earlier.leader = earlier.leader, None
        if child is not None:
            child.serve(None)
        earlier.end("SUPERSEDED: a newer generation is prepared")
        if leader is not None:
            await leader.drain(0.0)
        if child is None:
            return None
        if usable and child.alive and await child.leave():
            return child
        await child.kill()
        return None

    def _check_current(self, stage: Stage) -> None:
        """Raise if the stage was replaced or released while it was being loaded."""
        if self._held.get(stage.replica) is not stage:
            raise AbortedError(
                f"generation {stage.generation} of {stage.replica} was released or replaced by "
                f"generation {self._fences.get(stage.replica, 0)} while it was being loaded"
            )

    async def _discard(self, stage: Stage) -> None:
        """Leave nothing of a stage that could not be loaded."""
        if self._held.get(stage.replica) is stage:
            del self._held[stage.replica]
        self.changed.set()
        if stage.child is not None:
            await stage.child.kill()

    # ---- commit --------------------------------------------------------------------------------

    async def commit(
        self,
        replica: str,
        generation: int,
        rendezvous: str,
        cost: common_pb2.StepCost | None = None,
    ) -> None:
        """Join the peers and serve.

        Args:
            replica: which.
            generation: of it.
            rendezvous: where the peers meet.
            cost: what its steps are expected to take, where that is known.

        Raises:
            AbortedError: a newer generation is here.
            FailedPreconditionError: it was not prepared here, or cannot join.
        """
        self._check_fence("Commit", replica, generation)
        stage = self._held.get(replica)
        if stage is None or stage.generation != generation or stage.state == LOADING:
            raise FailedPreconditionError(
                f"generation {generation} of {replica} is not prepared here; Prepare comes first",
                reason="STAGE_NOT_PREPARED",
            )
        if stage.state == PREPARED and stage.child is not None:
            commit = engine_pb2.CommitShard(
                generation=generation,
                rendezvous=rendezvous,
                policy=self._step_policy,
                execution=self._execution,
                record_every_steps=self._record_every_steps,
                clock_seconds=self._now(),
                cost=cost,
            )
            with contextlib.suppress(ConnectionError):
                await stage.child.send(engine_pb2.EngineCommand(commit=commit))
        while stage.state == PREPARED:
            await stage.news()
        if stage.state == FAILED:
            self._check_fence("Commit", replica, generation)
            raise FailedPreconditionError(
                f"stage {stage.assignment.stage_index} of {replica} cannot serve: {stage.reason}",
                reason="STAGE_FAILED",
            )

    def _begin(self, stage: Stage) -> None:
        """The child serves: lead the replica, if this is its first stage."""
        if stage.tokenizer is not None and stage.child is not None:
            stage.leader = self._lead(stage.assignment, stage.tokenizer, stage.child)
            failed = partial(self._broken, stage)
            stage.leader.start(lambda work, name: self._spawn(work, name, failed))

    def _broken(self, stage: Stage, error: Exception) -> None:
        """A fault in leading a replica: it is formed again, and what ran goes on from its log."""
        stage.fail(f"LEADER_FAILED: {by_fault(error)}")
        if stage.child is not None:
            self._spawn(stage.child.kill(), f"end of child {stage.child.pid}")

    def _failed(self, stage: Stage) -> None:
        leader, stage.leader = stage.leader, None
        if leader is not None:
            self._spawn(leader.fail(), f"last words of {stage.replica}")

    # ---- release -------------------------------------------------------------------------------

    async def release(self, replica: str, generation: int, grace_seconds: float) -> None:
        """Let a stage go, after finishing or handing back its work.

        Raises:
            AbortedError: a newer generation is here; it is left alone.
        """
        self._check_fence("Release", replica, generation)
        self._fences[replica] = generation
        stage = self._held.get(replica)
        if stage is None:
            return
        if stage.leader is not None:
            await stage.leader.drain(grace_seconds)
        if self._held.get(replica) is stage:
            del self._held[replica]
            await self._end(stage)
            self.changed.set()

    async def drain(self, grace_seconds: float) -> None:
        """The worker is going: finish or hand back everything that it leads."""
        leaders = [stage.leader for stage in self._held.values() if stage.leader is not None]
        await asyncio.gather(*(leader.drain(grace_seconds) for leader in leaders))

    async def close(self) -> None:
        """End every stage."""
        stages, self._held = list(self._held.values()), {}
        await asyncio.gather(*(self._end(stage) for stage in stages))

    async def _end(self, stage: Stage) -> None:
        child, stage.child = stage.child, None
        leader, stage.leader = stage.leader, None
        if child is not None:
            child.serve(None)
        if leader is not None:
            await leader.close()
        stage.end("RELEASED: it was let go")
        if child is not None:
            await child.kill()

    def _check_fence(self, call: str, replica: str, generation: int) -> None:
        fence = self._fences.get(replica, 0)
        if generation < fence:
            raise _stale(call, replica, generation, fence)


def _stale(call: str, replica: str, generation: int, fence: int) -> AbortedError:
    return AbortedError(
        f"{call} of generation {generation} of {replica}: generation {fence} is here already; "
        "only a newer one is taken",
        metadata={"generation": str(generation), "held_generation": str(fence)},
    )
