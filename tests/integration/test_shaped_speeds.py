"""Discovery finds the differences that are there: slow wires, and processors that are halved."""

import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
from uellm_worker.children import ChildSpawner

from benchmarks.hosts import OUTSIDE, Host, NoHostsError, Quota, network, quota
from tests.support.probes import deployer_at, see, topology
from uellm.embedded import EmbeddedRedis
from uellm.placement.topology import LinkSpeed
from uellm.v1.engine_pb2 import EngineCommand, PrepareShard, ProbeBlock
from uellm.v1.topology_pb2 import ShardAssignment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def where_it_can_be() -> Iterator[None]:
    """Skips where there can be no hosts, or shares of a core."""
    try:
        yield
    except NoHostsError as error:
        pytest.skip(str(error))


@asynccontextmanager
async def forwarded(port: int) -> AsyncIterator[int]:
    """A port of all addresses that leads to one of the loopback address."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(lead, "0.0.0.0", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@contextmanager
def worker_on(host: Host, outside: Host, redis_port: int, engine: str) -> Iterator[None]:
    """A worker process on a host, with Redis outside."""
    environment = os.environ | {
        "UELLM_REDIS_URL": f"redis://{outside.address}:{redis_port}/0",
        "UELLM_WORKER_HOST": host.address,
        "UELLM_WORKER_SERVICE_ID": host.name,
        "UELLM_WORKER_ENGINE": engine,
        "UELLM_WORKER_DEVICES": "sim:0:memory=1GiB",
        "UELLM_WORKER_THREADS": "1",
    }
    process = subprocess.Popen(host.command(sys.executable, "-m", "uellm_worker"), env=environment)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("engine", ["instant", "shard"])
async def test_a_slow_wire_is_found_to_be_as_slow_as_it_is(
    engine: str, redis_url: str, redis_server: EmbeddedRedis
) -> None:
    there, back, latency = 12e6, 6e6, 0.004
    slow = {("a", "b"): LinkSpeed(latency, there), ("b", "a"): LinkSpeed(latency, back)}

    def way(src: str, dst: str) -> LinkSpeed:
        return slow.get((src, dst), LinkSpeed(1e-4, 1e9))

    async with AsyncExitStack() as stack:
        stack.enter_context(where_it_can_be())
        hosts = stack.enter_context(network("ab", way))
        port = await stack.enter_async_context(forwarded(redis_server.port))
        deployer = await stack.enter_async_context(
            deployer_at(redis_url, host="0.0.0.0", advertise_host=hosts[OUTSIDE].address)
        )
        for name in "ab":
            stack.enter_context(worker_on(hosts[name], hosts[OUTSIDE], port, engine))
        await see(deployer, "ab", 180.0)
        found = await topology(deployer, probe=True)
        assert not found.notes
        links = {(link.src[0], link.dst[0]): link for link in found.topology.links}
        for ends, rate in ((("a", "b"), there), (("b", "a"), back)):
            assert links[ends].bytes_per_second == pytest.approx(rate, rel=0.2)
            # A row of activations is on its way for as long as its bytes take, besides.
            assert links[ends].wire_seconds == pytest.approx(latency, rel=0.2)
            # The software of a hop to who has waited is in it, some tenths of a millisecond.
            assert 0.8 * latency <= links[ends].latency_seconds <= 1.6 * latency


async def test_half_the_processor_is_found_to_be_half_as_fast() -> None:
    """Shares small enough to be had on a machine that is busy otherwise."""
    async with AsyncExitStack() as stack:
        stack.enter_context(where_it_can_be())
        shares = [stack.enter_context(quota(name)) for name in ("small", "large")]
        for share, cores in zip(shares, (0.15, 0.3), strict=True):
            share.set(cores)
        spawner = ChildSpawner("shard")
        await spawner.start()
        stack.push_async_callback(spawner.close)

        async def token_seconds(share: Quota) -> float:
            child = await spawner.spawn()
            share.hold([child.pid])
            shard = PrepareShard(
                assignment=ShardAssignment(device_ids=["w/cpu:0"], dtype="float32"), threads=1
            )
            command = ProbeBlock(shard=shard, budget_seconds=4.0)
            await child.send(EngineCommand(probe_block=command))
            event: Any = await anext(child.events())
            await child.kill()
            points = event.block_probed.points
            return statistics.mean(p.layer_seconds / p.tokens for p in points if p.tokens == 16)

        # In turn, so that whatever else the machine does is felt by both.
        ratios = [await token_seconds(shares[0]) / await token_seconds(shares[1]) for _ in range(3)]
        assert statistics.median(ratios) == pytest.approx(2.0, rel=0.2)
