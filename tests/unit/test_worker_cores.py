"""How many cores a worker has, whatever the control groups."""

import os
from pathlib import Path

import pytest
from uellm_worker import cpu_speed
from uellm_worker.cores import Quota, granted_cores, lost_to, quota
from uellm_worker.cpu import available_memory, numa_nodes


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": ""}, 8),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_quotas_count_as_whole_cores(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert granted_cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("cores", "threads", "lost"),
    [(0.25, 1, 0.004), (1.0, 1, 0.001), (1.5, 1, 0.0), (2.0, 2, 0.0005), (3.0, 2, 0.0)],
)
def test_other_work_takes_of_processors_where_there_are_none_besides(
    cores: float, threads: int, lost: float, tmp_path: Path
) -> None:
    files = {
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/cpu.max": f"{round(cores * 100000)} 100000",
    }
    assert lost_to(0.001, threads, write(tmp_path, files)) == pytest.approx(lost)


def test_the_narrowest_quota_counts(tmp_path: Path) -> None:
    assert quota(tmp_path).cores == float("inf")
    group = "sys/fs/cgroup/cpu/a"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu:/a/b\n",
            f"{group}/cpu.cfs_quota_us": "25000\n",
            f"{group}/cpu.cfs_period_us": "100000\n",
            f"{group}/b/cpu.cfs_quota_us": "-1\n",
            f"{group}/b/cpu.cfs_period_us": "100000\n",
        },
    )
    assert quota(tmp_path) == Quota(0.25, 0.1)


def test_a_quarter_of_a_core_is_a_quarter_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_speed, "_measure_apart", lambda threads: (8e10, 2e10))
    file = tmp_path / "speed.json"
    for granted, share in ((float("inf"), 1.0), (4.0, 1.0), (0.5, 0.25)):
        monkeypatch.setattr(cpu_speed, "quota", lambda granted=granted: Quota(granted))
        found = cpu_speed.cpu_speed(2, file, 100.0)
        assert (found.flops_per_second, found.memory_bytes_per_second) == (
            8e10 * share,
            2e10 * share,
        )


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.max": "max"}, None),
        ({"memory.max": "1000000", "memory.current": "400000"}, 600_000),
        (
            {
                "memory.max": "1000000",
                "memory.current": "400000",
                "memory.stat": "anon 1\ninactive_file 100000\n",
            },
            700_000,
        ),
        ({"memory.max": "1000", "memory.current": "4000"}, 0),
    ],
)
def test_memory_is_what_the_control_group_leaves(
    files: dict[str, str], room: int | None, tmp_path: Path
) -> None:
    group = {f"sys/fs/cgroup/a/{name}": content for name, content in files.items()}
    found = available_memory(write(tmp_path, {"proc/self/cgroup": "0::/a\n"} | group))
    assert found > 1 << 20 if room is None else found == room


def test_numa_nodes_are_those_of_the_cores_that_are_granted(tmp_path: Path) -> None:
    root = "sys/devices/system/node"
    lists = {0: "0-3,16-19", 1: "8-11", 2: "6,4-5"}
    write(tmp_path, {f"{root}/node{node}/cpulist": text for node, text in lists.items()})
    assert numa_nodes(tmp_path) == (0, 2)
    assert numa_nodes(tmp_path / "nothing") == ()
