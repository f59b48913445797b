"""Child processes that compute: pipelines that lose stages or hang, and answer exactly."""

import os
import signal
import warnings
from collections.abc import AsyncIterator
from itertools import accumulate, pairwise
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from uellm_worker.children import ChildSpawner

from tests.support.checkpoints import write_checkpoint
from tests.support.child_stage import LAYERS, VOCAB, Stage, spawn
from uellm.v1.common_pb2 import ModelRef, Sampling
from uellm.v1.engine_pb2 import (
    AddSequence,
    DropSequence,
    EngineCommand,
    LeaveGroup,
    PrepareShard,
    ShardFailed,
    ShardPrepared,
    StepReport,
)
from uellm.v1.topology_pb2 import DeviceShard, ShardAssignment

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
