"""A device that is slower than it says loses layers while answers stream: no answer is lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import uellm.demo
from tests.support.fleet import MODEL, Fleet, fleet, status
from tests.support.mesh_answers import PROMPTS, collect
from tests.support.waiting import eventually
from uellm.client import Client, new_request
from uellm.embedded import free_port
from uellm.v1 import topology_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL_DIR = Path(uellm.demo.__file__).parent / "model"
DEVICE = "sim:0:memory={}:flops=1e12:bandwidth={}:paced"
BESIDE, INSTEAD = "2GiB", "400MiB"
"""Memory for two stages, and for one."""
TOPOLOGY = "devices: [{id: worker-2/sim:0, memory_bytes_per_second: 1.0e+9}]"
"""What is said of the second worker's device, which reads a quarter of it."""


@pytest.fixture(params=[BESIDE, INSTEAD])
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    said = tmp_path / "topology.yaml"
    said.write_text(TOPOLOGY)
    with fleet(tmp_path) as running:
        running.add("worker", 1, threads="1", devices=DEVICE.format(request.param, "1e9"))
        running.add("worker", 2, threads="1", devices=DEVICE.format(request.param, "2.5e8"))
        running.add(
            *("deployer", 1),
            topology_file=str(said),
            objective="lr",
            replan_seconds="0.5",
            replan_cooldown_seconds="1",
        )
        running.add("profiler", 1)
        running.add("scheduler", 1)
        running.add("gateway", 1, port=str(free_port()))
        yield running


async def test_a_slow_device_gives_its_layers_away_under_load(
    mesh: Fleet, request: pytest.FixtureRequest
) -> None:
    await mesh.deploy(MODEL, MODEL_DIR, stages=2)
    before = await mesh.wait_ready(MODEL)
    counts = [stage.last_layer - stage.first_layer + 1 for stage in before.replicas[0].stages]
    assert counts == [4, 4], "by what is said of them they are alike"
    done = asyncio.Event()

    async def answered(client: Client, prompt: str) -> tuple[list[int], str]:
        return await collect(client.generate(new_request(MODEL, prompt, max_tokens=200)))

    async def changed() -> bool:
        (deployment,) = (await mesh.describe()).deployments
        return any(c.state == topology_pb2.CHANGE_STATE_DONE for c in deployment.changes)

    async def watch() -> None:
        try:
            await eventually(changed, timeout=90.0, interval=0.2)
        finally:
            done.set()

    async with Client(await mesh.addresses("gateway", 1)) as client:
        texts: dict[str, tuple[list[int], str]] = {}

        async def keep_asking(prompt: str) -> None:
            while not done.is_set():
                found = await answered(client, prompt)
                assert texts.setdefault(prompt, found) == found

        await asyncio.gather(watch(), *(keep_asking(prompt) for prompt in PROMPTS))
        for prompt in PROMPTS:
            assert await answered(client, prompt) == texts[prompt]
    shown = await status(mesh)
    (change,) = shown["changes"]
    assert change["state"] == "CHANGE_STATE_DONE"
    beside = request.node.callspec.params["mesh"] == BESIDE
    assert change["make_before_break"] is beside
    # In its place, what devices hold already is not loaded again.
    assert change["moved_layers"] == 8 if beside else 3 <= change["moved_layers"] <= 5
    assert "worker-2/sim:0 takes" in change["reason"]
    held = {
        stage["device_id"]: stage["last_layer"] - stage["first_layer"] + 1
        for stage in shown["replicas"][-1]["planned"]["stages"]
    }
    assert held == {"worker-1/sim:0": 7, "worker-2/sim:0": 1}
