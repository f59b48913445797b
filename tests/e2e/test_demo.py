"""`uellm demo --once --json`: every answer right, shards on both workers, one request's spans."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if "UELLM_" not in name}
    environment["UELLM_HOME"] = str(tmp_path_factory.mktemp("home"))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    done = subprocess.run(
        [Path(sys.executable).parent / "uellm", "demo", "--once", "--json"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_every_checkable_answer_is_right(demo: dict[str, Any]) -> None:
    assert demo["right"]
    assert demo["checkable"] == len(demo["rows"]) == 24
    for burst in demo["bursts"].values():
        assert [row["prompt"] for row in burst if not row["right"]] == []


def test_shards_are_on_both_workers(demo: dict[str, Any]) -> None:
    """How many each holds depends on how fast it was measured to be; together each layer once."""
    for layers in {row["layers"] for row in demo["rows"]}:
        stages = dict(stage.split(":") for stage in layers.split())
        assert set(stages) == {"w1", "w2"}
        spans = [tuple(map(int, span.split("-"))) for span in stages.values()]
        assert [layer for first, last in spans for layer in range(first, last + 1)] == [*range(8)]


def test_every_row_has_its_promise_and_its_end(demo: dict[str, Any]) -> None:
    for row in demo["rows"]:
        assert 0 < row["predicted_finish_p50_seconds"] <= row["predicted_finish_p90_seconds"]
        assert row["tokens"] > 0
        assert row["finish_seconds"] > 0
        assert row["batch"]
        assert row["slo_met"] == (row["finish_seconds"] <= row["deadline_seconds"])


def test_the_default_serves_who_has_less_time_first(demo: dict[str, Any]) -> None:
    """Its order, however fast the machine is in each of the bursts: lateness follows from it."""

    def in_order(rows: list[dict[str, Any]]) -> float:
        """The share of pairs in which who was due sooner was answered sooner."""
        ends = [(row["deadline_seconds"], row["finish_seconds"]) for row in rows]
        pairs = [(one, other) for one in ends for other in ends if one[0] < other[0]]
        return sum(one[1] < other[1] for one, other in pairs) / len(pairs)

    assert in_order(demo["bursts"]["cslo-odbs"]) > 0.9
    assert in_order(demo["bursts"]["fcfs"]) < 0.5
    for policy, rows in demo["bursts"].items():
        late = [max(row["finish_seconds"] - row["deadline_seconds"], 0.0) for row in rows]
        said = demo["policies"][policy]
        assert said["mean_lateness_seconds"] == pytest.approx(sum(late) / len(late), abs=0.01)
        assert said["slos_met"] == sum(row["slo_met"] for row in rows)


def test_spans_of_one_request_hang_together(demo: dict[str, Any]) -> None:
    trace = demo["trace"]
    spans = {span["name"]: span for span in trace["spans"]}
    assert spans["gateway.profile"]["parent"] == "gateway.generate"
    profile = spans["profiler.profile"]
    assert (profile["service"], profile["parent"]) == ("profiler-1", "gateway.profile")
    queue = spans["scheduler.queue"]
    assert (queue["service"], queue["parent"]) == ("scheduler-1", "gateway.generate")
    assert spans["worker.generate"]["parent"] == "scheduler.queue"
    assert spans["worker.batch"]["links"] == ["scheduler.queue"]
    stages = [span for span in trace["spans"] if span["name"] == "worker.stage"]
    assert [span["parent"] for span in stages] == ["worker.generate"] * 2
    assert [span["attributes"]["uellm.worker"] for span in stages] == ["worker-1", "worker-2"]
