"""What the benchmark of deployments rests on: wires, control groups, placements, scores."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.hosts import NoHostsError, Quota, groups
from benchmarks.layouts import Layout
from benchmarks.scores import kendall, median_error, ranks, regret, scores, spearman
from benchmarks.wires import Wires
from uellm.placement.topology import LinkSpeed

SOME = st.lists(st.floats(0.1, 100), min_size=2, max_size=12, unique=True)


def test_packets_wait_for_those_before_them_on_their_wire_alone() -> None:
    wires = Wires(
        {(0, 1): LinkSpeed(0.01, 1e6), (1, 0): LinkSpeed(0.01, 1e6), (0, 2): LinkSpeed(0.0, 1e9)}
    )
    assert wires.arrival(0, 1, 1000, 5.0) == pytest.approx(5.011)
    assert wires.arrival(0, 1, 1000, 5.0) == pytest.approx(5.012)
    assert wires.arrival(1, 0, 1000, 5.0) == pytest.approx(5.011)
    assert wires.arrival(0, 2, 1000, 5.0) == pytest.approx(5.000001)
    assert wires.arrival(0, 1, 1000, 6.0) == pytest.approx(6.011)


def mounted(tmp_path: Path, *lines: str) -> Path:
    mounts = tmp_path / "mounts"
    mounts.write_text("".join(f"{line}\n" for line in lines))
    return mounts


def test_control_groups_of_both_versions_are_found(tmp_path: Path) -> None:
    unified = tmp_path / "unified"
    unified.mkdir()
    (unified / "cgroup.controllers").write_text("cpuset cpu io\n")
    second = f"cgroup2 {unified} cgroup2 rw 0 0"
    first = f"cgroup {tmp_path}/cpu cgroup rw,cpu,cpuacct 0 0"
    other = f"cgroup {tmp_path}/cpuset cgroup rw,cpuset 0 0"
    assert groups(mounted(tmp_path, second, other)) == unified
    assert groups(mounted(tmp_path, second, first)) == tmp_path / "cpu"
    (unified / "cgroup.controllers").write_text("io\n")
    with pytest.raises(NoHostsError, match="no control groups"):
        groups(mounted(tmp_path, second, other))


def test_quotas_are_written_as_either_version_has_them(tmp_path: Path) -> None:
    quota = Quota(tmp_path)
    quota.set(0.25)
    assert (tmp_path / "cpu.cfs_period_us").read_text() == "10000"
    assert (tmp_path / "cpu.cfs_quota_us").read_text() == "2500"
    quota.set(0)
    assert (tmp_path / "cpu.cfs_quota_us").read_text() == "-1"
    (tmp_path / "cpu.max").write_text("max 100000")
    quota.set(0.5)
    assert (tmp_path / "cpu.max").read_text() == "5000 10000"
    quota.set(0)
    assert (tmp_path / "cpu.max").read_text() == "max 10000"


def test_a_layout_is_a_plan_file_and_back() -> None:
    layout = Layout("it", ("a", "b", "c"), (3, 1, 2))
    assert layout.stages == [
        {"device_id": "a", "first_layer": 0, "last_layer": 2},
        {"device_id": "b", "first_layer": 3, "last_layer": 3},
        {"device_id": "c", "first_layer": 4, "last_layer": 5},
    ]
    assert Layout.of("it", layout.replica()) == layout


@given(SOME)
def test_orders_that_agree_have_all_the_marks(values: list[float]) -> None:
    doubled = [2 * value for value in values]
    assert spearman(values, doubled) == pytest.approx(1)
    assert kendall(values, doubled) == 1
    assert spearman(values, [-value for value in values]) == pytest.approx(-1)
    assert regret(values, doubled) == 0
    assert median_error(doubled, values) == pytest.approx(1)


def test_scores_of_orders_that_do_not_agree() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0
    assert regret([1.0, 2.0, 3.0], [1.5, 1.2, 9.0]) == pytest.approx(0.25)


def test_what_is_held_back_is_read_as_either_version_has_it(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("nr_periods 3\nnr_throttled 2\nthrottled_time 1500000000\n")
    assert Quota(tmp_path).held_seconds() == 1.5
    (tmp_path / "cpu.stat").write_text("usage_usec 9\nnr_throttled 2\nthrottled_usec 2500000\n")
    assert Quota(tmp_path).held_seconds() == 2.5


def plan(name: str, measured_ms: float, **told_ms: float) -> dict[str, object]:
    """A plan of one stage, as the benchmark has it."""
    stage = {"planned_ms": told_ms, "measured_ms": measured_ms, "spread": 0.01}
    return {
        "name": name,
        "machine": 1.1,
        "measured_seconds": measured_ms / 10,
        "measured_tokens_per_second": 1 / measured_ms,
        "predicted_seconds": {how: ms / 10 for how, ms in told_ms.items()},
        "predicted_tokens_per_second": {how: 1 / ms for how, ms in told_ms.items()},
        "stages": {"alone": [stage], "full": [stage]},
    }


def test_drift_is_told_from_what_predictions_err_by() -> None:
    plans = [plan("a", 10.0, cold=5.0, anew=10.0), plan("b", 20.0, cold=10.0, anew=20.0)]
    found = scores(plans, plan("a", 8.0, cold=5.0, anew=8.0))
    assert found["machine"]["probes"] == 0.5
    assert found["machine"]["same_stages"] == {"alone": 0.25, "full": 0.25}
    assert found["cold"]["stages alone"]["median_error"] == 0.5
    assert found["anew"]["stages alone"]["median_error"] == 0.0
    assert found["anew"]["latency"]["spearman"] == 1.0
