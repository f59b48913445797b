"""Two lines put another machine's devices into a mesh; here it is the same machine."""

import asyncio
import json
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_up import UELLM, Up
from tests.support.checkpoints import write_adapter
from tests.support.ipv6 import needs_ipv6
from tests.support.waiting import eventually
from uellm.addresses import host_of
from uellm.mesh.joining import Token, new_secret
from uellm.mesh.options import DEMO_MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    mesh = Up(tmp_path / "home")
    yield mesh
    if mesh.process is not None and mesh.process.returncode is None:
        mesh.process.kill()
        await mesh.process.wait()
    await mesh.gone()


async def stages(up: Up) -> list[str]:
    _, out, _ = await up.run("health", "--json")
    (deployment,) = json.loads(out)["deployments"]
    (replica,) = deployment["replicas"]
    return list(replica["stages"]) if replica["state"] == "READY" else []


async def counted(up: Up, engine: str, last: int) -> bool:
    """Whether the model answers, and rightly where one computes."""
    status, out, _ = await up.run("generate", f"Count from 1 to {last}.", "--max-tokens", "64")
    right = ", ".join(map(str, range(1, last + 1)))
    return status == 0 and bool(out.strip()) and (engine == "instant" or out.strip() == right)


@asynccontextmanager
async def joined(
    up: Up, redis_url: str, host: str = "127.0.0.1", **environment: str
) -> AsyncIterator[Process]:
    """Another machine's `uellm join`, once it says that it has joined."""
    password = redis_url.partition("@")[0].rpartition(":")[2]
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    join = await asyncio.create_subprocess_exec(
        UELLM, "join", host, "--token", str(Token(port, password)),
        env=up.environment | environment, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert join.stderr is not None
        while line := (await join.stderr.readline()).decode():
            if line.startswith("joined: "):
                break
        assert "/cpu:0" in line
        up.tree += psutil.Process(join.pid).children(recursive=True)
        yield join
    finally:
        if join.returncode is None:
            join.kill()
            await join.wait()


@pytest.mark.parametrize(
    ("engine", "host"),
    [
        pytest.param("instant", "::1", marks=needs_ipv6),
        pytest.param("shard", "127.0.0.1", marks=pytest.mark.slow),
        pytest.param("shard", "::1", marks=[needs_ipv6, pytest.mark.slow]),
    ],
)
async def test_a_machine_that_joins_takes_layers_and_gives_them_back(
    up: Up, engine: str, host: str
) -> None:
    up.environment["UELLM_WORKER_ENGINE"] = engine
    state = await up.start("--listen", host, "--stages", "2")
    assert all(host_of(address) == host for address in state.gateways)
    password = state.redis_url.partition("@")[0].rpartition(":")[2]
    assert password
    assert not any(password in " ".join(p.cmdline()) for p in up.tree)
    assert len(await stages(up)) == 1
    async with joined(up, state.redis_url, host) as join:

        async def spread() -> bool:
            return len(await stages(up)) == 2

        await eventually(spread)
        assert await counted(up, engine, 20)
        # All of them are reached by addresses of this kind, and measured.
        _, out, _ = await up.run("health", "--json")
        assert {host_of(s["address"]) for s in json.loads(out)["services"]} == {host}
        status, out, err = await up.run("topology", "--probe", "--json")
        assert status == 0, err
        join.send_signal(signal.SIGINT)
        assert await join.wait() == 130

        async def whole() -> bool:
            return len(await stages(up)) == 1

        await eventually(whole)
        assert await counted(up, engine, 5)


def hub_cache(directory: Path, **models: Path) -> str:
    """A hub's cache as it is after downloads of ``acme/<name>``."""
    for name, source in models.items():
        repository = directory / f"models--acme--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, repository / "snapshots" / ("0" * 40))
    directory.mkdir(exist_ok=True)
    return str(directory)


@pytest.mark.slow
async def test_a_machine_without_the_model_fetches_its_layers(up: Up, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", layers=8, hidden=192)
    up.environment |= {
        "UELLM_WORKER_ENGINE": "shard",
        "HF_HUB_CACHE": hub_cache(tmp_path / "hub", demo=DEMO_MODEL, twist=adapter),
    }
    there = {"HF_HUB_CACHE": hub_cache(tmp_path / "empty"), "UELLM_HOME": str(tmp_path / "there")}
    state = await up.start(
        *("--listen", "127.0.0.1", "--stages", "2", "--model", "demo=acme/demo"),
        *("--adapter", "twist=acme/twist"),
    )
    fetched = tmp_path / "there" / "models"
    async with joined(up, state.redis_url, **there):

        async def spread() -> bool:
            return len(await stages(up)) == 2

        await eventually(spread)
        assert await counted(up, "shard", 20)
        status, out, err = await up.run("generate", "Hi", "--max-tokens", "8", "--adapter", "twist")
        assert (status, bool(out.strip())) == (0, True), err
    held = {path.name for path in fetched.glob("*/*.safetensors")}
    layers = {name for name in held if name.startswith("layer-")}
    assert 0 < len(layers) < 8
    assert "adapter_model.safetensors" in held
    assert not any(tmp_path.joinpath("empty").iterdir())


async def test_a_stranger_is_told_what_is_wrong(up: Up) -> None:
    state = await up.start("--listen", "127.0.0.1")
    port = int(state.redis_url.rpartition(":")[2].partition("/")[0])
    for token, says in (
        (str(Token(port, new_secret())), "--token is not of the mesh at 127.0.0.1"),
        (str(Token(1, new_secret())), "no mesh answers at 127.0.0.1, port 1"),
        ("nonsense", "copy the whole line"),
    ):
        status, _, err = await up.run("join", "127.0.0.1", "--token", token)
        assert status == 2, err
        assert says in err.splitlines()[-1]
