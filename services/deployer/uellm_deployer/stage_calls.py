"""Bringing a replica up on its workers, and letting its stages go: the calls, nothing decided."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import grpc

from uellm.core.errors import AbortedError, FailedPreconditionError, UellmError, UnavailableError
from uellm.logs import logger
from uellm.rpc import CALL_SECONDS, error_from
from uellm.v1 import common_pb2, topology_pb2, worker_pb2
from uellm_deployer.holders import Holders
from uellm_deployer.links import Links
from uellm_deployer.replica import worker_of
from uellm_deployer.settings import DeployerSettings
from uellm_deployer.workers import Worker, Workers

_log = logger("forming")

Progress = Callable[[worker_pb2.PrepareResponse], None]
"""Told how far the whole replica is: the sums of its stages' bytes."""
Assignments = Sequence[topology_pb2.ShardAssignment]


class StageError(UellmError):
    """A worker could not do its part.

    Attributes:
        worker: which.
        cause: what it said.
    """

    def __init__(self, worker: str, cause: UellmError) -> None:
        super().__init__(
            f"worker {worker}: {cause.message}", reason=cause.reason, metadata=cause.metadata
        )
        self.worker = worker
        self.cause = cause

    @property
    def transient(self) -> bool:
        """The worker did not answer, or another deployer was there: nothing speaks against it."""
        return isinstance(self.cause, UnavailableError | AbortedError)


class StageCalls:
    """Calls workers for a replica's stages."""

    def __init__(
        self, links: Links, workers: Workers, settings: DeployerSettings, holders: Holders
    ) -> None:
        self._links = links
        self._workers = workers
        self._settings = settings
        self._holders = holders

    async def prepare(
        self,
        assignments: Assignments,
        progress: Progress,
    ) -> str:
        """Load all stages at once; returns where they meet.

        Workers that lack files are told who has them.

        Args:
            assignments: of the stages.
            progress: told how far it is.

        Raises:
            StageError: the first that cannot; the others are no longer waited for.
        """
        told: dict[int, worker_pb2.PrepareResponse] = {}

        def tell(stage: int, response: worker_pb2.PrepareResponse) -> None:
            told[stage] = response
            progress(
                worker_pb2.PrepareResponse(
                    loaded_bytes=sum(each.loaded_bytes for each in told.values()),
                    total_bytes=sum(each.total_bytes for each in told.values()),
                    fetched_bytes=sum(each.fetched_bytes for each in told.values()),
                    fetch_bytes=sum(each.fetch_bytes for each in told.values()),
                )
            )

        holders = await self._holders.of(assignments)
        try:
            rendezvous = await _all(
                self._prepare(assignment, holders, tell) for assignment in assignments
            )
        except StageError:
            self._holders.forget()
            raise
        return str(rendezvous[0])

    async def _prepare(
        self,
        assignment: topology_pb2.ShardAssignment,
        holders: Sequence[worker_pb2.FilesHolder],
        tell: Callable[[int, worker_pb2.PrepareResponse], None],
    ) -> str:
        worker = self._worker(worker_of(assignment))
        try:
            call = self._links.stub(worker).Prepare(
                worker_pb2.PrepareRequest(
                    assignment=assignment,
                    holders=[holder for holder in holders if holder.worker != worker.worker],
                ),
                timeout=self._settings.load_seconds,
            )
            async for response in call:
                tell(assignment.stage_index, response)
                if response.prepared:
                    return response.rendezvous
        except grpc.aio.AioRpcError as error:
            raise StageError(worker.worker, error_from(error)) from None
        raise StageError(worker.worker, FailedPreconditionError("Prepare ended too early"))

    async def commit(
        self, assignments: Assignments, rendezvous: str, cost: common_pb2.StepCost
    ) -> None:
        """Join all stages.

        Args:
            assignments: of the stages.
            rendezvous: where they meet.
            cost: what the replica's steps are expected to take.

        Raises:
            StageError: the first that cannot.
        """
        await _all(self._commit(assignment, rendezvous, cost) for assignment in assignments)

    async def _commit(
        self, assignment: topology_pb2.ShardAssignment, rendezvous: str, cost: common_pb2.StepCost
    ) -> None:
        worker = self._worker(worker_of(assignment))
        request = worker_pb2.CommitRequest(
            replica=assignment.replica,
            generation=assignment.generation,
            rendezvous=rendezvous,
            cost=cost,
        )
        try:
            await self._links.stub(worker).Commit(request, timeout=self._settings.join_seconds)
        except grpc.aio.AioRpcError as error:
            raise StageError(worker.worker, error_from(error)) from None

    async def release(self, assignments: Assignments, *, seconds: float = 0.0) -> None:
        """Let stages go; a worker that does not answer is logged, and found out later.

        Args:
            assignments: which.
            seconds: how long they may take to finish what they run; 0: they hand it back.
        """
        await asyncio.gather(
            *(
                self.release_stage(
                    worker_of(assignment), assignment.replica, assignment.generation, seconds
                )
                for assignment in assignments
            )
        )

    async def release_stage(
        self, name: str, replica: str, generation: int, seconds: float = 0.0
    ) -> None:
        """Let one stage go, if its worker is there."""
        worker = self._workers.get(name)
        if worker is None or worker.reachable is False:
            return
        request = worker_pb2.ReleaseRequest(
            replica=replica, generation=generation, immediate=not seconds
        )
        try:
            await self._links.stub(worker).Release(request, timeout=CALL_SECONDS + seconds)
        except grpc.aio.AioRpcError as error:
            _log.info(
                "a stage was not released",
                worker=name,
                replica=replica,
                generation=generation,
                error=error.details(),
            )

    def _worker(self, name: str) -> Worker:
        worker = self._workers.get(name)
        if worker is None:
            raise StageError(name, UnavailableError("it is not there"))
        return worker


async def _all(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results in order, or the first error once nothing runs any more."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
