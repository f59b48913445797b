"""Answers of a whole mesh, collected while something is done to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from uellm.v1.inference_pb2 import GenerationEvent

PROMPTS = (
    "Count from 1 to 40.",
    "Tell me a story of 9 sentences.",
    "Repeat the word tree 30 times.",
)


ANSWER_SECONDS = 240.0


async def collect(
    events: AsyncIterator[GenerationEvent],
    fault: Callable[[], Awaitable[None]] | None = None,
    after_tokens: int = 12,
) -> tuple[list[int], str]:
    """Tokens and text of an answer; ``fault`` strikes once, in the middle of it."""
    ids: list[int] = []
    text = ""
    finished = 0
    async with asyncio.timeout(ANSWER_SECONDS):
        async for event in events:
            kind = event.WhichOneof("event")
            if kind == "tokens":
                assert event.tokens.offset == len(ids), "a token twice, or missing"
                ids += event.tokens.ids
                text += event.tokens.text
            elif kind == "finished":
                finished += 1
                assert event.finished.usage.output_tokens == len(ids)
            if fault is not None and len(ids) >= after_tokens:
                strike, fault = fault, None
                await strike()
    assert finished == 1
    assert fault is None, "the answer ended before the fault"
    return ids, text
