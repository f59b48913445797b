"""Which workers have the files of a model: asked when a replica is formed."""

import asyncio
import time
from collections.abc import Sequence

import grpc

from uellm.placement.views import Stock
from uellm.streams.connection import RedisClient
from uellm.streams.secret import mesh_secret
from uellm.v1 import common_pb2, files_pb2, topology_pb2, worker_pb2
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.links import Links
from uellm_deployer.replica import worker_of
from uellm_deployer.workers import Worker, Workers

FIND_SECONDS, STOCK_SECONDS = 2.0, 0.5
"""How long a worker may take to say, to those who need its files and to those who choose of equal
places; one that does not is not counted on."""


class Holders:
    """Asks workers what they have, and remembers who has all of a model.

    Args:
        links: how to call them.
        workers: who is there.
        silence_seconds: after which a worker counts as lost.
        redis: has the mesh's secret.
    """

    def __init__(
        self,
        links: Links,
        workers: Workers,
        silence_seconds: float,
        redis: RedisClient,
    ) -> None:
        self._links = links
        self._workers = workers
        self._silence_seconds = silence_seconds
        self._redis = redis
        self._whole: dict[str, set[tuple[str, int]]] = {}

    async def of(
        self, assignments: Sequence[topology_pb2.ShardAssignment]
    ) -> list[worker_pb2.FilesHolder]:
        """Who has files of what is assigned; nobody if all that it is assigned to have all of it.

        Args:
            assignments: stages of one replica.
        """
        models = [(assignments[0].model, False)]
        models += [(adapter, True) for adapter in assignments[0].adapters]
        return await self._find({worker_of(assignment) for assignment in assignments}, models)

    async def for_one(
        self, worker: str, model: common_pb2.ModelRef
    ) -> list[worker_pb2.FilesHolder]:
        """Who has files of a model; nobody if a worker has all of it."""
        return await self._find({worker}, [(model, False)])

    async def _find(
        self, chosen: set[str], models: Sequence[tuple[common_pb2.ModelRef, bool]]
    ) -> list[worker_pb2.FilesHolder]:
        live = self._workers.live(time.monotonic(), self._silence_seconds)
        here = [worker for worker in live if worker.worker in chosen]
        found = await self._ask(here, models)
        if all(self._has_all(worker, models) for worker in here):
            return []
        found |= await self._ask([worker for worker in live if worker.worker not in chosen], models)
        return [
            worker_pb2.FilesHolder(
                worker=worker.worker, address=worker.address, digests=found[worker.worker]
            )
            for worker in live
            if found[worker.worker]
        ]

    async def stock(self, model: ResolvedModel) -> Stock:
        """What the hosts of all workers have of a model."""
        return Stock(model.needs, await self.held(model.ref))

    async def held(self, model: common_pb2.ModelRef) -> dict[str, frozenset[str]]:
        """The parts that workers' hosts have of a model, of those that do not have all.

        One that does not say has nothing.
        """
        live = self._workers.live(time.monotonic(), self._silence_seconds)
        whole = self._whole.setdefault(model.digest, set())
        asked = [worker for worker in live if _start(worker) not in whole]
        answers = await asyncio.gather(
            *(self._find_files(worker, model, STOCK_SECONDS) for worker in asked)
        )
        return {
            worker.worker: frozenset(answer.held_parts if answer is not None else ())
            for worker, answer in zip(asked, answers, strict=True)
            if answer is None or not answer.whole
        }

    def forget(self) -> None:
        """Ask everybody again: something did not go as was said."""
        self._whole.clear()

    async def _ask(
        self, workers: Sequence[Worker], models: Sequence[tuple[common_pb2.ModelRef, bool]]
    ) -> dict[str, list[str]]:
        """The digests of what each worker has, in whole or in part, by its id."""
        pairs = [(worker, ref, adapter) for worker in workers for ref, adapter in models]
        held = await asyncio.gather(*(self._holds(*pair) for pair in pairs))
        found: dict[str, list[str]] = {worker.worker: [] for worker in workers}
        for (worker, ref, _), holds in zip(pairs, held, strict=True):
            if holds:
                found[worker.worker].append(ref.digest)
        return found

    async def _holds(self, worker: Worker, ref: common_pb2.ModelRef, adapter: bool) -> bool:
        if _start(worker) in self._whole.setdefault(ref.digest, set()):
            return True
        answer = await self._find_files(worker, ref, FIND_SECONDS, adapter=adapter)
        return answer is not None and bool(answer.held_bytes)

    async def _find_files(
        self, worker: Worker, ref: common_pb2.ModelRef, seconds: float, *, adapter: bool = False
    ) -> files_pb2.FindFilesResponse | None:
        whole = self._whole.setdefault(ref.digest, set())
        request = files_pb2.FindFilesRequest(model=ref, adapter=adapter)
        metadata = (("authorization", f"Bearer {await mesh_secret(self._redis)}"),)
        try:
            answer = await self._links.files(worker).FindFiles(
                request, metadata=metadata, timeout=seconds
            )
        except grpc.aio.AioRpcError:
            return None
        if answer.whole:
            whole.add(_start(worker))
        return answer

    def _has_all(self, worker: Worker, models: Sequence[tuple[common_pb2.ModelRef, bool]]) -> bool:
        # What was found may have been forgotten while it was asked for.
        return all(_start(worker) in self._whole.get(ref.digest, ()) for ref, _ in models)


def _start(worker: Worker) -> tuple[str, int]:
    return worker.worker, worker.incarnation
