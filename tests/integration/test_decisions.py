"""What a scheduler decides is recorded beside it, kept for a while, exported and replayed."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from uellm_scheduler import recorder
from uellm_scheduler.settings import SchedulerSettings

from tests.support.scheduling import MODEL, Mesh, scheduler
from tests.support.waiting import eventually
from uellm.cli import exits, replaying
from uellm.cli.app import app
from uellm.core.errors import InvalidArgumentError, NotFoundError
from uellm.decisions.records import DispatchRecord, Record
from uellm.decisions.segments import SegmentWriter, read_segment
from uellm.policy.choice import PolicyChoice
from uellm.policy.views import DispatchDecision, QueueView
from uellm.streams import decisions as streams_decisions
from uellm.streams.connection import connect
from uellm.streams.decisions import DecisionLog, DecisionWriter
from uellm.v1.decisions_pb2 import DecisionSegment


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis)


async def recorded(redis: Any) -> list[Record]:
    return [
        record
        async for segment in DecisionLog(redis, MODEL).all()
        for record in read_segment(segment).records
    ]


async def of_dispatch(redis: Any, request_id: str) -> DispatchRecord | None:
    """The decision that sent a request."""
    for record in await recorded(redis):
        if isinstance(record, DispatchRecord) and any(
            request_id in batch.request_ids for batch in record.decision.dispatches
        ):
            return record
    return None


async def test_decisions_are_recorded_exported_and_replayed(
    mesh: Mesh, redis: Any, redis_url: str, tmp_path: Path
) -> None:
    await mesh.deploy("r0", "r1", slots=1)
    async with scheduler(redis_url, lookahead_requests=0):
        ids = [await mesh.accept(deadline=deadline) for deadline in (900, 100, 500)]
        late = await mesh.accept(deadline=0.001, refusable=True)
        sent = [*await mesh.received("r0", 1), *await mesh.received("r1", 1)]
        record = await eventually(lambda: of_dispatch(redis, sent[0].request_id))
        await eventually(lambda: refused(redis, late))
    assert record is not None
    assert record.policy.name == "edf"
    assert record.policy.settings.lookahead_requests == 0
    assert {view.replica for view in record.replicas} == {"r0", "r1"}
    seen = {view.request_id for each in await recorded(redis) for view in waiting(each)}
    assert seen == {*ids, late}

    file = tmp_path / "decisions.jsonl"
    assert await replaying.export(redis_url, MODEL, file, None) == exits.OK
    result = CliRunner().invoke(app, ["replay", str(file), "--json"])
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["different"], answer["truncated"]) == (exits.OK, 0, 0)
    assert answer["dispatch_decisions"] == len(await recorded(redis))

    # Nothing to write is no reason to empty the file.
    with pytest.raises(NotFoundError, match="no recorded decisions of 'other'"):
        await replaying.export(redis_url, "other", file, None)

    result = CliRunner().invoke(app, ["replay", str(file), "--policy", "fcfs"])
    assert result.exit_code == exits.OK
    assert "came out otherwise" in result.stdout

    # One that was not decided like this.
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    decision = next(d for line in lines for d in line["dispatches"] if "decision" in d)
    decision["decision"]["reconsider_at"] = 1.0
    file.write_text("\n".join(map(json.dumps, lines)))
    result = CliRunner().invoke(app, ["replay", str(file)])
    assert result.exit_code == exits.FAILED
    assert "reconsider_at" in result.stdout


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds no decisions"),
        (b"{", "line 1: not written by `uellm decisions`"),
        (b"\xff\xfe\x00", "line 1: not written by `uellm decisions`"),
        (b"[]", "version: 0"),
    ],
)
def test_a_file_without_decisions_is_said(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "decisions.jsonl"
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["replay", str(file)])
    assert result.exit_code == exits.USAGE
    assert why in result.stderr


def waiting(record: Record) -> Any:
    return record.queue.waiting if isinstance(record, DispatchRecord) else ()


async def refused(redis: Any, request_id: str) -> bool:
    return any(
        refusal.request_id == request_id
        for record in await recorded(redis)
        if isinstance(record, DispatchRecord)
        for refusal in record.decision.refusals
    )


async def test_of_a_long_queue_the_first_are_recorded(
    mesh: Mesh, redis: Any, redis_url: str
) -> None:
    ids = [await mesh.accept(deadline=1000 - i) for i in range(8)]
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, lookahead_requests=0, recorded_requests=3):
        await mesh.received("r0", 1)
        record = await eventually(lambda: of_dispatch(redis, ids[-1]))
    assert record is not None
    assert record.truncated
    assert record.waiting == 8
    assert list(record.decision.order) == [ids[6], ids[5], ids[4]]
    assert [view.request_id for view in record.queue.waiting] == [ids[6], ids[5], ids[4]]


async def test_nothing_is_recorded_where_nothing_is_to_be_kept(
    mesh: Mesh, redis: Any, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, decisions_kept=0):
        await mesh.accept()
        await mesh.received("r0", 1)
    assert await recorded(redis) == []


def segment(number: int) -> DecisionSegment:
    message = SegmentWriter().message()
    message.release = str(number)
    message.dispatches.add(now=number)
    return message


async def test_old_decisions_are_trimmed(redis: Any) -> None:
    log = DecisionLog(redis, MODEL)
    for number in range(400):
        await log.add(segment(number), kept=20)
    kept = [int(each.release) async for each in log.all()]
    assert kept[-1] == 399
    assert kept == list(range(kept[0], 400))
    assert 20 <= len(kept) <= 20 + 100  # whole nodes of a stream go at once


async def test_of_a_long_span_beginning_and_end_and_some_between_are_read(redis: Any) -> None:
    log = DecisionLog(redis, MODEL)
    count = 5 * streams_decisions.SPAN_SEGMENTS
    for number in range(count):
        await log.add(segment(number), kept=10_000)
    seconds, _ = await redis.time()
    found, whole = await log.between(0, (seconds + 60) * 1000)
    numbers = [int(each.release) for each in found]
    assert not whole
    assert numbers == sorted(set(numbers))
    assert numbers[: streams_decisions.SPAN_SEGMENTS] == list(
        range(streams_decisions.SPAN_SEGMENTS)
    )
    assert numbers[-1] == count - 1
    assert numbers[-streams_decisions.SPAN_SEGMENTS] == count - streams_decisions.SPAN_SEGMENTS
    assert await log.between(0, 1) == ([], True)


async def test_a_slow_redis_costs_decisions_not_time(redis: Any) -> None:
    gate, log = asyncio.Event(), DecisionLog(redis, MODEL)

    class Slow(DecisionLog):
        async def add(self, segment: DecisionSegment, kept: int) -> None:
            await gate.wait()
            await log.add(segment, kept)

    writer = DecisionWriter(Slow(redis, MODEL), kept=100)
    task = asyncio.create_task(writer.run())
    writer.offer(segment(0))
    await asyncio.sleep(0)
    for number in range(1, 10):
        writer.offer(segment(number))
    assert writer.dropped == 9 - streams_decisions.WAITING_SEGMENTS
    gate.set()

    async def written() -> bool:
        return len([each async for each in log.all()]) == 1 + streams_decisions.WAITING_SEGMENTS

    await eventually(written)
    writer.offer(segment(10))

    async def told() -> bool:
        return sum([each.dropped async for each in log.all()]) == 5

    await eventually(told)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_without_time_to_record_decisions_are_dropped_and_counted(
    redis: Any, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SHARE", 0.0)
    monkeypatch.setattr(recorder, "SAVED_SECONDS", 0.0)
    monkeypatch.setattr(recorder, "GATHER_SECONDS", 0.01)
    log = DecisionLog(redis, MODEL)
    recording = recorder.Recorder(log, SchedulerSettings(redis_url=redis_url))

    def note() -> None:
        recording.note(
            PolicyChoice("edf"), QueueView(()), (), 1.0, DispatchDecision(), {}.__getitem__
        )

    task = asyncio.create_task(recording.run())
    for _ in range(3):
        note()
    await eventually(lambda: recording.dropped == 3)
    monkeypatch.setattr(recorder, "SHARE", 1.0)
    monkeypatch.setattr(recorder, "SAVED_SECONDS", 1.0)
    note()

    async def told() -> bool:
        found = [each async for each in log.all()]
        return [(len(each.dispatches), each.dropped) for each in found] == [(1, 3)]

    await eventually(told)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_cannot_be_recorded_keeps_nobody_from_work(redis: Any, redis_url: str) -> None:
    log = DecisionLog(redis, MODEL)
    recording = recorder.Recorder(log, SchedulerSettings(redis_url=redis_url))
    task = asyncio.create_task(recording.run())
    for decision in (
        DispatchDecision(reconsider_at="soon"),  # type: ignore[arg-type]
        DispatchDecision(order=(None,)),  # type: ignore[arg-type]
        DispatchDecision(order=("a",)),
    ):
        find: dict[str, Any] = {}
        queue = QueueView(())
        recording.note(PolicyChoice("edf"), queue, (), 1.0, decision, find.__getitem__)

    async def told() -> bool:
        found = [each async for each in log.all()]
        return [(len(each.dispatches), each.dropped) for each in found] == [(1, 2)]

    await eventually(told)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_write_that_fails_is_counted_and_the_next_goes_through(
    redis: Any, redis_url: str
) -> None:
    lost = connect("redis://127.0.0.1:1/0")
    away = DecisionLog(lost, MODEL)
    writer = DecisionWriter(away, kept=100)
    task = asyncio.create_task(writer.run())
    writer.offer(segment(0))
    await eventually(lambda: writer.dropped == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await lost.aclose()


async def test_what_cannot_be_exported_or_read_says_so(
    redis: Any, redis_url: str, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        await replaying.export(redis_url, "nobody", tmp_path / "none", None)
    with pytest.raises(InvalidArgumentError, match="No such file"):
        replaying.replay(tmp_path / "missing", "", (), as_json=False)
    other = tmp_path / "other"
    other.write_text("{}\nhello\n")
    with pytest.raises(InvalidArgumentError, match="version"):
        replaying.replay(other, "", (), as_json=False)
    other.write_text("hello\n")
    with pytest.raises(InvalidArgumentError, match="line 1"):
        replaying.replay(other, "", (), as_json=False)
    with pytest.raises(InvalidArgumentError, match="KEY=VALUE"):
        replaying.replay(other, "", ("nonsense",), as_json=False)
