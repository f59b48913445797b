"""Decisions come out of their records as they went in, whole, and decide again the same."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from enum import IntEnum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.dispatching import QUEUES, REPLICAS, queued, replica
from tests.support.policies import engines
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, QuantileFunction
from uellm.decisions.codec import TABLES, missing_fields
from uellm.decisions.records import (
    DispatchPolicyUsed,
    DispatchRecord,
    Record,
    StepPolicyUsed,
    StepRecord,
    dispatch_record,
)
from uellm.decisions.replay import Instead, replay
from uellm.decisions.segments import VERSION, SegmentWriter, read_segment
from uellm.decisions.story import facts_of_refused
from uellm.policy.registry import dispatch_policies, step_policies
from uellm.policy.views import (
    NOT_RECORDED,
    DispatchSettings,
    EngineView,
    QueuedView,
    QueueView,
    ReplicaView,
)
from uellm.v1.decisions_pb2 import DecisionSegment

NOW = 1000.0
NUMBERS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)
NAMES = st.text(max_size=8)
LENGTHS = st.builds(
    lambda values: QuantileFunction(LEVELS[: len(values)], sorted(values)),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=len(LEVELS)),
)


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type, each field of a dataclass included, whatever its default."""
    if get_origin(hint) in (Union, UnionType):
        (kind,) = [part for part in get_args(hint) if part is not NoneType]
        return st.none() | anything(kind)
    if get_origin(hint) is not None:
        return collections(get_origin(hint), get_args(hint))
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        recorded = [each.name for each in fields(hint) if NOT_RECORDED not in each.metadata]
        given = {name: anything(hints[name]) for name in recorded}
        return st.builds(hint, **given)
    if issubclass(hint, IntEnum):
        return st.sampled_from(hint)
    return {bool: st.booleans(), int: COUNTS, float: NUMBERS, str: NAMES}.get(hint, LENGTHS)


def collections(origin: Any, parts: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    first = anything(parts[0])
    if issubclass(origin, Mapping):
        return st.dictionaries(first, anything(parts[1]), max_size=2)
    if origin is frozenset:
        return st.frozensets(first, max_size=3)
    assert issubclass(origin, Sequence)
    return st.lists(first, max_size=2).map(tuple)


def written(records: Sequence[Record], dropped: int = 0) -> DecisionSegment:
    writer = SegmentWriter()
    for record in records:
        writer.add(record)
    return writer.message(dropped)


def again(records: Sequence[Record]) -> tuple[Record, ...]:
    """Records after a journey through bytes."""
    return read_segment(DecisionSegment.FromString(written(records).SerializeToString())).records


@pytest.mark.parametrize("kind", [DispatchRecord, StepRecord])
def test_records_have_a_place_for_every_field(kind: type) -> None:
    tables = {"dispatches": DispatchRecord, "steps": StepRecord}
    tables |= {field: kind for kind, field in TABLES.items() if kind is not str}
    messages = DecisionSegment.DESCRIPTOR.fields_by_name
    for field, each in tables.items():
        missing = missing_fields(each, messages[field].message_type)
        assert not missing, f"add {missing} to protos/uellm/v1/decisions.proto, by the same name"
    assert kind in tables.values()


@pytest.mark.parametrize("kind", [DispatchRecord, StepRecord])
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_record_comes_out_as_it_went_in(kind: type, data: st.DataObject) -> None:
    record = data.draw(anything(kind))
    assert again([record]) == (record,)


@given(QUEUES, REPLICAS)
def test_what_several_decisions_saw_is_written_once(
    waiting: list[QueuedView], replicas: list[ReplicaView]
) -> None:
    used = DispatchPolicyUsed("edf")
    queue = QueueView(tuple(waiting))
    decision = used.make().dispatch(queue, replicas, NOW)
    records = [DispatchRecord(NOW + i, used, queue, tuple(replicas), decision) for i in range(3)]
    segment = written(records, dropped=7)
    assert len(segment.queued) == len(waiting)
    assert len(segment.in_flight) == sum(len(view.in_flight) for view in replicas)
    read = read_segment(segment)
    assert read.records == tuple(records)
    assert read.dropped == 7
    for one, other in zip(read.records, read.records[1:], strict=False):
        assert isinstance(one, DispatchRecord)
        assert isinstance(other, DispatchRecord)
        assert all(a is b for a, b in zip(one.queue.waiting, other.queue.waiting, strict=True))


def decided(name: str, queue: QueueView, replicas: Sequence[ReplicaView]) -> DispatchRecord:
    used = DispatchPolicyUsed(name, DispatchSettings(lookahead_requests=1))
    decision = used.make().dispatch(queue, replicas, NOW)
    return DispatchRecord(NOW, used, queue, tuple(replicas), decision, len(queue.waiting))


@pytest.mark.parametrize("name", dispatch_policies())
@settings(max_examples=10)
@given(QUEUES, REPLICAS, st.booleans(), st.booleans())
def test_a_scheduler_decides_again_what_it_decided(
    name: str, waiting: list[QueuedView], replicas: list[ReplicaView], new: bool, revise: bool
) -> None:
    ids = [request.request_id for request in waiting]
    queue = QueueView(
        waiting,
        unpromised=frozenset(ids[::2] if new else ()),
        promised=dict.fromkeys(ids[1::2], NOW + 3) if revise else {},
        horizon=None if new else 8,
    )
    result = replay(again([decided(name, queue, replicas)]))
    assert (result.dispatches, result.different) == (1, 0), result.first


@pytest.mark.parametrize("name", step_policies())
@settings(max_examples=10)
@given(engines())
def test_an_engine_decides_again_what_it_decided(name: str, engine: EngineView) -> None:
    used = StepPolicyUsed(name)
    decision = used.make().step(engine, NOW)
    result = replay(again([StepRecord(NOW, "r0", 3, used, engine, decision)]))
    assert (result.steps, result.different) == (1, 0), result.first


def short_and_long() -> DispatchRecord:
    first = queued("long", deadline=5000.0, accepted=NOW - 2, tokens=500)
    second = queued("short", deadline=9000.0, accepted=NOW - 1, tokens=5)
    queue = QueueView((first, second), unpromised=frozenset({"long", "short"}))
    return decided("fcfs", queue, [replica(slots=1, in_flight=1)])


def test_another_policy_shows_what_it_would_have_decided() -> None:
    record = short_and_long()
    result = replay([record], Instead("sjf"))
    assert result.different == 1
    assert result.counts["dispatches"] == 1
    assert result.counts["order"] == 1
    assert result.counts["promises"] == 1
    assert replay([short_and_long()], Instead("past-future")).different == 0
    difference = next(each for each in result.examples if each.what == "dispatches")
    assert "long" in difference.recorded
    assert "short" in difference.replayed
    # The same policy, sent less ahead.
    result = replay([record], Instead(settings={"lookahead_requests": "0"}))
    assert result.counts["dispatches"] == 1


def test_a_record_that_was_tampered_with_does_not_replay() -> None:
    record = short_and_long()
    forged = replace(record, decision=replace(record.decision, order=("long",)))
    result = replay([record, forged])
    assert result.different == 1
    assert result.first is not None
    assert (result.first.what, result.first.recorded) == ("order", "[0] long")


@pytest.mark.parametrize(
    ("policy", "given", "words"),
    [
        ("lifo", {}, "lifo"),
        ("fcfs", {"nonsense": "1"}, "nonsense"),
        ("fcfs", {"lookahead_requests": "-1"}, "lookahead_requests"),
        ("cslo-odbs", {"kv_share": "much"}, "kv_share"),
    ],
)
def test_what_cannot_be_tried_is_refused(policy: str, given: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        replay([short_and_long()], Instead(policy, given))


@given(QUEUES, REPLICAS, st.integers(0, 10))
def test_of_a_long_queue_the_first_are_recorded(
    waiting: list[QueuedView], replicas: list[ReplicaView], most: int
) -> None:
    ids = frozenset(request.request_id for request in waiting)
    queue = QueueView(waiting, unpromised=ids)
    used = DispatchPolicyUsed("edf")
    decision = used.make().dispatch(queue, replicas, NOW)
    find = {request.request_id: request for request in waiting}.__getitem__
    record = dispatch_record(used, queue, replicas, NOW, decision, most=most, find=find)
    assert record.waiting == len(waiting)
    assert record.truncated == (len(waiting) > most)
    assert record.decision.dispatches == decision.dispatches
    if record.truncated:
        refused = [refusal.request_id for refusal in decision.refusals]
        recorded = [request.request_id for request in record.queue.waiting]
        assert recorded == [*decision.order[:most], *refused]
        assert record.decision.refusals == decision.refusals
        assert replay(again([record])).truncated == 1
    else:
        assert replay(again([record])).different == 0


@pytest.mark.parametrize("most", [0, 2])
def test_who_is_refused_beside_a_long_queue_is_told_why(most: int) -> None:
    late = queued("late", 0.001, refusable=True, tenant="mine")
    views = [*(queued(f"q{i}") for i in range(5)), late]
    queue = QueueView(views, unpromised=frozenset({"late"}))
    used = DispatchPolicyUsed("edf")
    decision = used.make().dispatch(queue, [replica(slots=0)], NOW)
    find = {view.request_id: view for view in views}.__getitem__
    record = dispatch_record(used, queue, [replica()], NOW, decision, most=most, find=find)
    assert record.truncated
    facts = facts_of_refused("late", again([record]))
    assert facts is not None
    assert (facts.tenant, facts.slo, facts.refused) == ("mine", late.slo, True)
    assert facts.message == decision.refusals[0].message


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="version"):
        read_segment(DecisionSegment(version=VERSION + 1))
    with pytest.raises(InvalidArgumentError, match="version"):
        read_segment(DecisionSegment())


def test_a_broken_segment_is_refused() -> None:
    segment = written([short_and_long()])
    del segment.texts[:]
    with pytest.raises(InvalidArgumentError, match="refers to"):
        read_segment(segment)


def test_json_keeps_every_number() -> None:
    record = short_and_long()
    text = json_format.MessageToJson(written([record]))
    parsed = json_format.Parse(text, DecisionSegment())
    assert read_segment(parsed).records == (record,)
