"""A machine whose mesh goes away: while it joins, and after."""

import asyncio
import os
import sys
from pathlib import Path

import grpc
import psutil
import pytest

from tests.support.waiting import eventually
from uellm import __version__
from uellm.core.errors import ConfigurationError, UnavailableError
from uellm.embedded import EmbeddedRedis
from uellm.mesh import joining
from uellm.mesh.joining import Guests, JoinOptions, Token, new_secret, until_lost
from uellm.mesh.tether import tethered
from uellm.streams.connection import connect
from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import deployer_pb2, deployer_pb2_grpc


async def test_a_mesh_that_goes_away_while_it_is_joined_is_said_in_a_line(tmp_path: Path) -> None:
    secret = new_secret()
    with EmbeddedRedis(password=secret, wrap=tethered) as server:
        join = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from uellm.cli import main; main()", "join", "127.0.0.1",
            env={
                **os.environ,
                "UELLM_HOME": str(tmp_path),
                "UELLM_JOIN_TOKEN": str(Token(server.port, secret)),
                "UELLM_WORKER_ENGINE": "instant",
            },
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            await eventually(lambda: _has_a_worker(join.pid))
            server.stop()
            assert join.stderr is not None
            said = (await join.stderr.read()).decode().splitlines()
            assert await join.wait() == 3
        finally:
            if join.returncode is None:
                join.kill()
                await join.wait()
    assert "the mesh at 127.0.0.1 went away while this machine joined" in said[-1]


def _has_a_worker(pid: int) -> bool:
    return bool(psutil.Process(pid).children())


async def test_a_mesh_of_another_version_is_not_joined() -> None:
    secret = new_secret()
    with EmbeddedRedis(password=secret, wrap=tethered) as server:
        redis = connect(server.url)
        there = ServiceAddress("deployer", "d", "127.0.0.1:1", 1, version="77.1")
        await Registry(redis).register(there, 60.0)
        await redis.aclose()
        guests = Guests(JoinOptions("127.0.0.1", Token(server.port, secret)))
        says = f"is of uellm 77.1, and this machine has {__version__}; install the same one"
        with pytest.raises(ConfigurationError, match=says):
            async with guests.running():
                pass


class OneWay(deployer_pb2_grpc.DeployerServiceServicer):
    """A deployer that hears of workers, and does not reach them."""

    def __init__(self) -> None:
        self.workers: dict[str, deployer_pb2.WorkerStatus] = {}

    async def RegisterWorker(
        self, request: deployer_pb2.RegisterWorkerRequest, context: object
    ) -> deployer_pb2.RegisterWorkerResponse:
        self.workers[request.worker] = deployer_pb2.WorkerStatus(
            worker=request.worker, address=request.address, devices=request.devices, reachable=False
        )
        return deployer_pb2.RegisterWorkerResponse()

    async def Heartbeat(
        self, request: deployer_pb2.HeartbeatRequest, context: object
    ) -> deployer_pb2.HeartbeatResponse:
        return deployer_pb2.HeartbeatResponse()

    async def Describe(
        self, request: deployer_pb2.DescribeRequest, context: object
    ) -> deployer_pb2.DescribeResponse:
        return deployer_pb2.DescribeResponse(workers=self.workers.values())


async def test_a_machine_that_the_mesh_cannot_reach_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "REACH_SECONDS", 0.0)
    monkeypatch.setenv("UELLM_HOME", str(tmp_path))
    monkeypatch.setenv("UELLM_WORKER_ENGINE", "instant")
    deployer = grpc.aio.server()
    deployer_pb2_grpc.add_DeployerServiceServicer_to_server(OneWay(), deployer)
    port = deployer.add_insecure_port("127.0.0.1:0")
    await deployer.start()
    secret = new_secret()
    try:
        with EmbeddedRedis(password=secret, wrap=tethered) as server:
            redis = connect(server.url)
            there = ServiceAddress("deployer", "d", f"127.0.0.1:{port}", 1)
            await Registry(redis).register(there, 600.0)
            await redis.aclose()
            guests = Guests(JoinOptions("127.0.0.1", Token(server.port, secret), devices="cpu"))
            says = r"cannot reach this machine at 127\.0\.0\.1:\d+; name an address .* --address"
            with pytest.raises(ConfigurationError, match=says):
                async with guests.running():
                    pass
    finally:
        await deployer.stop(None)


async def test_a_mesh_is_lost_only_once_it_has_not_answered_for_long() -> None:
    with EmbeddedRedis(wrap=tethered) as server:
        redis = connect(server.url)
        watch = asyncio.create_task(until_lost(redis, "box", 0.2))
        done, _ = await asyncio.wait([watch], timeout=0.5)
        assert not done
        server.stop()
        with pytest.raises(UnavailableError, match="the mesh at box has not answered for"):
            await watch
        await redis.aclose()
