"""A model that is served by a real scheduler and a real worker with the instant engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support import worker as workers
from tests.support.scheduling import Mesh, scheduler
from tests.support.waiting import eventually
from uellm.policy.registry import DEFAULT_POLICY
from uellm.streams.messages import Record
from uellm.v1.common_pb2 import Sampling

MODEL = workers.MODEL
STEP_SECONDS = 0.01


@asynccontextmanager
async def serving(
    mesh: Mesh,
    redis_url: str,
    directory: Path,
    policy: str = DEFAULT_POLICY,
    step_seconds: float = STEP_SECONDS,
    **settings: Any,
) -> AsyncIterator[None]:
    """A scheduler, and a worker whose engine has one slot and steps of a fixed length."""
    surroundings = workers.Mesh(mesh.redis, redis_url, workers.write_servable_model(directory))
    async with (
        workers.deployer_at(mesh.redis),
        workers.worker_at(
            redis_url,
            instant_step_seconds=step_seconds,
            step_policy=policy,
            record_every_steps=8,
        ) as worker,
    ):
        await worker.bring_up(surroundings.assignment(1, slots=1))
        await mesh.deploy(workers.REPLICA, slots=1, step_seconds=step_seconds)
        async with scheduler(redis_url, policy=policy, **settings):
            yield


async def ask(mesh: Mesh, tokens: int, **facts: Any) -> str:
    """Accept a request that will be answered with so many tokens, as is expected."""
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    return await mesh.accept(output=facts.pop("output", tokens), sampling=sampling, **facts)


async def ended(mesh: Mesh, request_id: str) -> Record:
    async def over() -> Record | None:
        record = await mesh.record(request_id)
        return record if record.ended else None

    record = await eventually(over)
    assert record is not None
    return record


async def started(mesh: Mesh, request_id: str) -> None:
    async def running() -> bool:
        return (await mesh.record(request_id)).first_token_at is not None

    await eventually(running)
