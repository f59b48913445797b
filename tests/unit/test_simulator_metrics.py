"""What is made of runs: shares, quantiles, calibration, goodput, the bound; and the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.simulated import simulate as serve
from uellm.cli.app import app
from uellm.core.cost import StepCost
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import Promise
from uellm.simulator.calibration import calibration
from uellm.simulator.engine import Counts
from uellm.simulator.experiments import (
    FINENESS,
    Cell,
    Pair,
    Setup,
    goodput,
    pair_of,
    simulate,
    simulate_all,
)
from uellm.simulator.mesh import Execution, MeshSettings, Outcome, Record, Run
from uellm.simulator.metrics import highest_rate, measure
from uellm.simulator.platforms import PLATFORMS, Platform
from uellm.simulator.requests import Request

R3090 = PLATFORMS["r3090"]


def promise(p50: float, p90: float, p_meet: float | None) -> Promise:
    return Promise(0.0, 0.0, p50, p90, p_meet, 0, "x", "", 1, 1)


def record(finished: float, outcome: Outcome = Outcome.FINISHED, **facts: float) -> Record:
    request = Request("r", 1.0, 5, 11, "all", 99, **facts)  # type: ignore[arg-type]
    first = 2.0 if outcome is Outcome.FINISHED else None
    return Record(request, outcome, finished, first_token_at=first)


def test_refused_expired_and_late_are_misses() -> None:
    records = [
        record(4.0, deadline=3.0),
        record(4.1, deadline=3.0),
        record(4.0, ttft=0.9),
        record(4.0, ttft=1.0, tpot=0.2),
        record(4.0, tpot=0.19),
        record(1.5, Outcome.REFUSED),
        record(9.0, Outcome.EXPIRED),
    ]
    assert [r.met for r in records] == [True, False, False, True, False, False, False]
    kinds = measure(Run(records, [Counts()], 3, 9.0))
    assert kinds.attainment == pytest.approx(2 / 7)
    assert kinds.refused == pytest.approx(2 / 7)
    assert kinds.max_wait == 8.0
    assert kinds.latency_mean == pytest.approx((4 * 3.0 + 3.1) / 5)
    assert kinds.met_per_second == pytest.approx(2 / 8)
    assert kinds.tokens_per_second == pytest.approx(55 / 8)
    assert kinds.kinds["all"].latency_p50 == pytest.approx(3.0)
    assert kinds.kinds["all"].ttft_p99 == pytest.approx(1.0)
    assert kinds.calibration.p90_coverage is None


def test_calibration_counts_what_was_kept() -> None:
    records = [record(4.0, deadline=3.5), record(6.0, deadline=3.5), record(8.0), record(9.0)]
    for each, given_promise in zip(
        records,
        [promise(5, 7, 0.95), promise(5, 7, 0.95), promise(9, 10, None), promise(4, 8, None)],
        strict=True,
    ):
        each.promise, each.promised_at = given_promise, 1.0
    found = calibration(records)
    assert (found.promises, found.p50_coverage, found.p90_coverage) == (4, 0.5, 0.75)
    assert found.width == pytest.approx((2 + 2 + 1 + 4) / 4)
    assert found.pinball_p50 == pytest.approx(0.5 * (1 + 1 + 1 + 5) / 4)
    assert found.pinball_p90 == pytest.approx((0.1 * (3 + 1 + 2) + 0.9 * 1) / 4)
    assert (found.bins[9].promises, found.bins[9].met) == (2, 0.5)
    assert sum(each.promises for each in found.bins) == 2


SMALL = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(st.lists(SMALL, min_size=1, max_size=30), st.integers(1, 6), st.integers(60, 200))
def test_no_run_is_faster_than_the_bound(
    lengths: list[tuple[int, int]], slots: int, kv_tokens: int
) -> None:
    platform = Platform("t", StepCost(0.001, 0.004, 0.001, 1e-5, 1e-6), kv_tokens, slots, 16)
    requests = [Request(f"r{i:03d}", 0.0, p, o, "all", 30) for i, (p, o) in enumerate(lengths)]
    records = [Record(each) for each in requests]
    bound = highest_rate(records, platform)
    run = serve(requests, platform, predictor="oracle")
    assert len(requests) / run.ended_at <= bound * (1 + 1e-9)
    assert highest_rate(records, platform, 0.5) >= bound * (1 - 1e-9)


@pytest.mark.parametrize("edge", [0.05, 0.7, 1.9])
def test_goodput_is_where_attainment_breaks(edge: float) -> None:
    asked: list[float] = []

    def attained(load: float) -> float:
        asked.append(load)
        return 1.0 if load <= edge else 0.93 if load <= 2 * edge else 0.0

    strict, loose = goodput(Setup(R3090, "tier", requests=200), "x", [0.99, 0.9], attained)
    assert strict.load <= edge < strict.load * FINENESS
    assert loose.load <= 2 * edge < loose.load * FINENESS
    assert strict.requests_per_second == pytest.approx(strict.load * 1.63)
    assert len(asked) == len(set(asked)) < 22
    (none,) = goodput(Setup(R3090, "tier", requests=200), "x", [0.99], lambda load: 0.5)
    assert none.load == 0.0


def test_names_stand_for_policies_of_both_levels() -> None:
    assert pair_of("fcfs") == Pair("fcfs", "fcfs", {}, {})
    options = {"knee_factor": "2"}
    assert pair_of("edf+fcfs:knee_factor=2") == Pair("edf", "fcfs", {}, options)
    assert pair_of("fcfs:knee_factor=2").step_options == options
    for name, message in (
        ("magic", "available"),
        ("edf+magic", "available"),
        ("magic+fcfs", "available"),
        ("fcfs:speed=2", "knee_factor"),
        ("fcfs:knee_factor", "NAME:SETTING=VALUE"),
        ("fcfs:knee_factor=x", "not a number"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            pair_of(name)


def test_processes_find_what_one_does() -> None:
    setup = Setup(R3090, "alpha", requests=40, mesh=MeshSettings(2))
    cells = [Cell("fcfs", 1.0, 0), Cell("edf", 1.0, 1)]
    assert list(simulate_all(setup, cells, 2)) == [simulate(setup, cell) for cell in cells]


@pytest.mark.parametrize(
    ("platform", "workload", "rate"),
    [("a100", "alpha", 14.66), ("r3090", "alpha", 1.83), ("cpu", "alpha", 0.27)],
)
def test_a_load_of_one_is_about_what_saturates(platform: str, workload: str, rate: float) -> None:
    found = Setup(PLATFORMS[platform], workload, "oracle", 800)
    assert found.reference_rate() == rate
    at_once = simulate(found, Cell("fcfs", 1000.0, 0)).metrics
    assert 0.7 * rate < at_once.requests_per_second < 1.5 * rate
    assert at_once.requests_per_second < found.highest_load(1.0) * rate


def test_static_batches_pad_and_serve_less() -> None:
    setup = Setup(R3090, "loose", requests=300)
    static = replace(setup, mesh=MeshSettings(execution=Execution.STATIC))
    one, other = (simulate(each, Cell("fcfs", 0.6, 0)).metrics for each in (setup, static))
    assert one.padding == 0
    assert 0.3 < other.padding < 1
    assert one.attainment > other.attainment + 0.2


# ---- the command -------------------------------------------------------------------------------


def test_the_command_compares_policies(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    arguments = ["simulate", "--policies", "fcfs,edf", "--load", "0.5,1", "--requests", "60"]
    plain = CliRunner().invoke(app, [*arguments, "--plot", str(plot)])
    assert plain.exit_code == 0, plain.output
    # Two loads: of all requests, and of three classes.
    assert plain.output.count("edf") == 2 + 2 * 3
    for title in ("in time tokens/s", "longest wait s", "latency p99 s", "first token p99 s"):
        assert title in plain.output
    drawn = plot.read_text()
    assert "<svg" in drawn
    assert drawn.count('id="axes_') == 2, "attainment, and goodput"
    done = CliRunner().invoke(app, [*arguments, "--seeds", "2", "--json"])
    results = json.loads(done.stdout)["results"]
    assert len(results) == 8
    assert {result["cell"]["seed"] for result in results} == {0, 1}
    assert 0 <= results[0]["metrics"]["attainment"] <= 1


def test_the_command_finds_goodput_of_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{i / 10},20,30,2" for i in range(80)]
    trace.write_text("arrival_s,prompt_tokens,output_tokens,deadline_s\n" + "\n".join(rows))
    plot = tmp_path / "plot.svg"
    arguments = ["simulate", "goodput", "--workload", str(trace), "--policies", "fcfs"]
    arguments += ["--attainment", "0.9"]
    done = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    (found,) = facts["results"]
    assert found["load"] > 1
    tried = {run["cell"]["load"]: run["metrics"]["attainment"] for run in facts["runs"]}
    assert tried[found["load"]] >= 0.9
    assert plot.read_text().count('id="axes_') == 2, "attainment, and goodput"
    shown = CliRunner().invoke(app, arguments).output
    for title in ("of the bound", "in time tokens/s", "longest wait s", "wasted"):
        assert title in shown


def test_options_before_goodput_are_not_passed_over() -> None:
    done = CliRunner().invoke(app, ["simulate", "--platform", "cpu", "goodput"])
    assert done.exit_code == 2
    assert "--platform" in done.stderr
    assert "behind goodput" in done.stderr


def test_a_policy_under_which_nobody_is_in_time_is_shown(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens,deadline_s\n0,20,30,0.001\n")
    arguments = ["simulate", "--load", "1", "--workload", str(trace), "--policies", "fcfs"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "in time" in done.output
    assert "0.000" in done.output


def test_the_command_says_when_nothing_can_be_late(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,20,30\n")
    arguments = ["simulate", "--load", "1", "--workload", str(trace), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "no request has a deadline_s" in done.stderr
    policies = {result["cell"]["policy"] for result in json.loads(done.stdout)["results"]}
    assert "cslo-odbs" in policies, "what a mesh decides by is among those compared"


def test_goodput_that_flatters_is_told() -> None:
    short = ["simulate", "goodput", "--platform", "cpu", "--workload", "loose", "--requests", "20"]
    done = CliRunner().invoke(app, [*short, "--policies", "fcfs", "--attainment", "0.9"])
    assert done.exit_code == 0, done.output
    assert "give it more --requests than 20" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--platform", "h100"], "a100, r3090, cpu"),
        (["--workload", "beta"], "alpha, tier, loose"),
        (["--workload", "none.csv"], "No such file"),
        (["--policies", "magic"], "policy: no 'magic'"),
        (["--policies", ","], "policies: none"),
        (["--predictor", "magic"], "predictor: no 'magic'"),
        (["--load", "1,x"], "load: '1,x'"),
        (["--load", "0"], "load: '0'"),
        (["--execution", "lazy"], "continuous, static"),
        (["--plot", "plot.doc"], ".png"),
    ],
)
def test_what_the_command_cannot_do_it_says_at_once(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["simulate", "--requests", "10", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_bound_of_equal_requests_is_arithmetic() -> None:
    platform = Platform("t", StepCost(0.0, 0.01, 0.0), 10_000, 4, 16)
    records = [Record(Request(f"r{i}", 0.0, 1, 10, "all", 10)) for i in range(40)]
    # 40 answers of 10 steps each, 4 at a time, 10 ms a step.
    assert highest_rate(records, platform) == pytest.approx(40 / (40 * 10 / 4 * 0.01))
    assert np.isfinite(highest_rate(records, platform, 0.01))
