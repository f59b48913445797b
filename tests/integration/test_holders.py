"""Who has a model's files, while what was found is forgotten."""

from typing import Any, cast

import grpc
from redis.asyncio import Redis
from uellm_deployer.holders import Holders
from uellm_deployer.links import Links
from uellm_deployer.workers import Workers

from uellm.service import Context
from uellm.v1 import common_pb2, deployer_pb2, files_pb2, files_pb2_grpc


class Forgetful(files_pb2_grpc.FilesServiceServicer):
    """A worker with all of a model; when it says so, another replica has just failed."""

    def __init__(self) -> None:
        self.holders: Holders | None = None

    async def FindFiles(self, request: Any, context: Any) -> files_pb2.FindFilesResponse:
        assert self.holders is not None
        self.holders.forget()
        return files_pb2.FindFilesResponse(whole=True, held_bytes=1)


async def test_what_is_forgotten_while_it_is_asked_for_is_not_counted_on(redis: Redis) -> None:
    server, worker = grpc.aio.server(), Forgetful()
    files_pb2_grpc.add_FilesServiceServicer_to_server(worker, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    links, workers = Links(cast("Context", None), lambda: None), Workers()
    try:
        known = deployer_pb2.RegisterWorkerRequest(worker="w", address=address, incarnation=1)
        workers.register(known, now=float("inf"))
        worker.holders = Holders(links, workers, 1.0, redis)
        (found,) = await worker.holders.for_one("w", common_pb2.ModelRef(digest="d"))
        assert (found.worker, found.digests) == ("w", ["d"])
    finally:
        await links.close()
        await server.stop(None)
