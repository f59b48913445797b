"""The replay of the paper's experiment: simple batches come out exactly, and the command runs."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import paper
from benchmarks.paper_replay import (
    METHODS,
    POSITION_SECONDS,
    SLO_SECONDS,
    Task,
    objectives,
    replay,
    their_platform,
)

BY_NAME = {method.name: method for method in METHODS}
COUNT = st.integers(1, 600)


def test_a_lone_answer_takes_a_measured_position_for_each_token() -> None:
    for name, gpus in (("UELLM", 1), ("S3", 4)):
        run = replay(BY_NAME[name], [Task(1, 100, 100, 3.0)])
        assert run.seconds == pytest.approx(100 * POSITION_SECONDS[gpus], rel=1e-3)
        assert (run.redundant_kv, run.cut, run.violations) == (0, 0, name == "S3")
        assert run.utilisation == pytest.approx(0.0134 / POSITION_SECONDS[gpus] / gpus, rel=1e-2)


def test_a_batch_is_padded_to_its_longest_and_cut_where_its_method_cuts() -> None:
    tasks = [Task(10, 100, 100, 1e9), Task(40, 20, 400, 1e9)]
    fifo, cut = replay(BY_NAME["UELLM-deploy"], tasks), replay(BY_NAME["UELLM"], tasks)
    assert fifo.redundant_kv == pytest.approx(1 - (109 + 439) / (2 * (40 + 399)))
    assert (fifo.cut, cut.cut) == (0, 0.5)
    assert cut.redundant_kv == pytest.approx(1 - (109 + 189) / (2 * (40 + 149)))
    assert replay(BY_NAME["UELLM"], tasks, alike=True).seconds == fifo.seconds


def test_s3_takes_answers_that_add_up_to_its_limit() -> None:
    tasks = [Task(5, tokens, tokens, 1e9) for tokens in (600, 24, 400)]
    s3 = BY_NAME["S3"]
    apart = replay(s3, [replace(tasks[0], reference_tokens=601), *tasks[1:]])
    together = replay(s3, tasks)
    assert together.seconds < apart.seconds
    assert together.redundant_kv > apart.redundant_kv > 0


def test_a_stress_test_takes_half_of_the_batches_once_more() -> None:
    tasks = [Task(5, 50, 50, 20.0) for _ in range(40)]
    plain, tested = (replay(BY_NAME[name], tasks) for name in ("UELLM-deploy", "Morphling"))
    half = plain.seconds / 2 * POSITION_SECONDS[2] / POSITION_SECONDS[1]
    assert tested.seconds - plain.seconds == pytest.approx(half, rel=0.02)
    assert tested.violations == plain.violations


@settings(deadline=None)
@given(st.lists(st.tuples(COUNT, COUNT, COUNT), min_size=1, max_size=60), st.booleans())
def test_shares_are_shares_and_no_run_is_shorter_than_its_longest_answer(
    lengths: list[tuple[int, int, int]], alike: bool
) -> None:
    slos = objectives(len(lengths), np.random.default_rng(0))
    tasks = [Task(*each, slo) for each, slo in zip(lengths, slos, strict=True)]
    for method in METHODS:
        run = replay(method, tasks, alike=alike)
        for share in (run.violations, run.utilisation, run.redundant_kv, run.cut):
            assert 0 <= share <= 1
        assert run.latency <= run.seconds + 1e-9
        if alike or not method.capped:
            longest = max(task.own_tokens for task in tasks)
            assert run.seconds >= longest * their_platform().cost.unloaded * 0.99


def test_objectives_tighten_by_fifths() -> None:
    slos = objectives(100, np.random.default_rng(3))
    for (low, high), first in zip(SLO_SECONDS, range(0, 100, 20), strict=True):
        assert all(low <= slo <= high for slo in slos[first : first + 20])


def test_the_command_compares_all_methods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--count", "12", "--timed", "6", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["paper", *few, "--json"])
    paper.main()
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert {row["method"] for row in parts["replay"]} >= set(BY_NAME)
    ends = {(row["method"], row["engine"]): row for row in parts["closed"]}
    assert ends["fifo", "static"]["redundant_kv"] > ends["fifo", "continuous"]["redundant_kv"] == 0
    assert ends["cslo-odbs", "continuous"]["latency"] < ends["fifo", "static"]["latency"]
    assert {row["load"] for row in parts["timed"]} == set(paper.LOADS)
    monkeypatch.setattr(sys, "argv", ["paper", *few, "--part", "replay"])
    paper.main()
    assert "S3" in capsys.readouterr().out
