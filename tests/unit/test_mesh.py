"""Supervision: backoff, restarts, giving up, and that nothing outlives its parent."""

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import eventually
from uellm.core.errors import ConfigurationError, UnavailableError
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DRAIN_ORDER, MeshOptions, ModelSource, parse_models
from uellm.mesh.readiness import LIBRARIES_SECONDS, START_SECONDS, patience
from uellm.mesh.state import MeshState, find_mesh, home, read_state
from uellm.mesh.supervision import Backoff, ServiceSpec, Supervised


@pytest.fixture(autouse=True)
def uellm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UELLM_HOME", str(tmp_path / "home"))


def test_pauses_double_and_end() -> None:
    backoff = Backoff(0.2, 5.0, 10.0, attempts=8)
    assert [backoff.after(0.1) for _ in range(8)] == [
        *(pytest.approx(seconds) for seconds in (0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0)),
        None,
    ]


@given(st.lists(st.floats(0, 100), max_size=50))
def test_a_good_run_is_forgiven(runs: list[float]) -> None:
    backoff = Backoff(attempts=1000)
    for ran in runs:
        backoff.after(ran)
    assert backoff.after(10.0) == pytest.approx(0.2)


def supervised(tmp_path: Path, program: str, **backoff: float) -> Supervised:
    spec = ServiceSpec(
        "worker-1", "worker", [sys.executable, "-c", program], tmp_path / "w.log", os.environ
    )
    options = {"first_seconds": 0.01, "attempts": 3} | backoff
    return Supervised(spec, backoff=Backoff(**options))  # type: ignore[arg-type]


async def test_a_dead_service_is_started_again(tmp_path: Path) -> None:
    service = supervised(tmp_path, "import time; time.sleep(60)", good_seconds=0)
    running = asyncio.create_task(service.run())
    first = await eventually(lambda: service.pid)
    os.kill(first, signal.SIGKILL)
    second = await eventually(lambda: service.pid if service.pid != first else None)
    assert service.restarts == 1
    await service.stop(5)
    await running
    assert not psutil.pid_exists(second)


async def test_workers_that_end_are_named_and_not_waited_for_as_long(tmp_path: Path) -> None:
    service = supervised(tmp_path, "import time; time.sleep(60)", good_seconds=0)
    assert (patience([service]), service.ended) == (LIBRARIES_SECONDS, "")
    running = asyncio.create_task(service.run())
    for ended in ("worker-1 ended (killed by SIGKILL)", "worker-1 ended 2 times, last (killed"):
        os.kill(await eventually(lambda: service.pid), signal.SIGKILL)
        await eventually(lambda words=ended: service.ended.startswith(words))
        assert patience([service]) == START_SECONDS
    await service.stop(5)
    await running


async def test_it_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    service = supervised(tmp_path, "import sys; sys.exit('out of luck')")
    with pytest.raises(UnavailableError, match=r"worker-1 dies again and again(?s:.)*out of luck"):
        await service.run()


async def test_a_wrong_setting_is_not_tried_again(tmp_path: Path) -> None:
    service = supervised(tmp_path, "import sys; print('port: taken'); sys.exit(2)")
    with pytest.raises(ConfigurationError, match="port: taken"):
        await service.run()
    assert service.restarts == 0


async def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)\n"
    service = supervised(tmp_path, program + "time.sleep(60)")
    running = asyncio.create_task(service.run())
    await eventually(lambda: (tmp_path / "w.log").exists() and (tmp_path / "w.log").read_text())
    await service.stop(0.1)
    await running
    assert service.pid is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; from uellm.mesh.tether import tethered\n"
        "command = tethered([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(subprocess.Popen(command).pid, flush=True); time.sleep(60)"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    parent.kill()
    await parent.wait()
    await eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_state_is_of_this_process_only(tmp_path: Path) -> None:
    state = MeshState.of_this_process(("127.0.0.1:1",), "redis://127.0.0.1:2/0", {"worker-1": 3})
    state.write(tmp_path)
    assert read_state(tmp_path) == state
    assert state.alive
    other = MeshState(state.pid, state.gateways, state.redis_url, {}, state.started - 100)
    assert not other.alive
    MeshState.remove(tmp_path)
    assert read_state(tmp_path) is None


def test_of_several_meshes_the_last_one_that_runs_is_found(tmp_path: Path) -> None:
    assert find_mesh(tmp_path) is None
    dead = MeshState(999_999_999, ("127.0.0.1:1",), "redis://127.0.0.1:2/0", {}, 9e9)
    dead.write(tmp_path / "logs" / "dead")
    assert find_mesh(tmp_path) == dead
    first = MeshState.of_this_process(("127.0.0.1:3",), "redis://127.0.0.1:4/0", {})
    first.write(tmp_path / "logs" / "first")
    second = replace(first, gateways=("127.0.0.1:5",), started=first.started + 0.5)
    second.write(tmp_path / "logs" / "second")
    assert find_mesh(tmp_path) == second
    MeshState.remove(tmp_path / "logs" / "second")
    assert find_mesh(tmp_path) == first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            MeshOptions(models=(), host="127.0.0.1:80", listens=True),
            "--listen: '127.0.0.1:80' is no",
        ),
        (MeshOptions(models=(), host="[::1]:80"), "--host: '\\[::1]:80' is no name or address"),
        (MeshOptions(models=(), host="192.0.2.1", listens=True), "; correct --listen or --port"),
    ],
)
async def test_an_address_that_cannot_be_listened_at_is_named_by_its_option(
    options: MeshOptions, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        async with Mesh(options).running():
            pass


async def test_logs_of_meshes_that_run_are_kept() -> None:
    runs = [home() / "logs" / f"2020010{day}-000000-1" for day in range(1, 9)]
    for run in runs:
        run.mkdir(parents=True)
    MeshState.of_this_process(("127.0.0.1:1",), "redis://127.0.0.1:2/0", {}).write(runs[0])
    MeshState(999_999_999, (), "redis://127.0.0.1:2/0").write(runs[1])
    with pytest.raises(ConfigurationError):
        async with Mesh(MeshOptions(models=(), redis_url="redis://127.0.0.1:1/0")).running():
            pass
    assert [run.exists() for run in runs] == [True, False, False, *[True] * 5]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"pid": "x"}', "null"])
def test_a_damaged_state_file_is_none(content: str) -> None:
    home().mkdir(parents=True)
    (home() / "mesh.json").write_text(content)
    assert read_state(home()) is None


def test_models_are_named_by_what_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "my model"
    directory.mkdir()
    assert ModelSource.parse(str(directory)) == ModelSource("my-model", str(directory))
    assert ModelSource.parse(f"m={directory}") == ModelSource("m", str(directory))
    assert ModelSource.parse("/not/here") == ModelSource("here", "/not/here")
    assert ModelSource.parse("org/name") == ModelSource("org/name", "org/name")
    assert ModelSource.parse("short=org/name") == ModelSource("short", "org/name")


def test_services_are_told_what_they_are(tmp_path: Path) -> None:
    options = MeshOptions(models=(), workers=3, devices="cpu", port=5, traced=True)
    specs = options.services("redis://x", tmp_path, tmp_path / "spans", {"PATH": "/bin"})
    assert [spec.service_id for spec in specs if spec.role == "worker"] == [
        "worker-1",
        "worker-2",
        "worker-3",
    ]
    assert [role for role in dict.fromkeys(spec.role for spec in specs)] == list(DRAIN_ORDER)
    worker = specs[-2]
    assert worker.environment == {
        "PATH": "/bin",
        "UELLM_REDIS_URL": "redis://x",
        "UELLM_HOST": "127.0.0.1",
        "UELLM_WORKER_SERVICE_ID": "worker-3",
        "UELLM_WORKER_DEVICES": "cpu",
        "UELLM_OTEL_EXPORTER": "console",
        "UELLM_OTEL_FILE": str(tmp_path / "spans" / "worker-3.jsonl"),
    }
    assert specs[0].environment["UELLM_GATEWAY_PORT"] == "5"


async def test_a_mesh_that_cannot_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UELLM_NO_SUCH_SETTING", "1")
    others = psutil.Process().children(recursive=True)
    mesh = Mesh(MeshOptions(models=()))
    with pytest.raises(ConfigurationError, match="UELLM_NO_SUCH_SETTING"):
        async with mesh.running():
            pass
    assert psutil.Process().children(recursive=True) == others
    assert find_mesh(home()) is None
    assert not (mesh.directory / "redis").exists()


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert [m.name for m in parse_models([f"x={tmp_path / 'a'}", "org/a"])] == ["x", "org/a"]
    with pytest.raises(ConfigurationError, match=r"both be served as 'org/a'; .* NAME=SOURCE"):
        parse_models(["org/a", str(tmp_path / "a"), "org/a"])
