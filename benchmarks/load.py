"""Load on a gateway: closed loops for saturation, Poisson arrivals for latency."""

import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc

from uellm.rpc import channel
from uellm.v1 import common_pb2, inference_pb2, inference_pb2_grpc


@dataclass(slots=True)
class Load:
    """What a load came to.

    Attributes:
        seconds: from the first request to the last answer.
        ttft_seconds: time to first token, one per request.
        tokens: output tokens in all.
    """

    seconds: float = 0.0
    ttft_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def request(model: str, tokens: int, seed: int) -> inference_pb2.GenerateRequest:
    """A chat request for exactly ``tokens`` tokens."""
    message = inference_pb2.ChatMessage(
        role="user", content=[inference_pb2.ContentPart(text="Count from 1 to 20.")]
    )
    return inference_pb2.GenerateRequest(
        model=model,
        chat=inference_pb2.Chat(messages=[message]),
        sampling=common_pb2.Sampling(max_tokens=tokens, ignore_eos=True, seed=seed),
    )


async def _one(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub",
    model: str,
    tokens: int,
    seed: int,
    load: Load,
) -> None:
    began = time.perf_counter()
    first = None
    count = 0
    async for response in stub.Generate(request(model, tokens, seed), timeout=120):
        if response.event.WhichOneof("event") == "tokens":
            first = first or time.perf_counter()
            count += len(response.event.tokens.ids)
    if first is None or count != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {count}")
    load.ttft_seconds.append(first - began)
    load.tokens += count


async def closed_loop(
    address: str, model: str, *, requests: int, concurrency: int, tokens: int
) -> Load:
    """Keep ``concurrency`` requests under way until ``requests`` are answered."""
    load = Load()
    remaining = iter(range(requests))
    async with channel(address) as connection:
        stub = inference_pb2_grpc.InferenceServiceStub(connection)

        async def worker() -> None:
            for seed in remaining:
                await _one(stub, model, tokens, seed, load)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        load.seconds = time.perf_counter() - began
    return load


async def poisson(
    address: str, model: str, *, rate: float, seconds: float, tokens: int, seed: int
) -> Load:
    """Requests at ``rate`` per second, whether or not earlier ones are answered."""
    load = Load()
    rng = random.Random(seed)
    async with channel(address) as connection:
        stub = inference_pb2_grpc.InferenceServiceStub(connection)
        began = time.perf_counter()
        due = 0.0
        async with asyncio.TaskGroup() as group:
            while (due := due + rng.expovariate(rate)) < seconds:
                await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
                group.create_task(_one(stub, model, tokens, len(load.ttft_seconds), load))
        load.seconds = time.perf_counter() - began
    return load


async def wait_ready(address: str, model: str, seconds: float = 60.0) -> None:
    """Wait until a model takes requests.

    Raises:
        TimeoutError: if it does not in time.
    """
    async with asyncio.timeout(seconds), channel(address) as connection:
        stub = inference_pb2_grpc.InferenceServiceStub(connection)
        while True:
            try:
                models = (
                    await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
                ).models
                if any(served.name == model and served.ready_replicas for served in models):
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)
