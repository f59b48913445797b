"""What the demo computes and shows; that it runs is an end-to-end test."""

import io
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from uellm import convert
from uellm.cli.demo import screens
from uellm.cli.demo.burst import Row
from uellm.cli.demo.calibration import calibrate, finish_times
from uellm.cli.demo.spans import read_spans, summarise
from uellm.demo.prompts import DemoPrompt, demo_prompts
from uellm.v1 import common_pb2
from uellm.v1.inference_pb2 import Accepted, Finished, GenerationEvent, Tokens

JOBS = st.lists(st.floats(0.01, 10), min_size=1, max_size=30)


@given(JOBS, st.integers(1, 8), st.floats(0, 5))
def test_no_slot_is_idle_while_work_waits(seconds: list[float], slots: int, busy: float) -> None:
    ends = finish_times(range(len(seconds)), seconds, slots, busy)
    assert set(ends) == set(range(len(seconds)))
    most = busy + sum(seconds) / slots + max(seconds)
    assert busy + max(seconds) <= max(ends.values()) + 1e-9 <= most + 1e-6


@given(st.floats(0.0005, 0.1), st.integers(1, 16))
def test_deadline_order_can_keep_every_scaled_deadline(per_token: float, slots: int) -> None:
    prompts = demo_prompts()
    calibration = calibrate(prompts, slots, per_token, 60)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].deadline_s)
    seconds = [0.85 * prompt.max_tokens * per_token for prompt in prompts]
    ends = finish_times(order, seconds, slots, 60 * per_token)
    assert all(ends[i] < calibration.deadline_seconds(prompts[i]) for i in ends)


def test_order_of_arrival_cannot() -> None:
    """Else the comparison would show nothing."""
    prompts = demo_prompts()
    calibration = calibrate(prompts, 4, 0.005, 60)
    seconds = [0.8 * prompt.max_tokens * 0.005 for prompt in prompts]
    ends = finish_times(range(len(prompts)), seconds, 4, 60 * 0.005)
    late = [i for i in ends if ends[i] > calibration.deadline_seconds(prompts[i])]
    assert len(late) >= 4


def a_row(*, answer: str = "8 9", seconds: float = 1.5) -> Row:
    prompt = DemoPrompt("Count from 8 to 9.", "count", 2.0, True, 10)
    row = Row(prompt, 2.0)
    at = convert.timestamp
    promise = common_pb2.Promise(
        output_tokens_p50=4, finish_p50=at(101), finish_p90=at(102), p_meet=0.9
    )
    end = Finished(
        reason=common_pb2.FINISH_REASON_STOP,
        timings=common_pb2.Timings(accepted_at=at(100), finished_at=at(100 + seconds)),
        slo=common_pb2.SloVerdict(met=seconds <= 2),
        replica="demo-0",
        batch="b-0-1.7",
    )
    for event in (
        GenerationEvent(accepted=Accepted(accepted_at=at(100))),
        GenerationEvent(promise=promise),
        GenerationEvent(promise=common_pb2.Promise(output_tokens_p50=9)),
        GenerationEvent(tokens=Tokens(ids=[1, 2], text=answer)),
        GenerationEvent(finished=end),
    ):
        event.request_id = "demo:1"
        row.take(event)
    return row


def test_a_row_holds_the_first_promise_and_the_end() -> None:
    row = a_row()
    assert row.promised("finish_p90") == 2.0
    assert row.finish_seconds == 1.5
    assert row.met
    assert row.late_seconds == 0
    facts = json.loads(json.dumps(row.as_dict()))
    assert facts["predicted_tokens_p50"] == 4
    assert facts["tokens"] == 2
    assert facts["finish_seconds"] == 1.5


def test_a_wrong_or_missing_answer_is_not_right() -> None:
    assert not a_row(answer="8 8").right
    assert not Row(demo_prompts()[0], 1.0).right


def rendered(what: object) -> str:
    console = Console(file=io.StringIO(), width=118)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_holds_what_was_predicted_and_what_was() -> None:
    shown = rendered(screens.results([a_row(), a_row(seconds=3)], {"demo-0": "w1:0-3 w2:4-7"}))
    for cell in ("Count from 8 to 9.", "1.50", "met", "missed", "1.7", "w1:0-3 w2:4-7"):
        assert cell in shown


def test_the_comparison_is_of_what_was_measured() -> None:
    measured = {
        "edf": screens.measures([a_row(), a_row()]),
        "fcfs": screens.measures([a_row(), a_row(seconds=3)]),
    }
    assert measured["fcfs"]["max_lateness_seconds"] == 1.0
    shown = rendered(screens.comparison(measured))
    assert "2 of 2" in shown
    assert "1 of 2" in shown
    assert "first come, first served" in shown


def span(service: str, name: str, trace: str, id_: str, parent: str = "", **more: object) -> str:
    return json.dumps(
        {
            "name": name,
            "context": {"trace_id": trace, "span_id": id_},
            "parent_id": parent or None,
            "start_time": more.get("start", "2026-01-01T00:00:00Z"),
            "attributes": more.get("attributes", {}),
            "links": more.get("links", []),
            "resource": {"attributes": {"service.instance.id": service}},
        }
    )


def test_the_way_of_a_request_takes_in_what_is_linked_to_it(tmp_path: Path) -> None:
    (tmp_path / "gateway.jsonl").write_text(
        span("gateway-1", "generate", "t1", "a", attributes={"request": "demo:1"})
        + "\n"
        + span("gateway-1", "generate", "t9", "z", attributes={"request": "demo:2"})
        + '\n{"cut o'
    )
    link = {"context": {"trace_id": "t1", "span_id": "a"}}
    (tmp_path / "worker.jsonl").write_text(
        span("worker-1", "batch", "t2", "b", links=[link])
        + "\n"
        + span("worker-2", "stage", "t2", "c", "b")
        + "\n"
    )
    way = summarise("demo:1", read_spans(tmp_path))
    assert way["services"] == ["gateway-1", "worker-1", "worker-2"]
    assert [s["name"] for s in way["spans"]] == ["generate", "batch", "stage"]
    assert way["spans"][1]["links"] == ["generate"]
    assert way["spans"][2]["parent"] == "batch"


def test_next_steps_can_be_pasted() -> None:
    steps = screens.next_steps(".venv/bin/uellm", "worker-2", 4711)
    assert "kill -9 4711" in steps
    assert ".venv/bin/uellm generate 'Count from 5 to 30.' --model demo --deadline 3s\n" in steps
