"""A minute of kill -9 in all parts, Redis included, under load: every answer is as in calm."""

import asyncio
import random
from pathlib import Path

import pytest

import uellm.demo
from tests.support.fleet import Fleet, fleet
from tests.support.queues import unrest
from tests.support.storm import Reference, Storm
from tests.support.waiting import eventually
from uellm.client import Client, new_request
from uellm.embedded import free_port
from uellm.streams.connection import connect

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "demo"
MODEL_DIR = Path(uellm.demo.__file__).parent / "model"
PROMPTS = (
    "Count from 1 to 40.",
    "Tell me a story of 9 sentences.",
    "Repeat the word tree 30 times.",
    "Repeat the word sun 12 times.",
)
MAX_TOKENS = 300
STORM_SECONDS = 60.0
MOST_SILENT_SECONDS = 30.0
"""Kills may follow each other faster than a replica is formed again."""


async def reference(mesh: Fleet) -> Reference:
    """What the prompts are answered in calm: greedy, so always the same."""

    async def answer(client: Client, prompt: str) -> tuple[list[int], str]:
        ids: list[int] = []
        text = ""
        async for event in client.generate(new_request(MODEL, prompt, max_tokens=MAX_TOKENS)):
            ids += event.tokens.ids
            text += event.tokens.text
        return ids, text

    async with Client(await mesh.addresses("gateway", 2)) as client:
        return {prompt: await answer(client, prompt) for prompt in PROMPTS}


async def nothing_is_left(mesh: Fleet) -> None:
    """Nothing is queued, pending, leased or kept for ever."""
    redis = connect(mesh.redis.url)

    async def at_rest() -> bool:
        left = await unrest(redis, MODEL)
        assert not left, left
        return True

    try:
        await eventually(at_rest, interval=0.1)
        assert await redis.xlen(f"uellm:{{{MODEL}}}:dead") == 0
    finally:
        await redis.aclose()


@pytest.mark.parametrize("seed", [1])
async def test_storm(tmp_path: Path, seed: int) -> None:
    with fleet(tmp_path) as mesh:
        for number in (1, 2):
            mesh.add("worker", number, threads="1")
            mesh.add("deployer", number)
            mesh.add("profiler", number)
            mesh.add("scheduler", number)
            mesh.add("gateway", number, port=str(free_port()))
        await mesh.deploy(MODEL, MODEL_DIR, stages=2, slots=8)
        rng = random.Random(seed)  # noqa: S311 - repeats a storm, guards nothing
        storm = Storm(mesh, MODEL, await reference(mesh), rng, max_tokens=MAX_TOKENS)
        async with asyncio.timeout(STORM_SECONDS + 90):
            await storm.rage(seconds=STORM_SECONDS, askers=20, every_seconds=3.0, redis_at=0.5)
        weather = storm.weather
        assert not weather.wrong, "\n".join([str(weather), *weather.wrong])
        assert weather.answered > 100, weather
        assert weather.kills["redis"] == 1, weather
        assert max(weather.longest_gap, weather.longest_first) < MOST_SILENT_SECONDS, weather
        await nothing_is_left(mesh)
