"""An engine keeps the decisions that somebody could ask about, and few of the others."""

from collections.abc import Iterator

import pytest
from uellm_worker.engine import recorder as recording
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.recorder import StepRecorder

from tests.support.engine_loop import FunctionPolicy, add, make_loop
from uellm.decisions.records import StepRecord
from uellm.decisions.replay import replay
from uellm.decisions.segments import read_segment
from uellm.policy.continuous import OrderedSettings
from uellm.policy.fcfs import FcfsStep
from uellm.policy.views import EngineView, StepDecision


@pytest.fixture(autouse=True)
def no_shortage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time to record is there, whatever the machine does besides."""
    monkeypatch.setattr(recording, "SHARE", 1e6)
    yield


def records_of(loop: EngineLoop) -> list[StepRecord]:
    """What a loop recorded until all is done."""
    records: list[StepRecord] = []
    while loop.busy:
        report = loop.step()
        assert report is not None
        if report.HasField("decisions"):
            for record in read_segment(report.decisions).records:
                assert isinstance(record, StepRecord)
                records.append(record)
    return records


def test_every_so_manieth_decision_is_kept_and_replays() -> None:
    loop = make_loop(kv_tokens=64, recorder=StepRecorder("r0", every_steps=8))
    loop.add(add("a", max_tokens=30))
    # It waits for room, so that the policy is asked before every step.
    loop.add(add("b", prompt=60, max_tokens=1))
    *records, last = records_of(loop)
    assert (last.step, last.decision.admit) == (30, ("b",))
    assert [record.step for record in records] == [0, 8, 16, 24]
    assert {record.replica for record in records} == {"r0"}
    assert [record.engine.running[0].output_tokens for record in records[1:]] == [8, 16, 24]
    result = replay(records)
    assert (result.steps, result.different) == (4, 0)


def test_whoever_waited_is_let_in_on_record() -> None:
    loop = make_loop(slots=1, recorder=StepRecorder("r0", every_steps=1000))
    loop.add(add("a", max_tokens=10))
    loop.add(add("b", max_tokens=10))
    records = records_of(loop)
    assert [record.decision.admit for record in records] == [("a",), ("b",)]
    assert records[1].step == 10
    assert replay(records).different == 0


def test_preemptions_and_returns_are_on_record() -> None:
    taken = iter(["preempt", "hand_back"])

    def decide(engine: EngineView) -> StepDecision:
        ids = tuple(s.request_id for s in engine.running)
        if ids and engine.running[0].output_tokens:
            what = next(taken, "")
            if what == "preempt":
                return StepDecision(preempt=ids, chunk_tokens=64)
        if engine.waiting and engine.waiting[0].preemptions:
            return StepDecision(hand_back=tuple(s.request_id for s in engine.waiting))
        return FcfsStep().step(engine, 0.0)

    loop = make_loop(policy=FunctionPolicy(decide), recorder=StepRecorder("r0", every_steps=1000))
    loop.add(add("a", max_tokens=10))
    records = records_of(loop)
    assert [record.decision.preempt for record in records[1:]] == [("a",), ()]
    assert [record.decision.hand_back for record in records[1:]] == [(), ("a",)]


def test_without_time_to_record_only_what_happened_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARE", 0.0)
    monkeypatch.setattr(recording, "SAVED_SECONDS", 0.0)
    loop = make_loop(slots=1, recorder=StepRecorder("r0", every_steps=1))
    for name in "abc":
        loop.add(add(name, max_tokens=5))
    records = records_of(loop)
    assert [record.decision.admit for record in records] == [("b",), ("c",)]
    assert all(record.truncated and not record.engine.running for record in records)
    assert [(record.running, record.waiting) for record in records] == [(0, 2), (0, 1)]


def test_nothing_is_kept_unless_asked() -> None:
    loop = make_loop(slots=1)
    for name in "ab":
        loop.add(add(name))
    assert records_of(loop) == []


def test_settings_of_the_policy_are_on_record() -> None:
    recorder = StepRecorder("r0", every_steps=8)
    recorder.options = {"watermark": "0.5"}
    loop = make_loop(recorder=recorder, policy=FcfsStep(OrderedSettings(watermark=0.5)))
    loop.add(add("a", max_tokens=10))
    records = records_of(loop)
    assert dict(records[0].policy.options) == {"watermark": "0.5"}
    assert replay(records).different == 0


def test_nobody_is_let_in_on_record_while_a_static_batch_runs() -> None:
    loop = make_loop(execution="static", recorder=StepRecorder("r0", every_steps=1000))
    loop.add(add("a", max_tokens=10))
    assert loop.step() is not None
    # Its policy would admit it at once, at every step; but it gets its slot when the batch is over.
    loop.add(add("b", max_tokens=3))
    records = records_of(loop)
    assert [record.step for record in records if "b" in record.decision.admit] == [10]
