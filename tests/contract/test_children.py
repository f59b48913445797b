"""Child processes as an agent sees them: real forks, real sockets, real signals."""

import asyncio
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from uellm_worker.children import ChildSpawner, EngineChild
from uellm_worker.engine.randomness import instant_token

from tests.support.checkpoints import write_checkpoint
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.v1.common_pb2 import FINISH_REASON_FAILED, FINISH_REASON_LENGTH, ModelRef, Sampling
from uellm.v1.engine_pb2 import (
    AddSequence,
    CommitShard,
    DropSequence,
    EngineCommand,
    EngineEvent,
    LeaveGroup,
    PrepareShard,
    ShardFailed,
    ShardPrepared,
    SimulatedDevice,
    StepReport,
)
from uellm.v1.topology_pb2 import DeviceShard, ShardAssignment

pytestmark = pytest.mark.asyncio(loop_scope="module")

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


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def instant() -> AsyncIterator[ChildSpawner]:
    spawner = ChildSpawner("instant")
    await spawner.start()
    yield spawner
    await spawner.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shard() -> AsyncIterator[ChildSpawner]:
    spawner = ChildSpawner("shard")
    await spawner.start()
    yield spawner
    await spawner.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return write_checkpoint(directory / "tiny", layers=LAYERS, hidden=16, vocab=VOCAB)


async def spawn(spawner: ChildSpawner) -> Stage:
    async with asyncio.timeout(PATIENCE):
        return Stage(await spawner.spawn())


# ---- the instant engine ----------------------------------------------------------------------


async def test_an_instant_child_answers_by_seed_and_position(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    await stage.serve(generation=3)
    await stage.add("a", [1, 2, 3], max_tokens=20, seed=9)
    tokens, step = await stage.answer("a")
    assert tokens == [instant_token(9, position, 32000) for position in range(20)]
    assert step.outputs[0].finish == FINISH_REASON_LENGTH
    assert (step.report.epoch, step.report.step, step.report.slots) == (3, 20, 4)
    await stage.child.kill()
    assert await stage.end() == -signal.SIGKILL
    assert await anext(stage.events, None) is None


async def test_an_instant_child_knows_the_models_vocabulary(
    instant: ChildSpawner, checkpoint: Path
) -> None:
    stage = await spawn(instant)
    await stage.serve(checkpoint)
    await stage.add("bad", [VOCAB], max_tokens=1)
    _, step = await stage.answer("bad")
    assert step.outputs[0].finish == FINISH_REASON_FAILED
    await stage.add("a", [1], max_tokens=9)
    assert (await stage.answer("a"))[0] == [instant_token(0, i, VOCAB) for i in range(9)]
    await stage.child.kill()


async def test_instant_children_have_no_torch(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    await stage.serve()
    mapped = [file.path for file in psutil.Process(stage.child.pid).memory_maps()]
    assert mapped
    assert not [path for path in mapped if "torch" in path]
    await stage.child.kill()


async def test_dropping_a_sequence_frees_its_slot(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    await stage.serve(slots=1, max_tokens=4_000_000)
    await stage.add("endless", [1])
    await stage.add("b", [1], max_tokens=2)
    report = (await stage.expect("step")).report
    while report.running < 2:
        report = (await stage.expect("step")).report
    assert report.waiting == 1
    await stage.child.send(EngineCommand(drop=DropSequence(request_id="endless", generation=1)))
    tokens, step = await stage.answer("b")
    assert len(tokens) == 2
    assert step.report.running == 0
    await stage.child.kill()


async def test_leaving_ends_the_sequences_but_not_the_child(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    await stage.serve(max_tokens=4_000_000)
    await stage.add("endless", [1])
    await stage.expect("step")
    await stage.child.send(EngineCommand(leave=LeaveGroup()))
    await stage.expect("left")
    await stage.add("lost", [1])  # Crossed the end: not an error.
    await stage.serve(generation=2)
    await stage.add("a", [1], max_tokens=1)
    assert len((await stage.answer("a"))[0]) == 1
    await stage.child.kill()


async def test_a_commit_for_another_generation_is_refused(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    await stage.prepare("", generation=4)
    await stage.commit(generation=3)
    failed: ShardFailed = await stage.expect("failed")
    assert failed.reason == "INTERNAL"
    assert "generation 4" in failed.message
    await stage.serve(generation=5)
    await stage.child.kill()


async def test_instant_stages_miss_each_other(instant: ChildSpawner) -> None:
    """The control plane's double loses peers like the real engine."""
    stages = [await spawn(instant) for _ in range(3)]
    for generation in (1, 2):
        rendezvous = ""
        for index, stage in enumerate(stages):
            prepared = await stage.prepare(
                "", stage_index=index, stage_count=3, generation=generation
            )
            rendezvous = rendezvous or prepared.rendezvous
        for stage in stages:
            await stage.commit(rendezvous, generation)
        for stage in stages:
            await stage.expect("serving")
        await stages[0].add("a", [1], max_tokens=3)
        assert len((await stages[0].answer("a"))[0]) == 3
        await stages[1].child.kill()
        for stage in (stages[0], stages[2]):
            failed: ShardFailed = await stage.expect("failed")
            assert failed.reason == "PEER_LOST"
        stages[1] = await spawn(instant)
    for stage in stages:
        await stage.child.kill()


# ---- processes --------------------------------------------------------------------------------


async def test_a_child_ends_when_its_socket_closes_even_while_computing(
    instant: ChildSpawner,
) -> None:
    stage = await spawn(instant)
    await stage.serve(max_tokens=4_000_000)
    await stage.add("endless", [1])
    await stage.expect("step")
    stage.child.close()
    assert await stage.end() == 0
    with pytest.raises(ConnectionError):
        await stage.child.send(EngineCommand(leave=LeaveGroup()))


async def test_terminal_signals_do_not_end_a_child(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    os.kill(stage.child.pid, signal.SIGINT)
    os.kill(stage.child.pid, signal.SIGTERM)
    await stage.serve()
    await stage.child.kill()


async def test_a_stopped_child_can_be_killed(instant: ChildSpawner) -> None:
    stage = await spawn(instant)
    os.kill(stage.child.pid, signal.SIGSTOP)
    await stage.child.kill()
    assert await stage.end() == -signal.SIGKILL


async def test_a_fork_server_that_dies_takes_its_children_and_is_replaced() -> None:
    spawner = ChildSpawner("instant")
    await spawner.start()
    stage = await spawn(spawner)
    assert spawner._process is not None
    os.kill(spawner._process.pid, signal.SIGKILL)
    assert await stage.end() == -signal.SIGKILL
    await eventually(lambda: not _alive(stage.child.pid))
    again = await spawn(spawner)
    await again.serve()
    await spawner.close()
    assert await again.end() == -signal.SIGKILL


async def test_closing_kills_children_that_compute() -> None:
    spawner = ChildSpawner("instant")
    stages = [await spawn(spawner) for _ in range(3)]  # Starts the fork server by itself.
    await stages[0].serve(max_tokens=4_000_000)
    await stages[0].add("endless", [1])
    await spawner.close()
    assert [await stage.end() for stage in stages] == [-signal.SIGKILL] * 3


AGENT = """
import asyncio
from uellm_worker.children import ChildSpawner

async def main():
    spawner = ChildSpawner("instant")
    children = [await spawner.spawn() for _ in range(2)]
    print(spawner._process.pid, *(child.pid for child in children), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_an_agent_that_is_killed_leaves_nobody_behind() -> None:
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, stdout=subprocess.PIPE
    )
    assert agent.stdout is not None
    pids = [int(word) for word in (await agent.stdout.readline()).split()]
    assert len(pids) == 3
    agent.kill()
    await agent.wait()
    await eventually(lambda: not any(_alive(pid) for pid in pids))


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- the shard engine -------------------------------------------------------------------------

PROMPT = [3, 7, 11, 5, 2]
ANSWER = 90
ROOM = 400
"""Tokens of KV cache under load: half of what eight sequences come to."""


async def alone(spawner: ChildSpawner, checkpoint: Path, count: int) -> list[int]:
    """The answer of a replica of one stage."""
    stage = await spawn(spawner)
    await stage.serve(checkpoint, last_layer=LAYERS - 1, has_embed=True, has_head=True)
    await stage.add("a", PROMPT, max_tokens=count, ignore_eos=True)
    tokens, _ = await stage.answer("a")
    await stage.child.kill()
    return tokens


async def form(stages: list[Stage], checkpoint: Path, generation: int) -> list[ShardPrepared]:
    """Prepare and commit two stages of one and three layers."""
    prepared = []
    for index, (first, last) in enumerate([(0, 0), (1, 3)]):
        prepared.append(
            await stages[index].prepare(
                checkpoint,
                generation=generation,
                stage_index=index,
                stage_count=2,
                first_layer=first,
                last_layer=last,
                has_embed=index == 0,
                has_head=index == 1,
                model=ModelRef(digest="d"),
            )
        )
    for stage in stages:
        await stage.commit(prepared[0].rendezvous, generation)
    for stage in stages:
        await stage.expect("serving")
    return prepared


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_pipeline_loses_a_stage_and_regroups(
    end: signal.Signals, shard: ChildSpawner, checkpoint: Path
) -> None:
    whole = await alone(shard, checkpoint, 100)
    stages = [await spawn(shard), await spawn(shard)]
    await form(stages, checkpoint, 1)
    await stages[0].add("a", PROMPT, max_tokens=100, ignore_eos=True)
    logged: list[int] = []
    while len(logged) < 5:
        for output in (await stages[0].expect("step")).outputs:
            logged += output.token_ids
    os.kill(stages[1].child.pid, end)
    event = await stages[0].event()
    while event.WhichOneof("event") == "step":
        for output in event.step.outputs:
            logged += output.token_ids
        event = await stages[0].event()
    assert event.failed.reason == "PEER_LOST"
    assert list(event.failed.suspects) == ["a"]
    await stages[1].child.kill()

    stages[1] = await spawn(shard)
    await stages[0].child.send(EngineCommand(leave=LeaveGroup()))
    await stages[0].expect("left")
    first, second = await form(stages, checkpoint, 2)
    assert first.kept_bytes == first.total_bytes > 0
    assert second.kept_bytes == 0
    await stages[0].child.send(
        EngineCommand(
            add=AddSequence(
                request_id="a",
                generation=2,
                token_ids=PROMPT + logged,
                prompt_tokens=len(PROMPT),
                sampling=Sampling(max_tokens=100, ignore_eos=True),
            )
        )
    )
    tokens, step = await stages[0].answer("a")
    assert logged + tokens == whole
    assert len(step.report.stages) == 2
    assert all(stage.compute_seconds > 0 for stage in step.report.stages)
    for stage in stages:
        await stage.child.kill()


async def test_a_leader_leaves_at_once_while_a_step_hangs(
    shard: ChildSpawner, checkpoint: Path
) -> None:
    stages = [await spawn(shard), await spawn(shard)]
    await form(stages, checkpoint, 1)
    await stages[0].add("a", PROMPT, max_tokens=100, ignore_eos=True)
    await stages[0].expect("step")
    os.kill(stages[1].child.pid, signal.SIGSTOP)
    await stages[0].child.send(EngineCommand(leave=LeaveGroup()))
    # Before it misses the other: else it would have failed first.
    await stages[0].expect("left")
    for stage in stages:
        await stage.child.kill()


async def test_large_activations_travel_over_the_process_group(
    shard: ChildSpawner, tmp_path: Path
) -> None:
    """512 rows of 256 numbers are more than goes with an announcement."""
    checkpoint = write_checkpoint(
        tmp_path / "wide", layers=LAYERS, hidden=256, vocab=VOCAB, max_position_embeddings=1024
    )
    prompt = [(7 * i) % VOCAB for i in range(600)]
    fields = {"max_tokens": 700, "slots": 1}
    answers = []
    stages = [await spawn(shard), await spawn(shard), await spawn(shard)]
    for split in ([(0, 3)], [(0, 0), (1, 1), (2, 3)]):
        rendezvous = ""
        for index, (first, last) in enumerate(split):
            prepared = await stages[index].prepare(
                checkpoint,
                stage_index=index,
                stage_count=len(split),
                first_layer=first,
                last_layer=last,
                has_embed=index == 0,
                has_head=index == len(split) - 1,
                **fields,
            )
            rendezvous = rendezvous or prepared.rendezvous
        for stage in stages[: len(split)]:
            await stage.commit(rendezvous)
        for stage in stages[: len(split)]:
            await stage.expect("serving")
        await stages[0].add("a", prompt, max_tokens=8, ignore_eos=True)
        answers.append((await stages[0].answer("a"))[0])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8
    for stage in stages:
        await stage.child.kill()


async def _answers_but_for_a_quarter(
    stage: Stage, requests: list[str]
) -> tuple[dict[str, list[int]], set[str], int]:
    """Tokens by request; those that were dropped at their fifth; how many tokens were prefilled."""
    answers: dict[str, list[int]] = {request_id: [] for request_id in requests}
    left, dropped, computed = {*requests}, set[str](), 0
    while left:
        step: StepReport = await stage.expect("step")
        computed += step.report.prefill_tokens
        for output in step.outputs:
            assert not output.HasField("failure"), output
            answers[output.request_id] += output.token_ids
            if output.finish:
                left.discard(output.request_id)
            elif int(output.request_id) % 4 == 0 and len(answers[output.request_id]) == 5:
                drop = DropSequence(request_id=output.request_id, generation=1)
                await stage.child.send(EngineCommand(drop=drop))
                dropped.add(output.request_id)
                left.discard(output.request_id)
    return answers, dropped, computed


@pytest.mark.slow
@pytest.mark.parametrize("split", [(1, 3), (2, 1, 1)])
async def test_a_pipeline_under_load_is_exact(
    shard: ChildSpawner, tmp_path: Path, split: tuple[int, ...]
) -> None:
    """More sequences than slots, more tokens than KV room, and some that leave halfway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        import torch  # noqa: PLC0415
        from uellm_worker.verification.reference import Reference  # noqa: PLC0415
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    stages = [await spawn(shard) for _ in split]
    rendezvous = ""
    for index, (first, end) in enumerate(pairwise(accumulate(split, initial=0))):
        cached = ROOM * (end - first) * 2 * 64 * 4
        prepared = await stages[index].prepare(
            tmp_path,
            stage_index=index,
            stage_count=len(split),
            has_embed=index == 0,
            has_head=index == len(split) - 1,
            slots=8,
            max_tokens=200,
            shards=[
                DeviceShard(device_id="cpu", first_layer=first, last_layer=end - 1, kv_bytes=cached)
            ],
        )
        rendezvous = rendezvous or prepared.rendezvous
    for stage in stages:
        await stage.commit(rendezvous)
    for stage in stages:
        await stage.expect("serving")

    prompts = {
        str(n): [3 + (7 * n + 5 * place) % (VOCAB - 3) for place in range(6 + 4 * n % 45)]
        for n in range(24)
    }
    for request_id, prompt in prompts.items():
        await stages[0].add(request_id, prompt, max_tokens=ANSWER)
    answers, dropped, computed = await _answers_but_for_a_quarter(stages[0], [*prompts])
    for stage in stages:
        await stage.child.kill()

    assert computed > sum(map(len, prompts.values())) + ANSWER, "nobody lost a slot"
    assert len(dropped) == len(prompts) // 4
    reference = Reference(model)
    for request_id, prompt in prompts.items():
        answer = answers[request_id]
        count = len(answer) if request_id in dropped else ANSWER
        assert reference.compare(prompt, answer, count).difference is None, request_id


async def test_a_checkpoint_that_cannot_be_served_is_named_and_another_is_loaded(
    shard: ChildSpawner, checkpoint: Path, tmp_path: Path
) -> None:
    stage = await spawn(shard)
    assignment = ShardAssignment(stage_count=1, has_embed=True, has_head=True)
    command = PrepareShard(assignment=assignment, model_dir=str(tmp_path))
    await stage.child.send(EngineCommand(prepare=command))
    failed: ShardFailed = await stage.expect("failed")
    assert failed.reason == "LOAD_FAILED"
    assert str(tmp_path / "config.json") in failed.message
    await stage.serve(checkpoint, last_layer=LAYERS - 1, has_embed=True, has_head=True)
    await stage.child.kill()


async def test_a_stage_on_several_devices_takes_its_place_among_others(
    shard: ChildSpawner, checkpoint: Path
) -> None:
    whole = await alone(shard, checkpoint, 20)
    stages = [await spawn(shard), await spawn(shard)]
    first = await stages[0].prepare(
        checkpoint,
        stage_count=2,
        last_layer=2,
        has_embed=True,
        rooms={"w/sim:0": 1 << 30, "w/sim:1": 1 << 30},
        shards=[
            DeviceShard(device_id="w/sim:0", first_layer=0, last_layer=1),
            DeviceShard(device_id="w/sim:1", first_layer=2, last_layer=2),
        ],
    )
    last = {"first_layer": 3, "last_layer": 3, "has_head": True}
    await stages[1].prepare(checkpoint, stage_count=2, stage_index=1, **last)
    assert [use.device_id for use in first.devices] == ["w/sim:0", "w/sim:1"]
    assert sum(use.held_bytes for use in first.devices) > first.total_bytes > 0
    for stage in stages:
        await stage.commit(first.rendezvous)
    for stage in stages:
        await stage.expect("serving")
    await stages[0].add("a", PROMPT, max_tokens=20, ignore_eos=True)
    tokens, step = await stages[0].answer("a")
    assert tokens == whole
    assert len(step.report.stages) == 3
    assert all(stage.compute_seconds > 0 for stage in step.report.stages)
    for stage in stages:
        await stage.child.kill()


async def test_a_simulated_device_without_room_refuses_as_a_real_one_does(
    shard: ChildSpawner, checkpoint: Path
) -> None:
    stage = await spawn(shard)
    fields = {"last_layer": LAYERS - 1, "has_embed": True, "has_head": True}
    await stage.load(checkpoint, {"w/sim:0": 1000}, device_ids=["w/sim:0"], **fields)
    failed: ShardFailed = await stage.expect("failed")
    assert failed.reason == "OUT_OF_MEMORY"
    assert "w/sim:0" in failed.message
    await stage.load(checkpoint, device_ids=["w/sim:0"], **fields)
    failed = await stage.expect("failed")
    assert failed.reason == "LOAD_FAILED"
    assert "w/sim:0 is not there" in failed.message
    await stage.prepare(checkpoint, rooms={"w/sim:0": 1 << 30}, device_ids=["w/sim:0"], **fields)
    await stage.child.kill()


async def test_a_child_of_a_warm_fork_server_starts_at_once(shard: ChildSpawner) -> None:
    await (await spawn(shard)).child.kill()
    stage = await spawn(shard)
    # Seconds of a processor, whatever else runs on it: an import of torch takes more.
    assert sum(psutil.Process(stage.child.pid).cpu_times()[:2]) < 1.0
    await stage.child.kill()


async def test_the_children_module_needs_no_model_library() -> None:
    code = (
        "import sys, uellm_worker.children\n"
        "assert not {'torch', 'transformers', 'grpc'} & set(sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
