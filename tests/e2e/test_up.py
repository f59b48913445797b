"""`uellm up` as a user runs it: it comes up, answers, goes down in order, and leaves nothing."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.checkpoints import write_adapter
from tests.support.waiting import eventually
from uellm.cli import exits
from uellm.mesh.state import MeshState, find_mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
UELLM = Path(sys.executable).parent / "uellm"


class Up:
    """A mesh without models' libraries: its engine makes tokens of seed and position."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("UELLM_")}
        self.environment |= {"UELLM_HOME": str(home), "UELLM_WORKER_ENGINE": "instant"}
        self.process: asyncio.subprocess.Process | None = None
        self.tree: list[psutil.Process] = []

    async def start(self, *arguments: str) -> MeshState:
        self.process = await asyncio.create_subprocess_exec(
            UELLM, "up", "--port", "0", *arguments, env=self.environment,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            if line.startswith(b"try"):
                break
        assert line, "it ended before it was up"
        state = find_mesh(self.home)
        assert state is not None
        self.tree = psutil.Process(self.process.pid).children(recursive=True)
        return state

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            UELLM, *arguments, env=self.environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    async def gone(self) -> None:
        def there(process: psutil.Process) -> bool:
            try:
                return process.is_running() and process.status() != "zombie"
            except psutil.NoSuchProcess:  # Between the two.
                return False

        await eventually(lambda: not any(map(there, self.tree)))


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    mesh = Up(tmp_path / "home")
    yield mesh
    if mesh.process is not None and mesh.process.returncode is None:
        mesh.process.kill()
        await mesh.process.wait()
    await mesh.gone()


async def in_force(up: Up, words: str) -> bool:
    _, out, _ = await up.run("policy", "show", "demo")
    return words in out


async def has_versions(up: Up) -> bool:
    """Whether a profiler has become the one that learns."""
    status, out, _ = await up.run("profiler", "versions", "--json")
    return status == 0 and bool(json.loads(out))


async def healthy(up: Up) -> dict[str, Any]:
    """What `uellm health` says once all services have answered in time."""
    status, out, _ = await up.run("health", "--json")
    assert status == exits.OK, out
    found: dict[str, Any] = json.loads(out)
    return found


async def answers(up: Up) -> bool:
    status, _, err = await up.run("generate", "Hello again", "--max-tokens", "8")
    # Where a gateway takes longer to start again than a client is patient.
    assert status in (exits.OK, exits.UNREACHABLE), err
    return status == exits.OK


async def explained(up: Up, request_id: str) -> bool:
    status, out, err = await up.run("why", request_id)
    assert status == 0, err
    return "sent to demo-0" in out and "Answered after" in out


async def test_it_answers_heals_and_drains(up: Up, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", layers=8, hidden=192)
    state = await up.start("--workers", "2", "--adapter", f"twist={adapter}")
    assert up.process is not None
    assert set(state.pids) == {
        *("gateway-1", "profiler-1", "scheduler-1", "deployer-1", "worker-1", "worker-2")
    }
    status, out, err = await up.run("generate", "Hello", "--max-tokens", "8", "--deadline", "1h")
    assert (status, bool(out.strip())) == (0, True), err
    assert "sure to make it" in err
    assert "deadline met" in err
    status, out, _ = await up.run("models", "--json")
    (model,) = json.loads(out)
    assert (model["name"], model["adapters"]) == ("demo", ["twist"])
    assert (model["stored_dtype"], model["dtype"]) == ("float16", "float32")
    _, out, _ = await up.run("models")
    assert "…" not in out, "cut off"
    status, out, err = await up.run("generate", "Hi", "--max-tokens", "8", "--adapter", "twist")
    assert (status, bool(out.strip())) == (0, True), err
    status, _, err = await up.run("generate", "Hi", "--adapter", "twits")
    assert (status, "choose of twist" in err, err.count("\n")) == (2, True, 1), err
    await eventually(lambda: has_versions(up))
    status, out, err = await up.run("profiler", "versions", "--json")
    assert status == 0, err
    assert [(v["number"], v["predictor"]) for v in json.loads(out)] == [(1, "text")]
    status, _, err = await up.run("profiler", "rollback", "7")
    assert (status, "no earlier version" in err) == (2, True), err
    health = await eventually(lambda: healthy(up))
    assert {service["status"] for service in health["services"]} == {"SERVING"}
    assert health["deployments"][0]["replicas"][0]["state"] == "READY"

    status, out, err = await up.run(
        *("policy", "set", "demo", "slo-odbs", "threshold=5000", "class.batch.deadline=1h"),
        *("--execution", "static"),
    )
    assert status == 0, err
    await eventually(lambda: in_force(up, "slo-odbs static"))
    _, out, _ = await up.run("policy", "show", "demo")
    assert "slo-odbs, chosen for this model" in out
    assert "batch requests that do not say: deadline 60.0 min" in out
    status, out, err = await up.run("generate", "Hi", "--max-tokens", "8")
    assert (status, bool(out.strip())) == (0, True), err
    status, _, err = await up.run("policy", "set", "demo", "slo-odbs", "treshold=1")
    assert (status, err.count("\n")) == (2, 1), err
    assert "treshold: no such setting of slo-odbs; available: length_overhead" in err
    status, out, _ = await up.run("policy", "reset", "demo")
    assert status == 0
    await eventually(lambda: in_force(up, "continuous"))

    _, out, _ = await up.run("generate", "Why?", "--max-tokens", "8", "--json")
    request_id = json.loads(out)["request_id"]
    await eventually(lambda: explained(up, request_id))
    file = str(tmp_path / "decisions.jsonl")
    status, _, err = await up.run("decisions", "demo", "--out", file)
    assert (status, "decisions in" in err) == (0, True), err
    # By three policies, one of them static: every decision comes out as it did.
    status, out, err = await up.run("replay", file, "--json")
    replayed = json.loads(out)
    assert (status, replayed["different"]) == (0, 0), out
    assert replayed["dispatch_decisions"] >= 4
    assert replayed["step_decisions"] >= 1

    os.kill(state.pids["gateway-1"], signal.SIGKILL)
    await eventually(lambda: answers(up))
    after = find_mesh(up.home)
    assert after is not None
    assert after.gateways == state.gateways
    up.tree += psutil.Process(up.process.pid).children(recursive=True)

    up.process.send_signal(signal.SIGINT)
    assert await up.process.wait() == 130
    await up.gone()
    assert find_mesh(up.home) is None
    status, _, err = await up.run("models")
    assert (status, "uellm up" in err) == (3, True)


@pytest.mark.parametrize("engine", ["instant", pytest.param("shard", marks=pytest.mark.slow)])
async def test_a_model_is_spread_over_the_devices_of_one_worker(up: Up, engine: str) -> None:
    up.environment["UELLM_WORKER_ENGINE"] = engine
    await up.start("--devices", "sim:0-2:memory=1GiB", "--stages", "3")
    (deployment,) = (await eventually(lambda: healthy(up)))["deployments"]
    assert deployment["replicas"][0]["stages"] == [
        "worker-1/sim:0:0-2",
        "worker-1/sim:1:3-5",
        "worker-1/sim:2:6-7",
    ]
    assert deployment["stored_dtype"] == "float16"
    status, out, err = await up.run("generate", "Count from 1 to 20.", "--max-tokens", "64")
    assert status == 0, err
    if engine == "shard":
        assert out.strip() == ", ".join(map(str, range(1, 21)))
    for _ in range(2):
        await up.run("generate", "Count from 1 to 20. " * 8, "--max-tokens", "2")
    _, out, _ = await up.run("health", "--json")
    held = json.loads(out)["deployments"][0]["replicas"][0]["engine"]
    assert held["kv_tokens_total"] > 0
    assert held["kv_tokens_used"] == 0
    if engine == "shard":
        assert held["prefix_hit_tokens"] > 0
    _, out, _ = await up.run("health")
    assert f"which saved {held['prefix_hit_tokens']} prompt tokens" in out


async def test_nothing_outlives_it_when_it_is_killed(up: Up) -> None:
    await up.start()
    assert up.process is not None
    up.process.kill()
    await up.process.wait()
    await up.gone()


async def test_a_taken_port_is_said_and_nothing_is_started(up: Up) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, _, err = await up.run("up", "--port", port)
    assert status == 2
    assert err.count("\n") == 1
    assert port in err
    assert "--port" in err


async def test_a_model_that_does_not_fit_ends_it_in_one_line(up: Up) -> None:
    status, _, err = await up.run("up", "--port", "0", "--devices", "sim:0:memory=2MiB")
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert "are missing" in last
    assert "worker-1/sim:0" in last
    assert "next try" not in last
    assert find_mesh(up.home) is None


async def test_more_stages_than_devices_are_refused_and_nothing_is_left(up: Up) -> None:
    status, _, err = await up.run("up", "--port", "0", "--stages", "3", "--workers", "2")
    assert status == 2
    assert "--stages: 3" in err
    assert "have 2" in err
    assert find_mesh(up.home) is None
