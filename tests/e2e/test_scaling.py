"""A model under load gets copies, also what an idle one can do without, and gives them back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import uellm.demo
from tests.support.fleet import Fleet, fleet, status
from tests.support.mesh_answers import PROMPTS, collect
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.client import Client, new_request
from uellm.embedded import free_port
from uellm.rpc import channel
from uellm.v1 import common_pb2, deployer_pb2, deployer_pb2_grpc, topology_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL_DIR = Path(uellm.demo.__file__).parent / "model"
DEVICE = "sim:0:memory=420MiB:flops=1e12:bandwidth=2e8:paced"
"""Room for one copy. A step takes as long as it is predicted to, and leaves the cores idle."""
READY = topology_pb2.REPLICA_STATE_READY
LONGEST = 60


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as running:
        for number in (1, 2, 3):
            running.add("worker", number, threads="1", devices=DEVICE)
        running.add(
            *("deployer", 1),
            objective="goodput",
            replan_seconds="0.5",
            replan_cooldown_seconds="1",
            keep_seconds="5",
        )
        running.add("profiler", 1)
        running.add("scheduler", 1, load_window_seconds="4")
        running.add("gateway", 1, port=str(free_port()))
        yield running


async def deploy(mesh: Fleet, name: str) -> None:
    (deployer, *_) = await mesh.addresses("deployer", 1)
    request = deployer_pb2.PlanRequest(
        model=common_pb2.ModelRef(name=name, source=str(MODEL_DIR)), slots=2, max_tokens=256
    )
    async with channel(deployer) as connection:
        stub = deployer_pb2_grpc.DeployerServiceStub(connection)
        await stub.Apply(deployer_pb2.ApplyRequest(deployment=request), timeout=HANG_SECONDS)
    await mesh.wait_ready(name)


async def copies(mesh: Fleet, name: str) -> list[str]:
    """The devices of a model's copies; none while one comes or goes."""
    (found,) = (d for d in (await mesh.describe()).deployments if d.name == name)
    if any(replica.state != READY for replica in found.replicas):
        return []
    return [stage.device_id for r in found.replicas for stage in r.planned.stages]


async def until(mesh: Fleet, name: str, count: int) -> list[str]:
    async def there() -> list[str]:
        found = await copies(mesh, name)
        return found if len(found) == count else []

    return await eventually(there, timeout=90.0, interval=0.2)


@asynccontextmanager
async def asked(client: Client, name: str, at_once: int) -> AsyncIterator[None]:
    """Requests come without a break; each of them has one answer, always the same."""
    done = asyncio.Event()
    texts: dict[str, tuple[list[int], str]] = {}

    async def keep_asking(number: int) -> None:
        prompt = PROMPTS[number % len(PROMPTS)]
        while not done.is_set():
            request = new_request(name, prompt, max_tokens=LONGEST)
            found = await collect(client.generate(request))
            assert texts.setdefault(prompt, found) == found

    async with asyncio.TaskGroup() as tasks:
        for number in range(at_once):
            tasks.create_task(keep_asking(number))
        try:
            yield
        finally:
            done.set()


async def test_copies_follow_the_load_and_no_answer_is_lost(mesh: Fleet) -> None:
    for name in ("a", "b"):
        await deploy(mesh, name)
    async with Client(await mesh.addresses("gateway", 1)) as client:
        async with asked(client, "b", 6):
            before = await until(mesh, "b", 2)
            assert len(set(before)) == 2
            shown = await status(mesh, "b")
            assert shown["load"]["offered"]["requests_per_second"] > 0
            assert shown["load"]["capacity_requests_per_second"] > 0
            (change,) = shown["changes"]
            assert change["kind"] == "CHANGE_KIND_ADD"
            assert "requests/s come" in change["reason"]
        async with asked(client, "a", 6):
            # Two devices of three: one of them was the idle model's.
            after = await until(mesh, "a", 2)
            left = await until(mesh, "b", 1)
            assert set(after) | set(left) == {f"worker-{n}/sim:0" for n in (1, 2, 3)}
        await until(mesh, "a", 1)
        (last,) = [c for c in (await status(mesh, "a"))["changes"] if "REMOVE" in c["kind"]]
        assert last["state"] == "CHANGE_STATE_DONE"
