"""A stage in a child process, as its agent has it."""

import asyncio
from pathlib import Path
from typing import Any

from uellm_worker.children import ChildSpawner, EngineChild

from tests.support.waiting import HANG_SECONDS
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import (
    AddSequence,
    CommitShard,
    EngineCommand,
    EngineEvent,
    PrepareShard,
    ShardPrepared,
    SimulatedDevice,
    StepReport,
)
from uellm.v1.topology_pb2 import ShardAssignment

LAYERS = 4
VOCAB = 32
PATIENCE = 240.0
"""Seconds for whatever waits for the first import of torch and transformers."""


class Stage:
    """A child and its events."""

    def __init__(self, child: EngineChild) -> None:
        self.child = child
        self.events = child.events()

    async def event(self) -> EngineEvent:
        async with asyncio.timeout(PATIENCE):
            return await anext(self.events)

    async def expect(self, kind: str) -> Any:
        """The next event that is neither progress nor a step, unless that is asked for."""
        while True:
            event = await self.event()
            got = event.WhichOneof("event")
            if got == kind:
                return getattr(event, kind)
            assert got in ("progress", "step"), event

    async def load(
        self, directory: Path | str, rooms: dict[str, int] | None = None, **fields: Any
    ) -> None:
        """Have a stage loaded, onto simulated devices if such are given with their memory."""
        assignment = ShardAssignment(
            **{"stage_count": 1, "slots": 4, "max_tokens": 128, "generation": 1} | fields
        )
        command = PrepareShard(
            assignment=assignment,
            model_dir=str(directory),
            threads=1,
            bind_host="127.0.0.1",
            simulated=[
                SimulatedDevice(device_id=name, memory_bytes=room)
                for name, room in (rooms or {}).items()
            ],
        )
        await self.child.send(EngineCommand(prepare=command))

    async def prepare(self, directory: Path | str, **fields: Any) -> ShardPrepared:
        await self.load(directory, **fields)
        prepared: ShardPrepared = await self.expect("prepared")
        return prepared

    async def commit(self, rendezvous: str = "", generation: int = 1) -> None:
        command = CommitShard(generation=generation, rendezvous=rendezvous, policy="fcfs")
        await self.child.send(EngineCommand(commit=command))

    async def serve(self, directory: Path | str = "", **fields: Any) -> None:
        await self.prepare(directory, **fields)
        await self.commit(generation=fields.get("generation", 1))
        await self.expect("serving")

    async def add(self, request_id: str, tokens: list[int], **sampling: Any) -> None:
        command = AddSequence(
            request_id=request_id,
            generation=1,
            token_ids=tokens,
            prompt_tokens=len(tokens),
            sampling=Sampling(**sampling),
        )
        await self.child.send(EngineCommand(add=command))

    async def answer(self, request_id: str) -> tuple[list[int], StepReport]:
        """All tokens of a request, and the report that ended it."""
        tokens: list[int] = []
        while True:
            step: StepReport = await self.expect("step")
            for output in step.outputs:
                if output.request_id == request_id:
                    tokens += output.token_ids
                    if output.finish:
                        return tokens, step

    async def end(self) -> int:
        """Wait until the process is gone; its exit code."""
        async with asyncio.timeout(HANG_SECONDS):
            return await asyncio.shield(self.child.exit_code)


async def spawn(spawner: ChildSpawner) -> Stage:
    async with asyncio.timeout(PATIENCE):
        return Stage(await spawner.spawn())
