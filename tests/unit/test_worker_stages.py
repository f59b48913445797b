"""The stages that a worker holds: states, fences, children used again; with scripted children."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from uellm_worker import stage_child, stages
from uellm_worker.devices import Devices
from uellm_worker.files.supply import Directories
from uellm_worker.stages import Stages

from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core.errors import AbortedError, FailedPreconditionError, ModelFilesError
from uellm.v1 import deployer_pb2, engine_pb2, topology_pb2, worker_pb2

PREPARED = deployer_pb2.STAGE_STATE_PREPARED
SERVING = deployer_pb2.STAGE_STATE_SERVING
FAILED = deployer_pb2.STAGE_STATE_FAILED


class ScriptedChild:
    """Answers every command at once, unless told otherwise."""

    def __init__(self, pid: int, mute: set[str], failing: set[str]) -> None:
        self.pid = pid
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.commands: list[str] = []
        self.simulated: list[engine_pb2.SimulatedDevice] = []
        self._mute = mute
        self._failing = failing
        self._events: asyncio.Queue[engine_pb2.EngineEvent | None] = asyncio.Queue()

    async def send(self, command: engine_pb2.EngineCommand) -> None:
        kind = command.WhichOneof("command") or ""
        self.commands.append(kind)
        if self.exit_code.done():
            raise ConnectionResetError("gone")
        if kind in self._mute:
            return
        if kind in self._failing:
            self.say(failed=engine_pb2.ShardFailed(reason="LOAD_FAILED", message="no weights"))
        elif kind == "prepare":
            self.say(progress=engine_pb2.LoadProgress(loaded_bytes=5, total_bytes=10))
            kept = 10 if "leave" in self.commands else 0
            prepared = engine_pb2.ShardPrepared(total_bytes=10, kept_bytes=kept)
            self.simulated = list(command.prepare.simulated)
            for device in self.simulated:
                prepared.devices.add(device_id=device.device_id, held_bytes=10)
            self.say(prepared=prepared)
        elif kind == "commit":
            serving = engine_pb2.ShardServing(generation=command.commit.generation)
            self.say(serving=serving)
        elif kind == "leave":
            self.say(left=engine_pb2.ShardLeft())

    def say(self, **event: Any) -> None:
        self._events.put_nowait(engine_pb2.EngineEvent(**event))

    def die(self, code: int) -> None:
        if not self.exit_code.done():
            self.exit_code.set_result(code)
            self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[engine_pb2.EngineEvent]:
        while (event := await self._events.get()) is not None:
            yield event

    async def kill(self) -> None:
        self.die(-9)


class FaultyLeader:
    """Leads a replica until it is told to fail."""

    owed_steps = False

    def __init__(self) -> None:
        self.fault = asyncio.Event()
        self.last_words = False
        self._closed = False

    def start(self, spawn: Any) -> None:
        spawn(self._read(), "intake")

    async def _read(self) -> None:
        await self.fault.wait()
        if not self._closed:
            raise ArithmeticError("of the intake")

    async def report(self, step: Any) -> None:
        raise ArithmeticError("of the delivery")

    async def fail(self) -> None:
        self.last_words = True
        await self.close()

    async def close(self) -> None:
        self._closed = True
        self.fault.set()


@dataclass
class Bench:
    """Stages with scripted children."""

    stages: Stages = field(init=False)
    children: list[ScriptedChild] = field(default_factory=list)
    mute: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    missing: str = ""
    fetching: asyncio.Event | None = None
    at_hand_now: int = 0
    leader: "FaultyLeader | None" = None

    def __post_init__(self) -> None:
        self.stages = Stages(
            self,  # type: ignore[arg-type]
            self.run,
            self.at_hand,
            self.lead,  # type: ignore[arg-type]
            threads=1,
            data_host="127.0.0.1",
            simulate=Devices("w", "sim:0-1:memory=25", 0).simulated,
        )

    async def spawn(self) -> ScriptedChild:
        self.children.append(ScriptedChild(len(self.children) + 1, self.mute, self.failing))
        return self.children[-1]

    def run(
        self, work: Any, name: str, failed: Callable[[Exception], None] | None = None
    ) -> asyncio.Task[None]:
        async def aside() -> None:
            try:
                await work
            except ArithmeticError as error:
                if failed is not None:
                    failed(error)

        self.tasks.append(asyncio.create_task(aside(), name=name))
        return self.tasks[-1]

    @asynccontextmanager
    async def at_hand(
        self, assignment: Any, holders: Any, tell: Callable[[int, int], None]
    ) -> AsyncIterator[Directories]:
        self.at_hand_now += 1
        try:
            if self.fetching is not None:
                tell(3, 7)
                await self.fetching.wait()
            if self.missing:
                raise ModelFilesError(self.missing)
            yield Directories(Path("/model"))
        finally:
            self.at_hand_now -= 1

    def lead(self, *_: Any) -> "FaultyLeader":
        self.leader = FaultyLeader()
        return self.leader

    async def prepare(self, generation: int) -> list[worker_pb2.PrepareResponse]:
        return [r async for r in self.stages.prepare(assignment(generation))]

    async def serve(self, generation: int) -> None:
        await self.prepare(generation)
        await self.stages.commit("r", generation, "")

    @property
    def state(self) -> tuple[int, int] | None:
        held = self.stages.held
        return (held[0].generation, held[0].state) if held else None


def assignment(generation: int, last_layer: int = 3) -> topology_pb2.ShardAssignment:
    """A second stage: no leader, no tokenizer."""
    return topology_pb2.ShardAssignment(
        deployment="m",
        replica="r",
        generation=generation,
        stage_index=1,
        stage_count=2,
        last_layer=last_layer,
    )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.stages.close()
    await asyncio.gather(*bench.tasks)
    assert all(child.exit_code.done() for child in bench.children)


async def test_replicas_share_what_a_simulated_device_has(bench: Bench) -> None:
    async def left(replica: str, generation: int, *devices: str) -> list[int]:
        wanted = assignment(generation)
        wanted.replica = replica
        wanted.device_ids.extend(devices)
        async for _ in bench.stages.prepare(wanted):
            pass
        return [device.memory_bytes for device in bench.children[-1].simulated]

    assert await left("r", 1, "w/sim:0") == [25]
    assert await left("s", 1, "w/sim:0", "w/sim:1") == [15, 25]
    assert bench.stages.held_bytes() == {"w/sim:0": 20, "w/sim:1": 10}
    status = bench.stages.held[1].status(lambda _: 0)
    assert [use.device_id for use in status.devices] == ["w/sim:0", "w/sim:1"]
    # A newer generation takes the place of the older one's.
    assert await left("s", 2, "w/sim:0") == [15]
    await bench.stages.release("r", 1, 0.0)
    assert bench.stages.held_bytes() == {"w/sim:0": 10}


async def test_prepare_tells_progress_then_commit_serves(bench: Bench) -> None:
    answers = await bench.prepare(1)
    assert answers[-1].prepared
    assert answers[-1].total_bytes == 10
    assert not any(answer.prepared for answer in answers[:-1])
    assert bench.state == (1, PREPARED)
    await bench.stages.commit("r", 1, "")
    assert bench.state == (1, SERVING)
    await bench.stages.commit("r", 1, "")  # again, after a lost reply
    assert bench.children[0].commands == ["prepare", "commit"]


async def test_prepared_again_answers_again(bench: Bench) -> None:
    first = await bench.prepare(1)
    assert (await bench.prepare(1))[-1] == first[-1]
    assert bench.children[0].commands == ["prepare"]


async def test_older_generations_are_refused_naming_both(bench: Bench) -> None:
    await bench.serve(5)
    calls = (
        bench.prepare(4),
        bench.stages.commit("r", 4, ""),
        bench.stages.release("r", 4, 0.0),
    )
    for call in calls:
        with pytest.raises(AbortedError, match=r"4.*5"):
            await call
    assert bench.state == (5, SERVING)
    with pytest.raises(AbortedError, match=r"5.*5"):
        await bench.prepare(5)


async def test_the_fence_outlives_the_stage(bench: Bench) -> None:
    await bench.serve(5)
    await bench.stages.release("r", 6, 0.0)
    assert bench.state is None
    with pytest.raises(AbortedError, match=r"5.*6"):
        await bench.prepare(5)
    await bench.stages.release("unknown", 1, 0.0)


async def test_a_newer_generation_keeps_the_child(bench: Bench) -> None:
    await bench.serve(1)
    answers = await bench.prepare(2)
    assert answers[-1].kept_bytes == 10
    assert len(bench.children) == 1
    assert bench.children[0].commands == ["prepare", "commit", "leave", "prepare"]


async def test_a_failed_group_keeps_the_child(bench: Bench) -> None:
    await bench.serve(1)
    bench.stages.changed.clear()
    bench.children[0].say(failed=engine_pb2.ShardFailed(reason="PEER_LOST", message="stage 0"))
    await asyncio.wait_for(bench.stages.changed.wait(), HANG_SECONDS)
    assert bench.state == (1, FAILED)
    assert bench.stages.held[0].reason == "PEER_LOST: stage 0"
    await bench.serve(2)
    assert bench.state == (2, SERVING)
    assert len(bench.children) == 1


async def test_a_child_that_does_not_leave_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_child, "LEAVE_SECONDS", 0.05)
    await bench.serve(1)
    bench.mute.add("leave")
    await bench.serve(2)
    assert bench.state == (2, SERVING)
    assert bench.children[0].exit_code.done()
    assert bench.children[1].commands == ["prepare", "commit"]


async def test_a_child_that_dies_fails_its_stage_and_is_replaced(bench: Bench) -> None:
    await bench.serve(1)
    bench.children[0].die(-9)
    await eventually(lambda: bench.state == (1, FAILED))
    assert "SIGKILL" in bench.stages.held[0].reason
    await bench.serve(2)
    assert len(bench.children) == 2


async def test_what_cannot_be_loaded_leaves_nothing(bench: Bench) -> None:
    bench.failing.add("prepare")
    with pytest.raises(FailedPreconditionError, match="no weights"):
        await bench.prepare(1)
    assert bench.state is None
    assert bench.children[0].exit_code.done()
    bench.failing.clear()
    await bench.serve(1)


async def test_a_child_that_dies_while_loading_is_said_so(bench: Bench) -> None:
    bench.mute.add("prepare")
    preparing = asyncio.create_task(bench.prepare(1))
    await eventually(lambda: bench.children and bench.children[0].commands)
    bench.children[0].die(3)
    with pytest.raises(FailedPreconditionError, match="exit code 3"):
        await preparing
    assert bench.state is None


async def test_files_that_are_not_there_leave_nothing(bench: Bench) -> None:
    await bench.serve(1)
    bench.missing = "/model has no config.json"
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        await bench.prepare(2)
    assert bench.state is None
    assert bench.children[0].exit_code.done()


async def test_fetching_is_told_and_files_stay_at_hand_until_they_are_loaded(bench: Bench) -> None:
    bench.fetching = asyncio.Event()
    bench.mute.add("prepare")
    answers: list[worker_pb2.PrepareResponse] = []

    async def prepare() -> None:
        async for answer in bench.stages.prepare(assignment(1)):
            answers.append(answer)

    preparing = asyncio.create_task(prepare())
    await eventually(lambda: answers)
    assert (answers[0].fetched_bytes, answers[0].fetch_bytes) == (3, 7)
    assert not bench.children
    bench.fetching.set()
    await eventually(lambda: bench.children and bench.children[0].commands)
    assert bench.at_hand_now == 1
    bench.children[0].say(prepared=engine_pb2.ShardPrepared(total_bytes=10))
    await preparing
    assert bench.at_hand_now == 0
    assert (answers[-1].prepared, answers[-1].fetch_bytes, answers[-1].total_bytes) == (True, 7, 10)


async def test_a_newer_generation_ends_fetching_for_the_older(bench: Bench) -> None:
    bench.fetching = asyncio.Event()
    preparing = asyncio.create_task(bench.prepare(1))
    await eventually(lambda: bench.at_hand_now)
    bench.fetching = None
    await bench.serve(2)
    with pytest.raises(AbortedError, match=r"1.*2"):
        await preparing
    assert (bench.state, bench.at_hand_now) == ((2, SERVING), 0)


async def test_a_caller_that_goes_away_while_loading_leaves_nothing(bench: Bench) -> None:
    bench.mute.add("prepare")
    preparing = asyncio.create_task(bench.prepare(1))
    await eventually(lambda: bench.children and bench.children[0].commands)
    preparing.cancel()
    await asyncio.gather(preparing, return_exceptions=True)
    assert bench.state is None
    assert bench.children[0].exit_code.done()


async def test_a_newer_generation_ends_loading_of_the_older(bench: Bench) -> None:
    bench.mute.add("prepare")
    preparing = asyncio.create_task(bench.prepare(1))
    await eventually(lambda: bench.children and bench.children[0].commands)
    bench.mute.clear()
    await bench.serve(2)
    with pytest.raises(AbortedError, match=r"1.*2"):
        await preparing
    assert bench.state == (2, SERVING)
    assert bench.children[0].exit_code.done()


async def test_commit_wants_what_was_prepared(bench: Bench) -> None:
    with pytest.raises(FailedPreconditionError, match="not prepared"):
        await bench.stages.commit("r", 1, "")
    await bench.prepare(1)
    with pytest.raises(FailedPreconditionError, match="not prepared"):
        await bench.stages.commit("r", 2, "")
    bench.failing.add("commit")
    with pytest.raises(FailedPreconditionError, match="no weights"):
        await bench.stages.commit("r", 1, "")
    assert bench.state == (1, FAILED)


async def test_release_ends_the_child(bench: Bench) -> None:
    await bench.serve(1)
    await bench.stages.release("r", 1, 0.0)
    assert bench.state is None
    assert bench.children[0].exit_code.done()


def first_of(replica: str, generation: int = 1) -> topology_pb2.ShardAssignment:
    """A replica's only stage, which leads it."""
    wanted = assignment(generation)
    wanted.replica, wanted.stage_index, wanted.stage_count = replica, 0, 1
    return wanted


@pytest.mark.parametrize("where", ["intake", "delivery"])
async def test_a_fault_in_leading_one_replica_fails_that_one_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(stages, "Tokenizer", lambda directory: object())
    leaders = []
    for replica in ("r", "s"):
        async for _ in bench.stages.prepare(first_of(replica)):
            pass
        await bench.stages.commit(replica, 1, "")
        leaders.append(bench.leader)
    leader = leaders[0]
    assert leader is not None
    if where == "intake":
        leader.fault.set()
    else:
        bench.children[0].say(step=engine_pb2.StepReport())
    broken, well = bench.stages.held
    await eventually(lambda: broken.state == FAILED)
    assert broken.reason.startswith("LEADER_FAILED: a fault of uellm, ArithmeticError")
    await eventually(lambda: leader.last_words and bench.children[0].exit_code.done())
    assert well.state == SERVING
    async for _ in bench.stages.prepare(first_of("r", 2)):
        pass
    await bench.stages.commit("r", 2, "")
    assert bench.stages.held[0].state == SERVING
