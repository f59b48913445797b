"""kill -9 of each part while answers stream: the client ends up with the text of a run without."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import uellm.demo
from tests.support.checkpoints import write_adapter
from tests.support.fleet import Fleet, Service, fleet
from tests.support.mesh_answers import PROMPTS, collect
from uellm.client import Client, new_request
from uellm.embedded import free_port
from uellm.v1.inference_pb2 import GenerationEvent

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = "demo"
MODEL_DIR = Path(uellm.demo.__file__).parent / "model"
ADAPTER, ADAPTED = "twist", PROMPTS[2]
"""The adapter that answers one of them."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two of everything that can be two, started alone with only an address of Redis."""
    with fleet(tmp_path_factory.mktemp("fleet")) as running:
        running.add("worker", 1, threads="1")
        running.add("worker", 2, threads="1")
        running.add("deployer", 1)
        for number in (1, 2):
            running.add("profiler", number)
            running.add("scheduler", number)
            running.add("gateway", number, port=str(free_port()))
        adapter = write_adapter(running.directory / ADAPTER, layers=8, hidden=192, rank=4)
        asyncio.run(running.deploy(MODEL, MODEL_DIR, stages=2, adapters={ADAPTER: adapter}))
        yield running


@pytest.fixture(scope="module")
def reference(mesh: Fleet) -> dict[str, tuple[list[int], str]]:
    """What the prompts are answered when nothing fails: greedy, so always the same."""

    async def ask() -> dict[str, tuple[list[int], str]]:
        gateways = await mesh.addresses("gateway", 2)
        async with Client(gateways) as client:
            return {prompt: await collect(answer(client, prompt)) for prompt in PROMPTS}

    return asyncio.run(ask())


@pytest.fixture
async def client(mesh: Fleet) -> AsyncIterator[Client]:
    async with Client(await mesh.addresses("gateway", 2)) as connected:
        yield connected


def answer(client: Client, prompt: str) -> AsyncIterator[GenerationEvent]:
    adapter = ADAPTER if prompt == ADAPTED else ""
    return client.generate(new_request(MODEL, prompt, adapter=adapter, max_tokens=300))


async def ask_all_during(
    client: Client,
    reference: dict[str, tuple[list[int], str]],
    fault: Callable[[], Awaitable[None]],
) -> None:
    """All prompts at once, the fault in the middle of the first: all as without it."""
    struck = asyncio.Event()

    async def strike() -> None:
        await fault()
        struck.set()

    got = await asyncio.gather(
        collect(answer(client, PROMPTS[0]), strike),
        *(collect(answer(client, prompt)) for prompt in PROMPTS[1:]),
    )
    assert struck.is_set()
    assert dict(zip(PROMPTS, got, strict=True)) == reference


def killing(service: Service, *, restart: bool = True) -> Callable[[], Awaitable[None]]:
    async def kill() -> None:
        service.kill()
        if restart:
            service.start()

    return kill


@pytest.mark.parametrize("stage", [0, 1])
async def test_kill_of_a_stages_child(
    mesh: Fleet, client: Client, reference: dict[str, tuple[list[int], str]], stage: int
) -> None:
    await mesh.wait_ready(MODEL)
    pids = await mesh.stage_pids(MODEL)

    async def kill() -> None:
        os.kill(pids[stage], signal.SIGKILL)

    await ask_all_during(client, reference, kill)


@pytest.mark.parametrize("number", [1, 2])
async def test_kill_of_a_worker(
    mesh: Fleet, client: Client, reference: dict[str, tuple[list[int], str]], number: int
) -> None:
    await mesh.addresses("worker", 2)
    await mesh.wait_ready(MODEL)
    await ask_all_during(client, reference, killing(mesh.services[f"worker-{number}"]))


async def test_kill_of_the_owning_scheduler(
    mesh: Fleet, client: Client, reference: dict[str, tuple[list[int], str]]
) -> None:
    await mesh.wait_ready(MODEL)

    async def kill_both_in_turn() -> None:
        # One of the two owns the model; the second kill hits the other after it took over.
        mesh.services["scheduler-1"].kill()
        mesh.services["scheduler-1"].start()
        await mesh.addresses("scheduler", 2)
        mesh.services["scheduler-2"].kill()
        mesh.services["scheduler-2"].start()

    await ask_all_during(client, reference, kill_both_in_turn)
    await mesh.addresses("scheduler", 2)


async def test_kill_of_a_gateway(
    mesh: Fleet, client: Client, reference: dict[str, tuple[list[int], str]]
) -> None:
    await mesh.wait_ready(MODEL)

    # Both in turn, the second while the first is back: the client is at one of them.
    async def kill_both_in_turn() -> None:
        for number in (1, 2):
            mesh.services[f"gateway-{number}"].kill()
            mesh.services[f"gateway-{number}"].start()
            await mesh.addresses("gateway", 2)

    await ask_all_during(client, reference, kill_both_in_turn)


async def test_kill_of_the_deployer_and_a_profiler(
    mesh: Fleet, client: Client, reference: dict[str, tuple[list[int], str]]
) -> None:
    await mesh.wait_ready(MODEL)

    async def kill() -> None:
        for name in ("deployer-1", "profiler-1"):
            mesh.services[name].kill()
            mesh.services[name].start()

    await ask_all_during(client, reference, kill)
    # The new deployer adopts what runs instead of forming it again.
    before = await mesh.stage_pids(MODEL)
    await mesh.addresses("deployer", 1)
    assert (await mesh.wait_ready(MODEL)).replicas
    assert await mesh.stage_pids(MODEL) == before


async def test_an_adapter_answers_those_who_name_it(
    client: Client, reference: dict[str, tuple[list[int], str]]
) -> None:
    plain = await collect(client.generate(new_request(MODEL, ADAPTED, max_tokens=300)))
    assert len(reference[ADAPTED][0]) > 0
    assert plain != reference[ADAPTED]


async def test_everything_is_registered_twice(mesh: Fleet) -> None:
    for role in ("gateway", "profiler", "scheduler", "worker"):
        assert len(set(await mesh.addresses(role, 2))) == 2
