"""Discovery from end to end: the real deployer, real workers with real children, real probes.

The workers are of the instant engine: ways are measured over the control links, which carry the
activations of decode steps. Slow ways are made by a proxy.
"""

import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from uellm_deployer.measurements import LINKS

from tests.support.probes import deployer_at, see, topology
from tests.support.waiting import HANG_SECONDS, eventually
from tests.support.worker import worker_at
from uellm.convert_topology import topology_from_proto
from uellm.core.errors import NotFoundError, UellmError
from uellm.streams.registry import Registry, ServiceAddress
from uellm.topology_file import load_topology
from uellm.v1 import topology_pb2, worker_pb2


async def test_ways_between_workers_are_measured_and_kept(redis_url: str, redis: Any) -> None:
    async with AsyncExitStack() as stack:
        deployer = await stack.enter_async_context(deployer_at(redis_url))
        for name in ("a", "b", "c"):
            await stack.enter_async_context(worker_at(redis_url, service_id=name))
        await see(deployer, "abc")
        before = (await topology(deployer)).topology
        assert not before.links
        assert [device.id for device in before.devices] == ["a/cpu:0", "b/cpu:0", "c/cpu:0"]
        found = await topology(deployer, probe=True)
        assert not found.notes
        links = {(link.src[0], link.dst[0]): link for link in found.topology.links}
        assert set(links) == {(x, y) for x in "abc" for y in "abc" if x != y}
        for link in links.values():
            assert link.source == "probe"
            assert link.kind == "transport"
            assert 0 < link.wire_seconds <= link.latency_seconds < 1.0
            assert link.bytes_per_second > 1e5
            assert link.HasField("measured_at")
        assert found.topology.version > before.version
        topology_from_proto(found.topology)
        again = await topology(deployer)
        assert again.topology.links == found.topology.links
        assert await redis.hlen(LINKS) == 6
    async with AsyncExitStack() as stack:
        deployer = await stack.enter_async_context(deployer_at(redis_url))
        for name in ("a", "b"):
            await stack.enter_async_context(worker_at(redis_url, service_id=name))
        await see(deployer, "ab")
        kept = (await topology(deployer)).topology.links
        assert len(kept) == 2
        assert all(link in found.topology.links for link in kept), "a restart knows them"


async def test_a_file_completes_and_overrides(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(
        """
        devices:
          - id: a/cpu:0
            path: [rack-7, host-1]
            flops_per_second: 5.0e+11
          - {id: absent/cpu:0, flops_per_second: 1}
        links:
          - {src: a/cpu:0, dst: b/cpu:0, latency_seconds: 0.5, bytes_per_second: 1000}
        default_links:
          - {level: rack, latency_seconds: 0.25, bytes_per_second: 2000}
        """
    )
    async with AsyncExitStack() as stack:
        deployer = await stack.enter_async_context(deployer_at(redis_url, topology_file=str(path)))
        for name in ("a", "b"):
            await stack.enter_async_context(worker_at(redis_url, service_id=name))
        await see(deployer, "ab")
        found = (await topology(deployer, probe=True)).topology
        first, second = found.devices
        assert list(first.path) == ["rack-7", "host-1"]
        assert first.flops_per_second == 5e11
        assert first.memory_total_bytes > 0, "what the file does not say is as it was"
        assert not set(second.path) & {"rack-7", "host-1"}
        links = {(link.src[0], link.dst[0]): link for link in found.links}
        assert links["a", "b"].source == "file"
        assert links["a", "b"].latency_seconds == 0.5
        assert links["b", "a"].source == "probe"
        assert found.default_links[0].latency_seconds == 0.25


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("devices: 7", "topology.yaml"),
        ("devices: [{flops: 1}]", "flops"),
        ("devices: [{name: x}]", "no id"),
        ("links: [", "topology.yaml"),
    ],
)
async def test_a_file_that_cannot_be_read_is_named(
    content: str, word: str, redis_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(content)
    with pytest.raises(UellmError, match=word):
        async with deployer_at(redis_url, topology_file=str(path)):
            pass


async def test_a_file_whose_links_cannot_be_is_refused(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text("links: [{src: a/cpu:0, dst: b/cpu:0, bytes_per_second: -5}]")
    async with AsyncExitStack() as stack:
        deployer = await stack.enter_async_context(deployer_at(redis_url, topology_file=str(path)))
        for name in ("a", "b"):
            await stack.enter_async_context(worker_at(redis_url, service_id=name))
        await see(deployer, "ab")
        with pytest.raises(UellmError, match="bytes_per_second = -5"):
            await topology(deployer)


async def test_a_model_that_is_not_deployed_is_named(redis_url: str) -> None:
    async with deployer_at(redis_url) as deployer:
        with pytest.raises(NotFoundError, match="'nothing' is not deployed"):
            await topology(deployer, model="nothing")


async def test_one_probe_at_a_time(redis_url: str) -> None:
    async with worker_at(redis_url, service_id="a") as worker:
        request = worker_pb2.ProbeLinkRequest(src="a/cpu:0", hidden_size=8)
        first = worker.stub.ProbeLink(request, timeout=HANG_SECONDS)
        assert (await anext(aiter(first))).rendezvous
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(worker.stub.ProbeLink(request, timeout=HANG_SECONDS)))
        assert "another probe is under way" in (caught.value.details() or "")
        first.cancel()

        async def free() -> bool:
            second = worker.stub.ProbeLink(request, timeout=HANG_SECONDS)
            try:
                return bool((await anext(aiter(second))).rendezvous)
            except grpc.aio.AioRpcError:
                return False
            finally:
                second.cancel()

        await eventually(free)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.stub.ProbeBlock(
                worker_pb2.ProbeBlockRequest(device_id="a/cuda:3"), timeout=HANG_SECONDS
            )
        assert "'a/cuda:3' is not of this worker" in (caught.value.details() or "")


async def test_devices_say_what_they_are(redis_url: str) -> None:
    async with worker_at(redis_url, service_id="a", rack="r1") as worker:

        async def measured() -> topology_pb2.Device | None:
            status = await worker.stub.GetStatus(
                worker_pb2.GetStatusRequest(), timeout=HANG_SECONDS
            )
            (device,) = status.devices
            return device if device.HasField("measured_at") else None

        device = await eventually(measured)
        assert device.path[0] == "r1"
        assert device.cores >= 1
        assert device.flops_per_second > 1e8


async def test_the_command_shows_what_is_known(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    environment = os.environ | {"UELLM_REDIS_URL": redis_url, "COLUMNS": "250"}

    async def uellm(*arguments: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).parent / "uellm"), "topology", *arguments]
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    async with AsyncExitStack() as stack:
        status, said = await uellm()
        assert (status, "no deployer" in said) == (3, True)
        deployer = await stack.enter_async_context(deployer_at(redis_url))
        status, said = await uellm()
        assert (status, "start a worker" in said) == (0, True)
        loads = ServiceAddress("worker", "c", "127.0.0.1:1", 1)
        await Registry(redis).register(loads, 60.0)
        status, said = await uellm()
        assert (status, "no device yet: c will tell" in said) == (0, True)
        for name in ("a", "b"):
            await stack.enter_async_context(worker_at(redis_url, service_id=name))
        await see(deployer, "ab")
        status, said = await uellm("--probe")
        assert status == 0
        for word in ("a/cpu:0", "b/cpu:0", "transport", "probe", "just now"):
            assert word in said
        status, said = await uellm("--yaml")
        assert status == 0
        path = tmp_path / "topology.yaml"
        path.write_text(said)
        assert len(load_topology(path).links) == 2
        status, said = await uellm("--json", "--model", "nothing")
        assert status == 1
        assert "'nothing' is not deployed" in said
