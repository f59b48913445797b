"""Child processes as an agent sees them: real forks, real sockets, real signals. No models."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from uellm_worker.children import ChildSpawner
from uellm_worker.engine.randomness import instant_token

from tests.support.checkpoints import write_checkpoint
from tests.support.child_stage import LAYERS, VOCAB, spawn
from tests.support.waiting import eventually
from uellm.v1.common_pb2 import FINISH_REASON_FAILED, FINISH_REASON_LENGTH
from uellm.v1.engine_pb2 import (
    DropSequence,
    EngineCommand,
    LeaveGroup,
    ShardFailed,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def instant() -> AsyncIterator[ChildSpawner]:
    spawner = ChildSpawner("instant")
    await spawner.start()
    yield spawner
    await spawner.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return write_checkpoint(directory / "tiny", layers=LAYERS, hidden=16, vocab=VOCAB)


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


async def test_the_children_module_needs_no_model_library() -> None:
    code = (
        "import sys, uellm_worker.children\n"
        "assert not {'torch', 'transformers', 'grpc'} & set(sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
