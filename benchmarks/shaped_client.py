"""What the benchmark of deployments serves, and who asks for answers."""
# ruff: noqa: PLC0415 - model libraries are loaded where a checkpoint is written.

import asyncio
import json
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.layouts import Load
from benchmarks.shaped_mesh import ShapedMesh
from uellm.rpc import channel
from uellm.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MODEL = "shaped"
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16}
LOAD = Load(prompt=32, tokens=32, slots=12)


def write_model(directory: Path) -> None:
    """Write a Llama of 47 million parameters with random weights, and the demo's tokenizer."""
    import torch
    import transformers

    import uellm.demo

    torch.manual_seed(0)
    demo = Path(uellm.demo.__file__).parent / "model"
    vocab = json.loads((demo / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=vocab, num_attention_heads=8, num_key_value_heads=4, **SHAPE
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, directory / name)


class Client:
    """Asks a mesh from outside, with prompts that have nothing in common."""

    def __init__(self, mesh: ShapedMesh) -> None:
        self._mesh, self._rng = mesh, Random(0)

    async def answer(self, stub: Any) -> tuple[float, float]:
        """Seconds to the first token and to the last; an answer that is not whole is an error."""
        ids = [self._rng.randrange(3, 1000) for _ in range(LOAD.prompt)]
        request = inference_pb2.GenerateRequest(
            model=MODEL,
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=common_pb2.Sampling(max_tokens=LOAD.tokens, ignore_eos=True, seed=1),
        )
        began, first, count = time.perf_counter(), 0.0, 0
        async for response in stub.Generate(request, timeout=300):
            if response.event.WhichOneof("event") == "tokens":
                first = first or time.perf_counter() - began
                count += len(response.event.tokens.ids)
        if count != LOAD.tokens:
            raise RuntimeError(f"an answer of {count} tokens instead of {LOAD.tokens}")
        return first, time.perf_counter() - began

    async def alone(self) -> tuple[float, float]:
        """A request that nobody else is served beside."""
        async with channel(self._mesh.address) as way:
            return await self.answer(inference_pb2_grpc.InferenceServiceStub(way))

    async def full(self) -> float:
        """Tokens per second of as many requests at once as slots, and as many again."""
        async with channel(self._mesh.address) as way:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(way)

            async def twice() -> None:
                await self.answer(stub)
                await self.answer(stub)

            began = time.perf_counter()
            await asyncio.gather(*(twice() for _ in range(LOAD.slots)))
            return 2 * LOAD.slots * LOAD.tokens / (time.perf_counter() - began)

    async def until(self, done: asyncio.Event) -> int:
        """Keep a few requests under way until something is done; how many were answered, whole."""
        async with channel(self._mesh.address) as way:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(way)

            async def again() -> int:
                count = 0
                while not done.is_set():
                    await self.answer(stub)
                    count += 1
                return count

            return sum(await asyncio.gather(*(again() for _ in range(4))))
