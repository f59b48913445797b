"""A mesh over hosts of one's own making, wires between them; nothing is left of them afterwards."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.hosts import groups, why_not
from benchmarks.shaped_mesh import HostSpec, shaped_mesh
from tests.support.waiting import eventually
from uellm.client import Client, new_request
from uellm.placement.topology import LinkSpeed

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
HOLDS_A_HOST = """
import time
from benchmarks.hosts import network, quota
from uellm.placement.topology import LinkSpeed
with network(["one"], lambda here, there: LinkSpeed(0.001, 1e8)), quota("one"):
    print("up", flush=True)
    time.sleep(60)
"""


def left(pid: int) -> list[Path]:
    """What is there of the hosts that a process made."""
    places = (Path("/run/netns"), Path("/etc/netns"), groups())
    return [path for place in places if place.is_dir() for path in place.glob(f"uellm-{pid}-*")]


async def test_a_replica_over_a_slow_wire_waits_for_it_there_and_back() -> None:
    latency, tokens = 0.02, 24
    specs = [HostSpec("near", 0, 1 << 30), HostSpec("away", 0, 1 << 30)]
    ways = {"near": LinkSpeed(1e-4, 1e9), "away": LinkSpeed(latency, 1e7)}
    async with shaped_mesh(specs, ways, ["away"]) as mesh:
        devices = {
            device["host"]: device["id"]
            for device in (await mesh.json("topology"))["topology"]["devices"]
        }
        plan = mesh.directory / "plan.json"
        source = (await mesh.json("status", "demo"))["deployments"][0]["model"]["source"]
        took = {}
        for name, order in (("alone", ["near"]), ("over the wire", ["near", "away"])):
            ends = [0, *(8 * (n + 1) // len(order) for n in range(len(order)))]
            stages = [
                {"device_id": devices[host], "first_layer": ends[n], "last_layer": ends[n + 1] - 1}
                for n, host in enumerate(order)
            ]
            plan.write_text(json.dumps({"stages": stages}))
            await mesh.run("deploy", f"demo={source}", "--plan", str(plan))
            async with Client(mesh.address) as client:
                for _ in range(2):  # The first is to warm up.
                    began = time.perf_counter()
                    request = new_request("demo", "Count from 1 to 20.", max_tokens=tokens)
                    async for _ in client.generate(request):
                        pass
                    took[name] = time.perf_counter() - began
        assert took["over the wire"] >= tokens * 2 * latency > took["alone"]
    assert not left(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_nothing_is_left_of_hosts(number: signal.Signals) -> None:
    async def start() -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDS_A_HOST, stdout=asyncio.subprocess.PIPE, stderr=-3
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        assert left(process.pid)
        return process

    first = await start()
    first.send_signal(number)
    await first.wait()
    if number == signal.SIGINT:
        assert not left(first.pid)
    # What could not clean up is cleaned up after.
    second = await start()
    assert not left(first.pid)
    second.send_signal(signal.SIGINT)
    await second.wait()
    await eventually(lambda: not left(second.pid))
