"""Replicas of child processes, as a worker has them, each child on a core of its own."""

import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import sub
from pathlib import Path
from statistics import mean

import psutil
from uellm_worker.children import ChildSpawner, EngineChild

from uellm.models.profile import read_profile
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import AddSequence, CommitShard, EngineCommand, EngineEvent, PrepareShard
from uellm.v1.topology_pb2 import ShardAssignment

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica computed for some sequences.

    Attributes:
        tokens_per_second: of output, from the first sequence's arrival to the last one's end.
        step_seconds: from one result to the next while all decode, mean; of a load in which they
            hardly ever did, of all steps.
        stage_seconds: what each stage computes of such a step.
        tokens_per_cpu_second: of the stage that took most; others who use the machine change it
            least.
    """

    tokens_per_second: float
    step_seconds: float
    stage_seconds: tuple[float, ...]
    tokens_per_cpu_second: float


class Replica:
    """Children that serve one model together.

    Args:
        stages: their children, in order.
    """

    def __init__(self, stages: Sequence[EngineChild]) -> None:
        self._stages = stages
        self._events = [stage.events() for stage in stages]
        self._loads = 0

    async def serve(self, model: Path, split: Sequence[int], slots: int, max_tokens: int) -> None:
        """Load a model, and have the stages join."""
        rendezvous = ""
        count = len(split)
        for index, (first, end) in enumerate(pairwise(accumulate(split, initial=0))):
            assignment = ShardAssignment(
                stage_index=index,
                stage_count=count,
                first_layer=first,
                last_layer=end - 1,
                has_embed=index == 0,
                has_head=index == count - 1,
                slots=slots,
                max_tokens=max_tokens,
                generation=1,
            )
            prepare = PrepareShard(
                assignment=assignment, model_dir=str(model), threads=1, bind_host=HOST
            )
            await self._stages[index].send(EngineCommand(prepare=prepare))
            event = await self._expect(index, "prepared")
            rendezvous = rendezvous or event.prepared.rendezvous
        commit = CommitShard(generation=1, rendezvous=rendezvous, policy="fcfs")
        for stage in self._stages:
            await stage.send(EngineCommand(commit=commit))
        for index in range(count):
            await self._expect(index, "serving")

    async def load(self, sequences: int, prompt: int, tokens: int) -> Load:
        """Have so many sequences answered at once, all with as many tokens.

        Raises:
            SystemExit: if these are too few to time a step.
        """
        self._loads += 1
        cpu, started = self._cpu_seconds(), time.perf_counter()
        for index in range(sequences):
            add = AddSequence(
                request_id=f"{self._loads}-{index}",
                generation=1,
                token_ids=[
                    3 + (31 * index + 7 * place + self._loads) % 200 for place in range(prompt)
                ],
                prompt_tokens=prompt,
                sampling=Sampling(max_tokens=tokens, ignore_eos=True),
            )
            await self._stages[0].send(EngineCommand(add=add))
        left, begun = sequences, set[str]()
        steps: list[tuple[float, int, tuple[float, ...]]] = []
        steady: list[tuple[float, int, tuple[float, ...]]] = []
        while left:
            step = (await self._expect(0, "step")).step
            now = time.perf_counter()
            begun |= {output.request_id for output in step.outputs}
            finished = sum(output.finish != 0 for output in step.outputs)
            seconds = tuple(stage.compute_seconds for stage in step.report.stages)
            if seconds:  # The first steps say nothing of them yet.
                steps.append((now, step.report.step, seconds))
                if len(begun) == sequences and left == sequences and not finished:
                    steady.append(steps[-1])
            left -= finished
        rate = sequences * tokens / (time.perf_counter() - started)
        busiest = max(map(sub, self._cpu_seconds(), cpu))
        # The first of few tokens may have ended before the last was begun.
        counted = steady if len(steady) > 1 else steps
        if len(counted) < 2:
            raise SystemExit(f"{tokens} tokens are too few steps to time: ask for more")
        (began, first, _), (ended, last, _) = counted[0], counted[-1]
        # The reports are smoothed; their mean is more so.
        seconds = tuple(map(mean, zip(*(found for _, _, found in counted), strict=True)))
        return Load(rate, (ended - began) / (last - first), seconds, sequences * tokens / busiest)

    def _cpu_seconds(self) -> list[float]:
        times = [psutil.Process(stage.pid).cpu_times() for stage in self._stages]
        return [time.user + time.system for time in times]

    async def _expect(self, stage: int, kind: str) -> EngineEvent:
        """The next event of a kind; others than news of progress and steps are failures."""
        async for event in self._events[stage]:
            if event.WhichOneof("event") == kind:
                return event
            if event.WhichOneof("event") not in ("progress", "step"):
                raise SystemExit(f"stage {stage}: {event}")
        raise SystemExit(f"stage {stage} ended")


def _pin(pid: int, core: int) -> None:
    """Have all threads of a process, and those that they start, run on one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


@contextlib.asynccontextmanager
async def replica(
    spawner: ChildSpawner,
    model: Path,
    split: Sequence[int],
    *,
    cores: Sequence[int],
    slots: int,
    max_tokens: int,
) -> AsyncIterator[Replica]:
    """A replica of stages with so many layers each, every stage on one core."""
    stages = [await spawner.spawn() for _ in split]
    for stage, core in zip(stages, cores, strict=True):
        _pin(stage.pid, core)
    made = Replica(stages)
    await made.serve(model, split, slots, max_tokens)
    yield made
    for stage in stages:
        await stage.kill()


async def measured_split(
    spawner: ChildSpawner, model: Path, *, cores: Sequence[int], rows: int
) -> tuple[int, int]:
    """Layers of two stages that take about as long, by what halves take; the last has the head."""
    layers = len(read_profile(model, "float32").layers)
    halves = (layers // 2, layers - layers // 2)
    room = {"slots": 2 * rows, "max_tokens": 64}
    async with replica(spawner, model, halves, cores=cores, **room) as pipeline:
        await pipeline.load(2 * rows, 8, 32)
        first, last = (await pipeline.load(2 * rows, 8, 48)).stage_seconds
    layer = first / halves[0]
    head = max(last - layer * halves[1], 0.0)
    best = min(range(1, layers), key=lambda n: max(n * layer, (layers - n) * layer + head))
    return best, layers - best
